"""What malformed offsets do to every operation that takes some, on one backend, in a process that
may crash: `python -m tests.kernels.offsets_worker BACKEND`.

They are refused by name. Past the check, as on a GPU, a kernel reads and writes within its
elements, and what belongs to a malformed sequence is NaN.
"""

import re
import sys

import torch
from torch import Tensor

from tests.kernels.backends import DEVICE
from tests.kernels.operations import OPERATIONS, Operation
from tests.kernels.test_contract import run
from warpo.kernels import _offsets, dispatch, ops

EXTREMES = (-(2**31), -1, 2**31 - 1)


def malformed(offsets: Tensor, bound: int, generator: torch.Generator, extreme: bool) -> Tensor:
    """Random offsets of which one at least is malformed."""
    while True:
        count = offsets.numel()
        found = torch.randint(-2, bound + 3, (count,), generator=generator)
        if torch.rand((), generator=generator) < 0.7:
            found = found.sort().values
        if extreme and torch.rand((), generator=generator) < 0.5:
            place = torch.randint(count, (), generator=generator)
            found[place] = EXTREMES[int(torch.randint(3, (), generator=generator))]
        if (found.clamp(0, bound).cummax(0).values != found).any():
            return found.to(offsets)


def refused(operation: Operation, backend: str, generator: torch.Generator, times: int) -> None:
    for name, bound in operation.offsets.items():
        for _ in range(times):
            tensors = operation.packed()
            tensors[name] = malformed(tensors[name], bound, generator, extreme=True)
            try:
                run(operation, tensors, backend, **operation.packed_options)
            except ValueError as error:
                assert re.match(rf"{name}\[\d+\] = -?\d+ is ", str(error)), error
            else:
                raise AssertionError(f"{operation.name}: {name} = {tensors[name]} is taken")


def poisoned(operation: Operation, backend: str, generator: torch.Generator, times: int) -> None:
    options = operation.packed_options
    with torch.no_grad():
        wanted = operation(operation.packed(), backend if DEVICE == "cuda" else "cpu", **options)
    for name, bound in operation.offsets.items():
        for _ in range(times):
            tensors = operation.packed()
            tensors[name] = malformed(tensors[name], bound, generator, extreme=True)
            results, gradients = run(operation, tensors, backend, **options)
            numbers = [x for x in (*results, *gradients) if x.is_floating_point()]
            assert any(x.isnan().any() for x in numbers), (operation.name, name, tensors[name])
        # only the last sequence is concerned
        tensors = operation.packed()
        tensors[name][-1] = bound + 1
        with torch.no_grad():
            found = operation(tensors, backend, **options)
        end = int(tensors[name][-2])
        for x, y in zip(found, wanted, strict=True):
            if x.shape[:1] == (bound,) and operation.name not in WHOLE:
                torch.testing.assert_close(x[:end], y[:end], rtol=1e-5, atol=1e-6)
                assert x[end:].isnan().all(), operation.name
        if operation.outputs == 1 and operation.name not in WHOLE:
            assert found[0].isnan(), (operation.name, found[0])


# their gradient is poisoned as a whole
WHOLE = ("policy_loss_from_logits", "policy_loss_from_hidden")
# Triton's interpreter is slow, and these launch what others launch
SAME = (
    "lambda_returns",
    "discounted_returns",
    "vtrace",
    "off_policy_returns",
    "policy_loss_from_hidden",
)


def main(backend: str) -> None:
    takers = [operation for operation in OPERATIONS if operation.offsets]
    generator = torch.Generator().manual_seed(1)
    unchecked = DEVICE != "cpu"
    if not unchecked:
        refusing = [backend] + ["reference"] * (backend == "cpu")
        for operation in takers:
            for name in refusing:
                refused(operation, name, generator, 20)
        bad = torch.tensor([0, 5, 11], dtype=torch.int32)
        x = torch.zeros(10)
        try:
            ops.kto_reference_point(x, x, cu_seqlens=bad)
        except ValueError as error:
            assert str(error) == "cu_seqlens[2] = 11 is past the 10 tokens"
        else:
            raise AssertionError("kto_reference_point")
        from warpo.kernels import _cpu

        unchecked = backend == "triton" or _cpu.instruction_set() == "emulated"
        _offsets._on_host = lambda _: False
    if unchecked:
        dispatch.load(backend)
        interpreted = DEVICE == "cpu" and backend == "triton"
        for operation in takers:
            if not (interpreted and operation.name in SAME):
                poisoned(operation, backend, generator, 1 if interpreted else 20)


main(sys.argv[1])
