import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.backends import BACKENDS, DEVICE, DTYPES, each_backend, examples, strided
from tests.kernels.opcheck import opcheck
from tests.oracles.adamw import fingerprint as oracle
from warpo.kernels import ops, reference
from warpo.kernels._fingerprint import FingerprintInputs, _operator


def bits(tensor: torch.Tensor) -> list[int]:
    size = 8 * tensor.element_size()
    integers = tensor.contiguous().view(torch.int16 if size == 16 else torch.int32)
    return [int(x) % 2**size for x in integers.flatten()]


@st.composite
def tensors(draw):
    """Every value, NaN and -0 too: dense of any shape, or rows with a stride."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(
        st.lists(st.integers(0, 9), max_size=3)
        | st.sampled_from([(4096,), (4097,), (3, 5000), (70, 1)])
    )
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    limits = torch.iinfo(integer)
    values = torch.randint(
        limits.min, limits.max + 1, tuple(shape), generator=generator, dtype=integer
    )
    layouts = ["dense", "sliced"] if len(shape) in (1, 2) else ["dense"]
    return strided(values, draw(st.sampled_from(layouts))).view(dtype)


@each_backend
def test_values_are_those_of_the_reference(backend):
    @settings(max_examples=examples(backend, 200))
    @given(tensors())
    def check(tensor):
        result = ops.fingerprint(tensor, backend=backend)
        assert result.dtype == torch.int64 and result.shape == ()
        assert result == reference.fingerprint(tensor)
        assert result == ops.fingerprint(tensor.clone(), backend=backend)

    check()


@each_backend
def test_many_have_the_fingerprints_of_each(backend):
    @settings(max_examples=examples(backend, 100))
    @given(st.lists(tensors(), min_size=1, max_size=6))
    def check(several):
        wanted = torch.stack([reference.fingerprint(x) for x in several])
        assert torch.equal(ops.fingerprint_foreach(several, backend=backend), wanted)

    check()


@each_backend
def test_hundreds_of_tensors_and_views_that_start_anywhere(backend):
    """More than a launch takes, and at addresses that are no multiple of a vector."""
    many = [torch.randn(5000, device=DEVICE)[i % 7 : 7 + 13 * i] for i in range(1, 200)]
    if backend != "triton":
        many = [x.to(DTYPES[i % 3]) if i % 2 else x for i, x in enumerate(many)]
        many += [x.bfloat16()[i % 9 :] for i, x in enumerate(many)]
    wanted = torch.stack([reference.fingerprint(x) for x in many])
    assert torch.equal(ops.fingerprint_foreach(many, backend=backend), wanted)
    assert torch.equal(ops.fingerprint_foreach(many, backend="reference"), wanted)


@settings(max_examples=30)
@given(tensors())
def test_the_reference_equals_the_oracle(tensor):
    assert int(reference.fingerprint(tensor)) == oracle(bits(tensor), 8 * tensor.element_size())


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_change_is_seen(backend, dtype):
    # no two alike in any dtype
    tensor = torch.arange(1, 61, device=DEVICE).to(dtype)
    before = ops.fingerprint(tensor, backend=backend)
    for i in range(0, 60, 7):
        changed = tensor.clone()
        changed[i] = -changed[i]
        assert ops.fingerprint(changed, backend=backend) != before
        exchanged = tensor.clone()
        exchanged[[i, 59 - i]] = tensor[[59 - i, i]]
        assert ops.fingerprint(exchanged, backend=backend) != before
    assert ops.fingerprint(tensor[:-1], backend=backend) != before
    assert ops.fingerprint(-tensor, backend=backend) != before


def test_single_bits_do_not_collide():
    """Zeros with one bit set, at each place: the input that a weak mixer fails on."""
    seen = set()
    for i in range(64):
        for bit in range(16):
            tensor = torch.zeros(64, dtype=torch.int16)
            tensor[i] = (1 << bit) - (1 << 16 if bit == 15 else 0)
            seen.add(int(ops.fingerprint(tensor.view(torch.bfloat16).to(DEVICE))))
    assert len(seen) == 64 * 16


@pytest.mark.skipif(DEVICE != "cpu", reason="threads of the CPU kernels")
def test_the_number_of_threads_changes_nothing():
    tensor, threads = torch.randn(300000).bfloat16(), torch.get_num_threads()
    results = set()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.add(int(ops.fingerprint(tensor)))
    torch.set_num_threads(threads)
    assert results == {int(reference.fingerprint(tensor))}


@each_backend
def test_more_tiles_than_partial_results(backend, monkeypatch):
    rows = 1030
    if backend == "triton":
        import importlib

        module = importlib.import_module("warpo.kernels._triton.fingerprint")
        monkeypatch.setattr(module, "MAX_PROGRAMS", 4)
        rows = 11
    tensor = torch.randn(rows, 4096, device=DEVICE)[:, :4095]
    assert ops.fingerprint(tensor, backend=backend) == reference.fingerprint(tensor)


@each_backend
def test_opcheck(backend):
    tensors = [torch.randn(3, 50, device=DEVICE), torch.randn(7, device=DEVICE)]
    inputs = FingerprintInputs(tensors=tensors, backend=backend)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(_operator, inputs, test_utils=utils)


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_compiles_without_a_graph_break(backend):
    def both(x):
        return ops.fingerprint(x * 2, backend=backend)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for size in (5, 6, 70):
        x = torch.randn(2, size, device=DEVICE)
        assert compiled(x) == both(x)


@pytest.mark.parametrize(
    "tensor, message",
    [
        (torch.zeros(3, dtype=torch.int32), "tensor must be float32 | bfloat16 | float16"),
        (torch.zeros(3, 4).t(), "tensor must be dense in its last dimension"),
        (torch.zeros(2, 3, 4).transpose(0, 1), r"pass tensor.contiguous\(\)"),
    ],
)
def test_bad_arguments_are_named(tensor, message):
    with pytest.raises(ValueError, match=message):
        ops.fingerprint(tensor)


def test_of_many_the_bad_one_is_named():
    good = torch.zeros(3, device=DEVICE)
    with pytest.raises(ValueError, match=r"tensors\[1\] must be dense in its last dimension"):
        ops.fingerprint_foreach([good, torch.zeros(3, 4, device=DEVICE).t()])
    with pytest.raises(ValueError, match=r"tensors\[0\] must be float32"):
        ops.fingerprint_foreach([good.int(), good])
    with pytest.raises(ValueError, match="tensors is empty: pass at least one"):
        ops.fingerprint_foreach([])
