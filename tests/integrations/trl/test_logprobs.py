"""The line that patches TRL, and TRL's log-probabilities and entropies of logits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.integrations.compare import compare

pytest.importorskip("trl", reason="TRL is not installed: make peers; then make test-integrations")
from trl.experimental.sdft import loss_utils  # noqa: E402
from trl.experimental.tpo import tpo_trainer  # noqa: E402
from trl.trainer import utils  # noqa: E402

from warpo.kernels.integrations import trl  # noqa: E402

NAMES = ["selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy"]
ORIGINAL = {name: getattr(utils, name) for name in NAMES}
with trl.patch(only=NAMES):
    OURS = {name: getattr(utils, name) for name in NAMES}


@st.composite
def logits_and_index(draw):
    """Logits of any strides that keep rows together, some of them -inf, and an index a row."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 70)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    padded = (shape[0], shape[1] + 1, shape[2] + 3)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    logits = 5 * torch.randn(padded, generator=generator).to(dtype)
    layout = draw(st.sampled_from(["dense", "sliced", "rows apart", "swapped"]))
    if layout == "sliced":
        logits = logits[:, :-1]
    elif layout == "rows apart":
        logits = logits[:, 1:, 1:-2]
    elif layout == "swapped":
        logits = logits.transpose(0, 1)
    index = torch.randint(0, logits.shape[-1], logits.shape[:-1], generator=generator)
    return logits, index


def row_masks(index):
    some = torch.arange(index.numel()).view(index.shape) % 3 > 0
    return [None, some, some.long(), some.float(), torch.zeros_like(index)]


@given(
    given_=logits_and_index(), temperature=st.sampled_from([1.0, 0.7, 2]), mask=st.integers(0, 4)
)
def test_selective_log_softmax(given_, temperature, mask):
    arguments = (*given_, temperature, row_masks(given_[1])[mask])
    compare(*pair("selective_log_softmax"), *arguments, differentiable=[0], scale=20.0)


@given(given_=logits_and_index(), chunk_size=st.sampled_from([1, 128]))
def test_entropy_from_logits(given_, chunk_size):
    compare(*pair("entropy_from_logits"), given_[0], chunk_size, differentiable=[0], scale=20.0)


@given(
    given_=logits_and_index(),
    entropy_requires_grad=st.booleans(),
    temperature=st.sampled_from([1.0, 0.7, 2]),
    mask=st.integers(0, 4),
)
def test_selective_log_softmax_and_entropy(given_, entropy_requires_grad, temperature, mask):
    arguments = (*given_, entropy_requires_grad, temperature, row_masks(given_[1])[mask])
    name = "selective_log_softmax_and_entropy"
    compare(*pair(name), *arguments, differentiable=[0], scale=20.0)
    results = OURS[name](given_[0].clone().requires_grad_(), *arguments[1:])
    assert [x.requires_grad for x in results] == [True, entropy_requires_grad]


def pair(name):
    return ORIGINAL[name], OURS[name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding(dtype):
    """Ours rounds once and is closer to the exact value; TRL's own, to the bit, is an option."""
    logits, index = 5 * torch.randn(4, 8, 500), torch.randint(0, 500, (4, 8))
    logits = logits.to(dtype)
    with trl.patch(library_rounding=True):
        for name, arguments in (
            ("selective_log_softmax", (logits, index)),
            ("entropy_from_logits", (logits,)),
            ("selective_log_softmax_and_entropy", (logits, index)),
        ):
            found, wanted = getattr(utils, name)(*arguments), ORIGINAL[name](*arguments)
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
            calls = trl.library.replacements[name].calls
            reason = f"{str(dtype).removeprefix('torch.')}, with library_rounding"
            assert calls.passed_on.keys() == {reason} and not calls.served
    exact = ORIGINAL["entropy_from_logits"](logits.double())
    theirs, ours = (
        (functions["entropy_from_logits"](logits) - exact).abs().max()
        for functions in (ORIGINAL, OURS)
    )
    assert ours < theirs


def test_banned_tokens_count_for_nothing():
    logits = torch.randn(2, 3, 9)
    logits[..., 4:] = -torch.inf
    index = torch.zeros(2, 3, dtype=torch.int64)
    compare(*pair("selective_log_softmax"), logits, index, differentiable=[0], scale=5.0)
    entropy = OURS["entropy_from_logits"](logits)
    torch.testing.assert_close(entropy, ORIGINAL["entropy_from_logits"](logits[..., :4]))
    assert ORIGINAL["entropy_from_logits"](logits).isnan().all()


@pytest.mark.parametrize("name", ["selective_log_softmax", "selective_log_softmax_and_entropy"])
def test_masked_rows_are_not_read(name):
    logits, index = torch.randn(2, 3, 9), torch.zeros(2, 3, dtype=torch.int64)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    dirty = logits.masked_fill(mask[..., None] == 0, torch.nan).requires_grad_()
    clean = logits.clone().requires_grad_()
    results, wanted = (
        OURS[name](dirty, index, row_mask=mask),
        ORIGINAL[name](clean, index, row_mask=mask),
    )
    for result, value in zip(
        *((x if isinstance(x, tuple) else (x,)) for x in (results, wanted)), strict=True
    ):
        torch.testing.assert_close(result, value)
        result.sum().backward(retain_graph=True)
        value.sum().backward(retain_graph=True)
    torch.testing.assert_close(dirty.grad, clean.grad)
    assert (dirty.grad[mask == 0] == 0).all()


@pytest.mark.parametrize(
    "logits, index, options",
    [
        (torch.randn(2, 3, 9, dtype=torch.float64), torch.ones(2, 3, dtype=torch.int64), {}),
        (torch.randn(2, 3, 9), torch.randint(9, (2, 3, 4)), {}),
        (torch.randn(2, 9, 3).transpose(1, 2), torch.ones(2, 3, dtype=torch.int64), {}),
        (torch.randn(2, 3, 2, 9), torch.ones(2, 3, 2, dtype=torch.int64), {}),
        (
            torch.randn(2, 3, 9),
            torch.ones(2, 3, dtype=torch.int64),
            {"temperature": torch.tensor(2.0)},
        ),
        (
            torch.randn(2, 3, 9),
            torch.ones(2, 3, dtype=torch.int64),
            {"row_mask": torch.tensor([[1, 0, 1]])},
        ),
    ],
    ids=[
        "float64",
        "several indices",
        "columns",
        "4 dimensions",
        "tensor temperature",
        "broadcast",
    ],
)
def test_what_is_left_to_trl(logits, index, options):
    for name in ("selective_log_softmax", "selective_log_softmax_and_entropy"):
        results, wanted = (
            OURS[name](logits, index, **options),
            ORIGINAL[name](logits, index, **options),
        )
        torch.testing.assert_close(results, wanted, rtol=0, atol=0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        OURS["selective_log_softmax"](logits, index, temperature=0.0)


def test_every_module_that_imported_the_name_has_ours():
    with trl.patch():
        assert set(NAMES) <= set(trl.patched())
        assert loss_utils.selective_log_softmax is utils.selective_log_softmax
        assert loss_utils.selective_log_softmax is not ORIGINAL["selective_log_softmax"]
        name = "selective_log_softmax_and_entropy"
        assert getattr(tpo_trainer, name) is getattr(utils, name) is not ORIGINAL[name]
    assert trl.patched() == ()
    assert loss_utils.selective_log_softmax is ORIGINAL["selective_log_softmax"]
