"""One function of another library at one size, to be timed as it is and as warpo replaces it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DropIn:
    """A call of a function of a library.

    Attributes:
        function: its name in `Library.replacements`.
        size: shapes and dtype, as the table shows them.
        mode: "forward", or "forward + backward".
        make: allocates the inputs, and returns what is timed: a function that is given the
            library's function or ours and calls it.
    """

    function: str
    size: str
    mode: str
    make: Callable[[], Callable[[Callable], object]]
