"""The processes that train together, as far as a sum, a norm or a decision is theirs and not one's.

Every rank runs the same program on the same data. It works on its share of a step, and the shares
are put together on all of them: what is decided by their numbers is decided alike everywhere. What
fails on one rank fails on all of them, where they meet next, under its number and phase.

Every denominator, gradient, norm and metric of a step, the wish to stop, the log and the
checkpoints go through a `Ranks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

from warpo.engine.errors import RankError, WarpoError, one_line

T = TypeVar("T")
R = TypeVar("R")
Number = TypeVar("Number", int, float, Tensor)


class Failure(NamedTuple):
    """An error as it travels: of this class, with a message that names rank and phase."""

    kind: type[BaseException]
    text: str


class Ranks:
    """One process: its sums are its own.

    Attributes:
        rank: number of this process, from 0.
        size: number of ranks.
        phase: phase of the step that this rank is in, for its errors; empty between phases.
    """

    rank = 0
    size = 1
    phase = ""

    def __init__(self) -> None:
        self._agreed: BaseException | None = None

    @property
    def is_main(self) -> bool:
        """True for the one process that writes the log and the checkpoints."""
        return self.rank == 0

    def first_of(self, count: int, rank: int | None = None) -> int:
        """Number of the first of `count` items that is in the share of a rank, this one's if not
        given.
        """
        return count * (self.rank if rank is None else rank) // self.size

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of the items: neighbours; the parts of all ranks in their order are the
        whole.
        """
        count = len(items)
        return items[self.first_of(count) : self.first_of(count, self.rank + 1)]

    def exchange(self, value: T) -> list[T]:
        """The values of all ranks, in their order.

        Raises:
            RankError: a rank has ended, or did not come in time.
            WarpoError, KeyboardInterrupt: what another rank has failed with.
        """
        return [value]

    def together(self, work: Callable[[], T]) -> list[T]:
        """The results of `work` on all ranks; where it raises on one, it raises on all of them."""
        if self.size == 1:
            return [work()]
        try:
            mine = work()
        except BaseException as error:
            self.fail(error)
            raise
        return self.exchange(mine)

    def spread(self, items: Sequence[T], work: Callable[[Sequence[T]], Sequence[R]]) -> list[R]:
        """work(items), in the order of the items: every rank does its share, none where it is
        empty.
        """
        mine = self.share(items)
        parts = self.together(lambda: list(work(mine)) if mine else [])
        return [result for part in parts for result in part]

    def on_main(self, work: Callable[[], T]) -> T | None:
        """work() on the main rank alone; all ranks get its result, or its error."""
        return self.together(lambda: work() if self.is_main else None)[0]

    def fail(self, error: BaseException) -> None:
        """Let the other ranks fail where they meet this one next, and wait for them.

        Raises:
            WarpoError, KeyboardInterrupt: the same on all ranks; not where `error` is of none of
                these classes, which the caller raises, or where one process is all there is.
        """

    def agrees_on(self, error: BaseException) -> bool:
        """True if all ranks have failed with this error, so that they can go on together."""
        return self.size == 1 or error is self._agreed

    def sum(self, value: Number) -> Number:
        """The sum over all ranks of a count, or of a tensor of one shape."""
        total, *others = self.exchange(value)
        for other in others:
            total = total + other
        return total

    def max(self, value: float) -> float:
        """The largest of all ranks."""
        return max(self.exchange(value))

    def gather(self, items: Sequence[T]) -> list[T]:
        """The items of all ranks, rank by rank."""
        return [item for part in self.exchange(items) for item in part]

    def any(self, flag: bool) -> bool:
        """True if it is true on any rank."""
        return any(self.exchange(flag))

    def barrier(self) -> None:
        """Wait for the other ranks."""
        self.exchange(None)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace the gradient of each parameter by its sum over all ranks."""

    def norm(self, norm: Tensor) -> Tensor:
        """The L2 norm of all parts, from that of the part that this rank holds."""
        return norm

    def _failure(self, error: BaseException) -> Failure:
        where = f"rank {self.rank}{f', {self.phase}' if self.phase else ''}: "
        if isinstance(error, WarpoError):
            return Failure(type(error), f"{where}{error}")
        if isinstance(error, KeyboardInterrupt):
            return Failure(KeyboardInterrupt, "")
        return Failure(RankError, f"{where}{type(error).__name__}: {one_line(error)}")


ONE_RANK = Ranks()
