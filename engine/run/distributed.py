"""The ranks that torchrun starts, over torch.distributed.

What is small travels by a gloo group on the host, one message at a time: a value, or the failure of
the rank that sends it. Tensors travel by the backend of their device, gloo or nccl, and only after
such a message, so that a rank that has failed is heard of before anything waits for its tensors.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from warpo.engine.errors import ConfigError, RankError, WarpoError, one_line
from warpo.engine.ranks import ONE_RANK, Failure, Ranks
from warpo.engine.run.process import world_size

T = TypeVar("T")

DEADLINE_S = 1800.0
"""Seconds that a rank may be behind the others."""
# of a failed one: the others may be where it cannot be heard, such as in vLLM's own groups
FAILURE_DEADLINE_S = 20.0
_NOTE = "warpo/failed"


class DistributedRanks(Ranks):
    """This process among those of the default group of torch.distributed.

    Args:
        deadline_s: how long the others are waited for.
    """

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        super().__init__()
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self._deadline = timedelta(seconds=deadline_s)
        self._host = distributed.new_group(backend="gloo", timeout=self._deadline)

    def exchange(self, value: T) -> list[T]:
        """The values of all ranks, in their order. Tensors of a GPU arrive on this rank's.

        Raises:
            RankError: a rank has ended, or did not come in time.
            WarpoError, KeyboardInterrupt: what another rank has failed with.
        """
        received = self._send(value, self._deadline)
        self._raise_failure(received)
        return received

    def fail(self, error: BaseException) -> None:
        """Let the other ranks fail where they meet this one next, and wait for them.

        Raises:
            WarpoError, KeyboardInterrupt: the same on all ranks; not where `error` is of none of
                these classes, which the caller raises.
        """
        if self.agrees_on(error) or isinstance(error, RankError):
            return
        failure = self._failure(error)
        received = self._send(failure, self._deadline)
        if failure.kind is RankError and _first_failure(received) == failure:
            # its own class and traceback say more
            self._agreed = error
        else:
            self._raise_failure(received)

    def leave(self, error: BaseException) -> bool:
        """Tell the others of a failure that they have not heard of: where they look once they miss
        this rank, and by a last message. True if another rank tells the user of it.
        """
        if self.agrees_on(error):
            return not self.is_main and isinstance(error, WarpoError | KeyboardInterrupt)
        if isinstance(error, RankError) and self._noted():
            return True
        self._store.set(_NOTE, self._failure(error).text or "interrupted")
        with suppress(RankError, KeyboardInterrupt):
            self._send(self._failure(error), timedelta(seconds=FAILURE_DEADLINE_S))
        return False

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace the gradient of each parameter by its sum over all ranks, in its dtype; it stays
        None where no rank has one.
        """
        parameters = list(parameters)
        given = self.exchange([parameter.grad is not None for parameter in parameters])
        pending = []
        for parameter, *flags in zip(parameters, *given, strict=True):
            if not any(flags):
                continue
            grad = parameter.grad
            if grad is None:
                grad = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            parameter.grad = grad = grad.contiguous()
            pending.append(distributed.all_reduce(grad, async_op=True))
        self.wait(pending)

    def wait(self, pending: Iterable[Any]) -> None:
        """Wait for collectives.

        Raises:
            RankError: a rank has ended meanwhile.
        """
        try:
            for work in pending:
                work.wait()
        except RuntimeError as error:
            raise self._lost(error) from None

    @property
    def _store(self) -> Any:
        return distributed.distributed_c10d._get_default_store()

    def _send(self, value: Any, deadline: timedelta) -> list[Any]:
        buffer, received = io.BytesIO(), [None] * self.size
        torch.save(value, buffer)
        try:
            distributed.monitored_barrier(self._host, deadline, wait_all_ranks=True)
            distributed.all_gather_object(received, buffer.getvalue(), group=self._host)
        except RuntimeError as error:
            raise self._lost(error) from None
        return [_decode(data) for data in received]

    def _raise_failure(self, received: list[Any]) -> None:
        if failure := _first_failure(received):
            self._agreed = failure.kind(failure.text) if failure.text else failure.kind()
            raise self._agreed

    def _noted(self) -> str:
        try:
            return self._store.get(_NOTE).decode() if self._store.check([_NOTE]) else ""
        except RuntimeError:  # the rank that kept it has ended
            return ""

    def _lost(self, error: RuntimeError) -> RankError:
        if note := self._noted():
            return RankError(note)
        phase = f", {self.phase}" if self.phase else ""
        return RankError(f"rank {self.rank}{phase}: lost the others: {one_line(error)}")


def _first_failure(received: Iterable[Any]) -> Failure | None:
    """That of the first rank, none that was only interrupted where another has failed."""
    failures = [value for value in received if isinstance(value, Failure)]
    failures.sort(key=lambda failure: failure.kind is KeyboardInterrupt)
    return failures[0] if failures else None


def _decode(data: Any) -> Any:
    def place(storage: Any, location: str) -> Any:
        return storage.cuda() if location.startswith("cuda") else storage

    return torch.load(io.BytesIO(data), map_location=place, weights_only=False)


@contextmanager
def open_ranks(deadline_s: float = DEADLINE_S) -> Iterator[Ranks]:
    """The ranks that torchrun started, each on a GPU of its own where there are any; one without
    it. Where all fail, one of them tells why.

    Raises:
        ConfigError: the variables of torchrun are incomplete, or GPUs are fewer than ranks.
        SystemExit: another rank tells the error.
    """
    if world_size() == 1:
        yield ONE_RANK
        return
    _join(deadline_s)
    ranks = DistributedRanks(deadline_s)
    try:
        yield ranks
        ranks.barrier()
    except (Exception, KeyboardInterrupt) as error:
        if ranks.leave(error):
            raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 1) from None
        raise
    if "vllm" not in sys.modules:  # whose own groups end the default one with the process
        distributed.destroy_process_group()


def _join(deadline_s: float) -> None:
    missing = [
        name
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if name not in os.environ
    ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE = {world_size()} and {missing[0]} is not set: start several ranks by "
            "torchrun --nproc-per-node N -m warpo.engine.cli train CONFIG"
        )
    backend = "gloo"
    if torch.cuda.is_available():
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise ConfigError(
                f"LOCAL_RANK = {local}, and this machine has {count} CUDA devices: start at most "
                "one rank for each, by --nproc-per-node"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, timeout=timedelta(seconds=deadline_s))
