"""A call can be captured into a CUDA graph: nothing in it makes the host wait for the device or
copies what is on the host to it. On a GPU: captured, replayed with other inputs, and the same bits.
"""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels import smoke
from tests.kernels.backends import DEVICE, each_backend
from tests.kernels.operations import OPERATIONS
from tests.kernels.test_contract import assert_same, run
from warpo.kernels import _checks, dispatch

ROOT = Path(__file__).parents[2]
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs WARPO_TEST_DEVICE=cuda")
each_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)

# Those of which the host reads a result, or a result has as many elements as the values say.
WAITS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select"),
    *("bincount", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"),
}

MADE_ON_THE_HOST = (
    *((torch, name) for name in ("tensor", "as_tensor", "asarray")),
    (Tensor, "new_tensor"),
)


class Recorded(TorchDispatchMode):
    """What torch runs, with tensors of `meta` as those of the device; a capture refuses `found`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        taken = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if _is_tensor(x)]
        if name in WAITS:
            self.found.append(str(function))
        result = function(*args, **kwargs)
        given = [x for x in torch.utils._pytree.tree_leaves(result) if _is_tensor(x)]
        if len({x.device for x in (*taken, *given)}) > 1:
            self.found.append(f"{function} between devices")
        return result


@contextmanager
def made(found: list[str]) -> Iterator[None]:
    """Adds the tensors of numbers of Python to `found`, which torch fills on the host. By other
    functions in the place of torch's, since a backward pass runs outside of a TorchFunctionMode.
    """

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            if not result.is_cpu:
                found.append(name)
            return result

        return call

    with ExitStack() as stack:
        for owner, name in MADE_ON_THE_HOST:
            call = watched(name, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, call))
        yield


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


class NoKernels:
    """A backend whose kernels write nothing."""

    def plain_dtypes(self, kind: type, *lists: list[Tensor]) -> list[int]:
        return [0] * len(lists)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


def on_the_device(tensors: dict[str, Tensor], leaves: tuple[str, ...]) -> dict[str, Tensor]:
    return {
        name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta").requires_grad_(
            name in leaves
        )
        for name, x in tensors.items()
    }


def recorded(operation: Any, tensors: dict[str, Tensor], leaves: tuple[str, ...], **options: Any):
    """What a capture of a call, and of its backward pass where there are leaves, would refuse."""
    inputs = on_the_device(tensors, leaves)
    with (
        patch.object(dispatch, "choose", lambda tensor, backend: "cuda"),
        patch.object(_checks, "_check_memory", lambda *_: None),
        patch.object(dispatch, "load", lambda name: NoKernels()),
        Recorded() as record,
        made(record.found),
    ):
        results = operation(inputs, "cuda", **options)
        chosen = [x for x in results[: operation.outputs] if x.requires_grad]
        if leaves:
            upstream = [torch.empty_like(x) for x in chosen]
            torch.autograd.grad(chosen, [inputs[name] for name in leaves], upstream)
    return record.found


@each_operation
def test_no_call_waits_for_the_device_or_copies_to_it(operation):
    for leaves in {(), operation.differentiable}:
        assert recorded(operation, operation.tensors(), leaves) == []
        if operation.packed is not None:
            options = operation.packed_options
            assert recorded(operation, operation.packed(), leaves, **options) == []


each_call = pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.tensor(3.0, device=x.device),
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: torch.as_tensor([1.0], device=x.device),
        lambda x: torch.ones(3).to(x.device),
        lambda x: x + torch.ones(()),
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
    ],
)


@each_call
def test_a_wait_and_a_copy_are_found(call):
    x = torch.empty(3, device="meta")
    with Recorded() as record, made(record.found):
        try:
            call(x)
        except (RuntimeError, NotImplementedError):  # the device has no values
            return
    assert record.found


@each_call
def test_a_wait_and_a_copy_are_found_in_a_backward_pass(call):
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            call(grad)
            return 2 * grad

    x = torch.empty(3, device="meta", requires_grad=True)
    y = Twice.apply(x)
    with Recorded() as record, made(record.found):
        try:
            torch.autograd.grad(y, x, torch.empty_like(y))
        except (RuntimeError, NotImplementedError):
            return
    assert record.found


def test_launches_call_nothing_of_cuda_that_waits_or_allocates():
    names = "Malloc|Free|DeviceSynchronize|StreamSynchronize|EventSynchronize|Memcpy|Memset"
    refused = re.compile(rf"\bcuda(?!\w*Async\b)(?:{names})\w*\s*\(")
    assert refused.search("cudaMemcpy(a, b)") and refused.search("cudaMallocHost (a)")
    assert not refused.search("cudaMemcpyAsync(a, b)")
    files = [x for x in (ROOT / "csrc/cuda").iterdir() if x.suffix in (".cu", ".h", ".cpp")]
    assert len(files) > 20
    for file in (*files, ROOT / "csrc/bindings.cpp"):
        assert not (found := refused.findall(file.read_text())), (file, found)


@on_a_gpu
@each_backend
@each_operation
def test_a_replay_with_other_inputs_gives_the_bits_of_a_call(operation, backend):
    inputs = {name: x.clone() for name, x in operation.tensors().items()}
    others = {
        name: x.flip(*range(x.dim())) if x.is_floating_point() or x.dtype == torch.bool else x
        for name, x in operation.tensors().items()
    }
    run(operation, inputs, backend)  # Triton compiles outside of a capture
    graph, found = smoke.capture(lambda: run(operation, inputs, backend))
    for name, x in inputs.items():
        x.copy_(others[name])
    graph.replay()
    torch.cuda.synchronize()
    assert_same(found, run(operation, others, backend))


@on_a_gpu
@each_backend
@each_operation
@pytest.mark.parametrize("way", [smoke.on_a_stream, smoke.on_a_thread])
def test_another_stream_and_another_thread_give_the_same_bits(operation, backend, way):
    tensors = operation.tensors()
    assert_same(way(lambda: run(operation, tensors, backend)), run(operation, tensors, backend))


@on_a_gpu
def test_a_first_launch_can_be_captured_in_a_new_process(tmp_path):
    command = [sys.executable, "-m", "tests.kernels.smoke", "--captured", "--out", str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
