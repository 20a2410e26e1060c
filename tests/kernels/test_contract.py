"""What every kernel promises, as a matrix: operation x promise x backend.

contract.txt shows the matrix; `python -m tests.kernels.test_contract` writes it anew. A cell that
cannot exist says why; every other cell is a test below: of the backends cpu and triton here, of
triton and cuda on a GPU, and of cuda also by test_cuda_emulated. The backend reference is the
definition. Values and gradients against float64 are in the file of each operation.
"""

import ast
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from tests.kernels.backends import BACKENDS, DEVICE, dtypes, strided
from tests.kernels.operations import GAP, HELPERS, OPERATIONS, Operation
from tests.tolerance import assert_same_product
from warpo.kernels import dispatch, ops
from warpo.kernels._arguments.group_advantages import GroupAdvantagesArguments

PROMISES = {
    1: "bfloat16, float16 and float32 in; float32 arithmetic and results",
    2: "any row stride; incoming gradients of any stride, 0 included",
    3: "sizes and scalars are run-time arguments",
    4: "masked slots are never read",
    5: "no host synchronisation",
    6: "deterministic; a row does not depend on how many rows there are",
    7: "one exponential per element; 8 bytes per token saved for backward",
    8: "-inf logits are legal; logprob <= 0; a target out of range poisons its row",
    9: "an option outside the supported set raises",
    10: "no graph break under torch.compile; opcheck",
    11: "a DTensor or an empty ZeRO-3 shard raises with the fix",
    12: "host cost of a call",
    13: "malformed offsets and foreign tensors are refused or poisoned, never read past; "
    "tokens of no sequence are 0",
    14: "a derivative that is not computed raises; an in-place option bumps the version counter",
}
# A guard: the promise is 15 us above the launch on an idle machine, and CI shares its two cores.
HOST_COST_US = 60.0
ROOT = Path(__file__).parents[2]
MATRIX = Path(__file__).with_name("contract.txt")


def why_not(operation: Operation, promise: int, backend: str) -> str | None:
    """Why a cell of the matrix cannot exist."""
    if promise in operation.not_promised:
        return operation.not_promised[promise]
    if promise == 3 and backend != "triton":
        return "nothing is compiled at run time"
    if promise in (7, 8) and operation.vocabulary is None:
        return "it has no vocabulary"
    if promise == 10 and backend == "triton" and DEVICE == "cpu":
        return "torch.compile cannot trace Triton's interpreter; the registration is the same"
    if promise == 14 and not operation.differentiable and not operation.mutates:
        return "it has no derivative and overwrites nothing"
    if promise == 12 and backend != "cpu":
        return "on a GPU the launch itself takes the host's time; the benchmark shows it"
    return None


def cells(promise: int, operations: list[Operation] = OPERATIONS) -> Any:
    """The cells of a promise that exist, as parameters of its test."""
    return pytest.mark.parametrize(
        "operation, backend",
        [
            pytest.param(operation, backend, id=f"{operation.name}-{backend}")
            for operation in operations
            for backend in BACKENDS
            if why_not(operation, promise, backend) is None
        ],
    )


