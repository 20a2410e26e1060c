import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.integrations.compare import compare

pytest.importorskip("verl", reason="verl is not installed: make peers; then make test-integrations")
from verl.utils import torch_functional  # noqa: E402

from warpo.kernels.integrations import verl  # noqa: E402

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 70)) | st.tuples(
    st.integers(1, 9), st.integers(1, 70)
)
LAYOUTS = st.sampled_from(["dense", "sliced", "transposed"])


def both(name: str):
    """verl's function and what the patch puts in its place."""
    original = getattr(torch_functional, name)
    with verl.patch(only=[name]):
        return original, getattr(torch_functional, name)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        return torch.cat([x, x], dim=-2)[..., : x.shape[-2], :]
    return x


def scales(dtype: torch.dtype) -> dict[str, float]:
    """Scales of float32 logits and of their logprobs; more than one rounding of a shorter dtype is
    not ours.
    """
    if dtype != torch.float32:
        return {"scale": 0.0}
    return {"scale": 20.0, "gradient_scale": 20.0}


def exact_entropy(logits: torch.Tensor, chunk_size: int) -> torch.Tensor:
    return torch_functional.entropy_from_logits(logits)


@pytest.mark.parametrize(
    "name", ["logprobs_from_logits", "logprobs_from_logits_v2", "logprobs_from_logits_naive"]
)
@settings(max_examples=40)
@given(
    shape=SHAPES,
    dtype=DTYPES,
    layout=LAYOUTS,
    forbidden=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 99),
)
def test_logprobs(name, shape, dtype, layout, forbidden, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(shape, generator=generator).to(dtype)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    taken = torch.arange(shape[-1]) == labels[..., None]
    cut = (torch.rand(shape, generator=generator) < forbidden) & ~taken
    logits = laid_out(logits.masked_fill(cut, -torch.inf), layout)
    original, ours = both(name)
    compare(original, ours, logits, labels, differentiable=[0], **scales(dtype))


@pytest.mark.parametrize("name", ["entropy_from_logits", "entropy_from_logits_with_chunking"])
@settings(max_examples=40)
@given(shape=SHAPES, dtype=DTYPES, layout=LAYOUTS, seed=st.integers(0, 99))
def test_entropy(name, shape, dtype, layout, seed):
    if "chunking" in name:
        shape = (shape[0] * shape[1], shape[-1])
    generator = torch.Generator().manual_seed(seed)
    logits = laid_out(5 * torch.randn(shape, generator=generator).to(dtype), layout)
    original, ours = both(name)
    options = scales(dtype)
    if "chunking" in name:
        # which computes in float32 whatever it is given
        options |= {"chunk_size": 2, "exact_original": exact_entropy}
    compare(original, ours, logits, differentiable=[0], **options)


@pytest.mark.parametrize("name", ["entropy_from_logits", "entropy_from_logits_with_chunking"])
def test_a_forbidden_token_adds_no_entropy(name):
    original, ours = both(name)
    logits = torch.tensor([[1.0, -torch.inf, 1.0]], requires_grad=True)
    assert original(logits).isnan().all()
    found = ours(logits)
    torch.testing.assert_close(found, torch.tensor([2.0]).log())
    found.sum().backward()
    assert logits.grad.isfinite().all()


def test_the_entropy_of_the_engines_which_compile_it():
    with verl.patch(only=["entropy_from_logits"]):
        ours = torch_functional.entropy_from_logits
        compiled = torch.compile(ours, dynamic=True)
        for rows in (5, 9):
            logits = torch.randn(1, rows, 33, requires_grad=True)
            found = compiled(logits)
            assert torch.equal(found, ours(logits))
            (gradient,) = torch.autograd.grad(found.sum(), logits)
            (wanted,) = torch.autograd.grad(ours(logits).sum(), logits)
            assert torch.equal(gradient, wanted)


def test_with_flash_attn_float32_and_the_gradient_in_place(monkeypatch):
    monkeypatch.setattr(torch_functional, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", True)
    _, ours = both("logprobs_from_logits")
    logits = torch.randn(2, 3, 9, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(2, 3, dtype=torch.int64)
    expected = logits.detach().float().log_softmax(-1)[..., 0]
    (wanted,) = torch.autograd.grad(ours(logits, labels, False).sum(), logits)
    model_output = logits * 1
    found = ours(model_output, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.detach(), expected)
    found.sum().backward()
    assert torch.equal(logits.grad, wanted)
    assert torch.equal(model_output.detach(), wanted)
    monkeypatch.setenv("VERL_DISABLE_FLASH_ATTN_CE", "1")
    assert ours(logits, labels).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "logits, labels",
    [
        (torch.randn(2, 3, 5, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.int64)),
        (torch.randn(2, 3, 5), torch.zeros(2, 1, dtype=torch.int64)),
    ],
)
def test_the_rest_is_passed_on(logits, labels):
    original, ours = both("logprobs_from_logits_v2")
    found, wanted = ours(logits, labels), original(logits, labels)
    assert found.dtype == wanted.dtype and torch.equal(found, wanted)


def test_the_module_that_verl_imports_in_every_worker():
    code = (
        "import verl\n"
        "from warpo.kernels.integrations import verl as face\n"
        "from verl.trainer.ppo.core_algos import get_adv_estimator_fn\n"
        "assert face.patched() == face.names(), face.patched()\n"
        "assert hasattr(get_adv_estimator_fn('grpo'), '__warpo__')\n"
    )
    plugin = {"VERL_USE_EXTERNAL_MODULES": "warpo.kernels.integrations.verl_plugin"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | plugin, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
