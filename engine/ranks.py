"""The processes that train together, as far as a sum, a norm or a decision is theirs and not one's.

Every denominator, gradient, norm and metric of a step, the wish to stop, the log and the
checkpoints go through a `Ranks`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")
Number = TypeVar("Number", int, float, Tensor)


class Ranks:
    """One process: its sums are its own.

    Attributes:
        rank: number of this process, from 0.
        size: number of ranks.
    """

    rank = 0
    size = 1

    @property
    def is_main(self) -> bool:
        """True for the one process that writes the log and the checkpoints."""
        return self.rank == 0

    def sum(self, value: Number) -> Number:
        """The sum over all ranks of a count, or of a tensor of one shape."""
        return value

    def gather(self, items: Sequence[T]) -> list[T]:
        """The items of all ranks, rank by rank."""
        return list(items)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace the gradient of each parameter by its sum over all ranks."""

    def norm(self, norm: Tensor) -> Tensor:
        """The L2 norm of all parts, from that of the part that this rank holds."""
        return norm

    def any(self, flag: bool) -> bool:
        """True if it is true on any rank."""
        return flag

    def barrier(self) -> None:
        """Wait for the other ranks."""


ONE_RANK = Ranks()