def run(
    operation: Operation,
    tensors: dict[str, Tensor],
    backend: str,
    expand: bool = False,
    **options: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and the gradients of the sum of the differentiable ones."""
    leaves = {name: tensors[name].detach().requires_grad_() for name in operation.differentiable}
    results = operation({**tensors, **leaves}, backend, **options)
    chosen = [x for x in results[: operation.outputs] if x.requires_grad]
    upstream = [torch.ones((), device=DEVICE).expand(x.shape) for x in chosen]
    if not expand:
        upstream = [x.contiguous() for x in upstream]
    gradients = torch.autograd.grad(chosen, list(leaves.values()), upstream) if leaves else ()
    return [x.detach() for x in results], list(gradients)


def assert_same(a: Any, b: Any) -> None:
    """Bit for bit, results and gradients."""
    for mine, other in zip([*a[0], *a[1]], [*b[0], *b[1]], strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine.nan_to_num(7e7), other.nan_to_num(7e7)), (mine, other)


def test_every_public_operation_is_in_the_matrix():
    assert {operation.name for operation in OPERATIONS} | set(HELPERS) == {
        name for name in ops.__all__ if name[0].islower()
    }


@cells(1)
def test_promise_1_dtypes(operation, backend):
    tensors = operation.tensors()
    for dtype in dtypes(backend):
        low = {n: x.to(dtype) if n in operation.floats else x for n, x in tensors.items()}
        high = {n: x.float() if n in operation.floats else x for n, x in low.items()}
        results, gradients = run(operation, low, backend)
        wanted, wanted_gradients = run(operation, high, backend)
        assert all(x.dtype != dtype or dtype is torch.float32 for x in results)
        rounded = [
            gradient.to(low[name].dtype)
            for name, gradient in zip(operation.differentiable, wanted_gradients, strict=True)
        ]
        if operation.vocabulary is None:
            assert_same((results, gradients), (wanted, rounded))
        else:
            # a GPU sums a row in vectors of 16 bytes: of 8 elements, or of 4
            tolerance = 1e-5 if dtype is torch.float32 else 1e-2
            torch.testing.assert_close(results, wanted, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(gradients, rounded, rtol=tolerance, atol=1e-5)


@cells(2)
def test_promise_2_strides(operation, backend):
    tensors = operation.tensors()
    dense = run(operation, tensors, backend)
    keep_last = operation.vocabulary
    sliced = {
        n: strided(x, "sliced") if n != keep_last else torch.cat([x, x], -2).chunk(2, -2)[0]
        for n, x in tensors.items()
    }
    result = run(operation, sliced, backend, expand=True)
    if operation.same_bits:
        assert_same(result, dense)
    elif "weight" in tensors:
        for mine, other in zip([*result[0], *result[1]], [*dense[0], *dense[1]], strict=True):
            assert_same_product(mine, other, what="with other strides")
    else:
        torch.testing.assert_close(result, dense, rtol=1e-5, atol=1e-6)


@cells(3)
def test_promise_3_run_time_arguments(operation, backend):
    """test_triton_compile runs the launches; here: that the operation has some."""
    assert (ROOT / f"tests/kernels/launches/{operation.kernels}.py").exists()


@cells(4)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_promise_4_masked_slots(operation, backend, poison):
    tensors = operation.tensors()
    masked = tensors["mask"] == 0
    assert masked.any()
    clean, poisoned = dict(tensors), dict(tensors)
    for name in operation.masked:
        where = masked if tensors[name].dim() == masked.dim() else masked[..., None]
        clean[name] = tensors[name].masked_fill(where, 0.25)
        poisoned[name] = tensors[name].masked_fill(where, poison)
    results, gradients = run(operation, poisoned, backend)
    assert_same((results, gradients), run(operation, clean, backend))
    for name, gradient in zip(operation.differentiable, gradients, strict=True):
        if name in operation.masked:
            assert (gradient[masked] == 0).all()


@cells(5)
def test_promise_5_no_synchronisation(operation, backend):
    if DEVICE == "cuda":
        tensors = operation.tensors()
        run(operation, tensors, backend)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(operation, tensors, backend)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    # a fake tensor has no value to read
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {n: mode.from_tensor(x) for n, x in operation.tensors().items()}
        for name in operation.differentiable:
            fakes[name].requires_grad_()
        results = [x for x in operation(fakes, backend)[: operation.outputs] if x.requires_grad]
        if results:
            leaves = [fakes[n] for n in operation.differentiable]
            torch.autograd.grad([x.sum() for x in results], leaves)


@cells(6)
def test_promise_6_determinism(operation, backend):
    tensors = operation.tensors()
    first = run(operation, tensors, backend)
    for _ in range(3):
        assert_same(run(operation, tensors, backend), first)
    if DEVICE == "cpu" and backend == "cpu":
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            assert_same(run(operation, tensors, backend), first)
        finally:
            torch.set_num_threads(threads)
    if operation.batched:
        alone = {n: x[:1] if n in operation.batched else x for n, x in tensors.items()}
        results, gradients = run(operation, alone, backend)
        assert_same(
            (results, gradients),
            (
                [x[: len(y)] for x, y in zip(first[0], results, strict=True)],
                [x[: len(y)] for x, y in zip(first[1], gradients, strict=True)],
            ),
        )


@cells(7)
def test_promise_7_saved_for_backward(operation, backend):
    tensors = operation.tensors()
    leaf = tensors[operation.vocabulary].requires_grad_()
    known = {x.untyped_storage().data_ptr() for x in tensors.values()}
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        results = operation(tensors, backend)
    known |= {x.untyped_storage().data_ptr() for x in results}
    tokens = leaf.shape[:-1].numel()
    assert sum(size for key, size in saved.items() if key not in known) <= 8 * tokens


@cells(8)
def test_promise_8_minus_infinity_and_targets(operation, backend):
    tensors = operation.tensors()
    tensors.pop("mask", None)
    logits, targets = tensors[operation.vocabulary], tensors["targets"]
    column = torch.arange(logits.shape[-1], device=DEVICE)
    logits.masked_fill_((column % 5 == 1) & (column != targets[..., None]), -torch.inf)
    targets[0, 0], targets[0, 1] = logits.shape[-1], -100
    results, (gradient,) = run(operation, tensors, backend)
    for result in results[:2]:
        assert result[0, 0].isnan() and result[0, 1] == 0
        assert result.flatten()[2:].isfinite().all()
    assert (results[0].flatten()[1:] <= 0).all()
    assert gradient[0, 0].isnan().all() and (gradient[0, 1] == 0).all()
    assert gradient.flatten(0, 1)[2:].isfinite().all()


@cells(9)
def test_promise_9_unknown_options(operation, backend):
    option, value = operation.wrong
    with pytest.raises(ValueError, match=f"one of .*{value!r}"):
        operation(operation.tensors(), **({"backend": backend} | {option: value}))
    with pytest.raises(TypeError, match="fast_path"):
        operation(operation.tensors(), backend, fast_path=True)


@cells(10)
def test_promise_10_compiles(operation, backend):
    tensors = operation.tensors()
    torch._dynamo.reset()  # it counts what is compiled from one line of this file
    compiled = torch.compile(
        lambda tensors: operation(tensors, backend), fullgraph=True, backend="aot_eager"
    )
    results, _ = run(operation, tensors, backend)
    assert_same((compiled(tensors), []), (results, []))
    tests = ast.parse((ROOT / f"tests/kernels/test_{operation.kernels}.py").read_text())
    names = [node.name for node in tests.body if isinstance(node, ast.FunctionDef)]
    assert any("opcheck" in name for name in names)


@cells(11)
def test_promise_11_shards(operation, backend):
    for name in operation.floats:
        tensors = operation.tensors()
        tensors[name] = torch.empty(0, device=DEVICE)
        tensors[name].ds_id = 1
        with pytest.raises(ValueError, match=f"{name}.*deepspeed.zero.GatheredParameters"):
            operation(tensors, backend)

        class DTensor(torch.Tensor):
            """Known by its name, so that importing the kernels does not import DTensor."""

        tensors[name] = operation.tensors()[name].as_subclass(DTensor)
        with pytest.raises(ValueError, match=rf"{name}.*full_tensor\(\)"):
            operation(tensors, backend)


def microseconds(call: Callable[[], object]) -> float:
    """The best of many short windows, so that another process on the core does not count."""
    call()
    return min(timeit.repeat(call, number=20, repeat=200)) / 20 * 1e6


@cells(12)
def test_promise_12_host_cost(operation, backend):
    tensors = operation.tensors()
    one = torch.zeros(1)
    launch = GroupAdvantagesArguments(
        groups=1,
        rewards=one,
        lengths=None,
        group_size=1,
        order=None,
        offsets=None,
        std_mode=0,
        leave_one_out=False,
        eps=0.0,
        advantages=one,
        mean=one,
        std=one,
        degenerate=one.int(),
    )
    native = dispatch.load(backend)
    for name in operation.differentiable:
        tensors[name].requires_grad_()
    cost = microseconds(lambda: operation(tensors, backend))
    assert cost - microseconds(lambda: native.group_advantages_forward(launch)) < HOST_COST_US


def of_sequences(result: Tensor, like: Tensor) -> Tensor:
    """What packed elements have, in the shape of `like`; those of no sequence have 0."""
    if result.shape == like.shape:
        return result
    outside = torch.cat([result[:GAP], result[-GAP:]])
    assert (outside == 0).all(), outside
    return result[GAP:-GAP].view(like.shape)


@cells(13, [operation for operation in OPERATIONS if operation.packed])
def test_promise_13_offsets(operation, backend):
    options = operation.packed_options
    wanted = run(operation, operation.tensors(), backend)
    found = run(operation, operation.packed(), backend, **options)
    for some, others in zip(found, wanted, strict=True):
        some = [of_sequences(x, like) for x, like in zip(some, others, strict=True)]
        torch.testing.assert_close(some, others, rtol=1e-5, atol=1e-6)
    for name, bound in operation.offsets.items():
        for place, value, message in (
            (0, -1, "before the first"),
            (-1, bound + 1, f"past the {bound}"),
            (1, 2**31 - 1, f"past the {bound}"),
            (-1, 0, "must not descend"),
        ):
            tensors = operation.packed()
            tensors[name][place] = value
            if DEVICE == "cuda":
                results, _ = run(operation, tensors, backend, **options)
                assert any(x.isnan().any() for x in results if x.is_floating_point())
                continue
            index = range(len(tensors[name]))[place]
            with pytest.raises(ValueError, match=rf"{name}\[{index}\] = {value} .*{message}"):
                run(operation, tensors, backend, **options)


def foreign(x: Tensor) -> list[tuple[Tensor, str]]:
    """The same numbers where a kernel that reads pointer and strides would not find them, and what
    the error says.
    """
    freed, zeros = x.clone(), torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device)
    freed.untyped_storage().resize_(0)
    found = [
        (freed, "resized to 0"),
        (zeros, "clone"),
        (x.to("meta"), "meta"),
        (x.to_sparse(), "to_dense"),
        (Wrapper(x), "Wrapper"),
    ]
    if x.dim() == 2:
        found.append((x.to_sparse_csr(), "to_dense"))
        found.append((torch.nested.nested_tensor(list(x)), "to_padded_tensor"))
    if x.dtype == torch.float32:
        found.append((torch.complex(0 * x, -x).conj().imag, "resolve_neg"))
        found.append((torch.complex(x, x).conj(), "must be"))
        found.append((torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), "dequantize"))
        if x.is_cpu and x.dim():
            found.append((x.to_mkldnn(), "to_dense"))
    return found


class Wrapper(Tensor):
    """A tensor of another tensor, as those of torchao and of tensor parallelism are."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapper":
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("a kernel has used the wrapper")


@pytest.mark.filterwarnings("ignore::UserWarning")
@cells(13)
def test_promise_13_foreign_tensors(operation, backend):
    call, options = getattr(ops, operation.name), {**operation.options, "backend": backend}
    given = operation.tensors()
    for name, tensor in given.items():
        for stranger, message in foreign(tensor):
            with pytest.raises(ValueError, match=rf"\b{name}\b.*{message}"):
                call(**operation.arguments({**given, name: stranger}), **options)


@cells(14)
def test_promise_14_derivatives(operation, backend):
    tensors = operation.tensors()
    before = {name: x._version for name, x in tensors.items()}
    leaves = [tensors[name].requires_grad_() for name in operation.differentiable]
    if operation.mutates:
        arguments = {**operation.arguments(tensors), **operation.options, "backend": backend}
        getattr(ops, operation.name)(**arguments)
        assert all(x._version > before[n] for n, x in tensors.items() if n not in ("grad", "grads"))
    for name in operation.differentiable:
        tangent = torch.ones_like(tensors[name])
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(tensors[name].detach(), tangent)
            with pytest.raises(RuntimeError, match=r"\w+ has no forward-mode derivative"):
                operation({**tensors, name: dual}, backend)
    if not leaves:
        return

    def second(backend: str) -> tuple[Tensor, ...]:
        results = [x for x in operation(tensors, backend)[: operation.outputs] if x.requires_grad]
        loss = torch.stack([x.square().sum() for x in results]).sum()
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in gradients), leaves)

    if operation.twice:
        torch.testing.assert_close(second(backend), second("reference"), rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(RuntimeError, match=r"\w+ has no second derivative.*create_graph=True"):
            second(backend)


def matrix() -> str:
    """x: tested. A letter: why there is nothing to test."""
    reasons: dict[str, str] = {}
    width = max(len(operation.name) for operation in OPERATIONS)
    lines = [f"{'':{width}}  {'backend':8}" + "".join(f"{n:>3}" for n in PROMISES)]
    for operation in OPERATIONS:
        for backend in ("cpu", "triton", "cuda"):
            line = f"{operation.name:{width}}  {backend:8}"
            for promise in PROMISES:
                reason = why_not(operation, promise, backend)
                if reason is not None:
                    reasons.setdefault(reason, chr(ord("a") + len(reasons)))
                line += "  x" if reason is None else f"  {reasons[reason]}"
            lines.append(line)
    lines += ["", *(f"{number:>2}  {text}" for number, text in PROMISES.items()), ""]
    lines += [" x  tested", *(f" {letter}  {reason}" for reason, letter in reasons.items())]
    return "\n".join(lines) + "\n"


@pytest.mark.skipif(DEVICE != "cpu", reason="the matrix is that of a machine without a GPU")
def test_the_matrix_is_what_contract_txt_shows():
    assert MATRIX.read_text() == matrix(), "run python -m tests.kernels.test_contract"


if __name__ == "__main__":
    MATRIX.write_text(matrix())
