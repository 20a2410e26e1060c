"""Derivatives that an operation computes are right, the others raise: second order, forward mode,
and gradients through memory that an in-place option has overwritten.
"""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tests.kernels.backends import DEVICE, each_backend
from tests.kernels.operations import OPERATIONS
from tests.tolerance import GRADIENT_ABSOLUTE, GRADIENT_RELATIVE, ROUNDING, assert_close
from warpo.kernels import ops

OVERWRITTEN = "modified by an inplace operation"


def _numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _logits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, targets, mask and temperatures: a masked row of NaN, an ignored target, -inf."""
    logits = 3 * _numbers(2, 4, 11)
    logits[..., 3] = -torch.inf
    targets = torch.arange(8, device=DEVICE).view(2, 4) % 3
    mask = torch.ones(2, 4, dtype=torch.bool, device=DEVICE)
    mask[0, 1], targets[1, 2] = False, -100
    logits[0, 1] = torch.nan
    return logits.to(dtype), targets, mask, 0.5 + _numbers(2, 4, seed=1).abs()


def _weighted(results: tuple[Tensor, Tensor], weights: Tensor) -> Tensor:
    logp, entropy = results
    return (weights[0] * logp * logp).sum() + (weights[1] * entropy.exp()).sum()


def _reference(x: Tensor, targets: Tensor, temperature: Tensor, valid: Tensor) -> Tensor:
    """logp and entropy of the plain formula, without the rows that do not count."""
    z = torch.where(valid[..., None], x, 0) / temperature[..., None]
    log_p = z.log_softmax(-1)
    logp = log_p.gather(-1, torch.where(valid, targets, 0)[..., None])[..., 0]
    entropy = -(log_p.exp() * torch.where(log_p == -torch.inf, 0, log_p)).sum(-1)
    return torch.where(valid, logp, 0), torch.where(valid, entropy, 0)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hessian_vector_products_of_logprobs(backend, dtype):
    logits, targets, mask, temperature = _logits(dtype)
    weights = _numbers(2, 2, 4, seed=2)
    vector = torch.where(logits.isfinite(), _numbers(2, 4, 11, seed=3), 0)

    def product(loss: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        return gradient.detach(), torch.autograd.grad((gradient * vector).sum(), x)[0]

    x = logits.clone().requires_grad_()
    mine = product(
        _weighted(
            ops.logprobs_and_entropy(
                x, targets, temperature=temperature, mask=mask, backend=backend
            ),
            weights,
        ),
        x,
    )
    high = logits.double().requires_grad_()
    valid = mask & (targets != -100)
    results = _reference(high, targets, temperature.double(), valid)
    wanted = product(_weighted(results, weights.double()), high)
    for actual, expected, what in zip(mine, wanted, ("gradient", "product"), strict=True):
        expected = expected.nan_to_num(0)
        # a product is the sum of two gradients, each rounded to the dtype of the logits
        rounding = 2 * ROUNDING[dtype] * float(expected.abs().max())
        assert_close(
            actual,
            expected,
            what=what,
            relative=4 * GRADIENT_RELATIVE,
            absolute=16 * GRADIENT_ABSOLUTE + rounding,
        )


@each_backend
def test_second_derivatives_with_respect_to_upstream_gradients_and_of_one_result(backend):
    logits, targets = _numbers(3, 7), torch.tensor([1, 6, 0], device=DEVICE)
    vector = _numbers(3, 7, seed=1)

    def products(logp: Tensor, x: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        (gradient,) = torch.autograd.grad(logp, x, upstream, create_graph=True)
        return torch.autograd.grad((gradient * vector).sum(), (x, upstream))

    x, upstream = logits.clone().requires_grad_(), _numbers(3, seed=2).requires_grad_()
    mine = products(ops.logprobs(x, targets, temperature=0.7, backend=backend), x, upstream)
    high = logits.double().requires_grad_()
    plain = (high / 0.7).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    wanted = products(plain, high, upstream.double().detach().requires_grad_())
    torch.testing.assert_close(mine, tuple(x.float() for x in wanted), rtol=1e-4, atol=1e-6)


@each_backend
def test_a_poisoned_row_stays_poisoned_in_the_second_derivative(backend):
    x = _numbers(2, 5).requires_grad_()
    targets = torch.tensor([7, 1], device=DEVICE)
    (gradient,) = torch.autograd.grad(
        ops.logprobs(x, targets, backend=backend).sum(), x, create_graph=True
    )
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    for row in (gradient, second):
        assert row[0].isnan().all() and row[1].isfinite().all()


@each_backend
def test_the_second_derivative_of_what_is_overwritten_raises(backend):
    x = _numbers(2, 5).requires_grad_()
    targets = torch.tensor([0, 1], device=DEVICE)
    logp = ops.logprobs(x * 1, targets, inplace_backward=True, backend=backend)
    with pytest.raises(RuntimeError, match="inplace_backward.*no second derivative"):
        torch.autograd.grad(logp.sum(), x, create_graph=True)


@each_backend
def test_forward_mode_raises_by_name(backend):
    x, targets = _numbers(2, 5), torch.tensor([0, 1], device=DEVICE)
    for leaf in (x, x.clone().requires_grad_()):
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="logprobs.*forward-mode"):
            ops.logprobs(forward_ad.make_dual(leaf, x), targets, backend=backend)

    def total(x: Tensor) -> Tensor:
        return ops.logprobs(x, targets, backend=backend).sum()

    for call in (
        lambda: torch.func.grad(total)(x),
        lambda: torch.func.vmap(total)(x[None]),
        lambda: torch.func.jvp(total, (x,), (x,)),
        lambda: torch.func.vjp(total, x),
    ):
        with pytest.raises(RuntimeError, match="logprobs.*torch.func"):
            call()


def test_the_reference_has_forward_mode_and_every_order():
    x, targets = _numbers(2, 5), torch.tensor([0, 1], device=DEVICE)

    def logp(x: Tensor) -> Tensor:
        return ops.logprobs(x, targets, backend="reference")

    _, tangent = torch.func.jvp(logp, (x,), (torch.ones_like(x),))
    assert tangent.abs().max() < 1e-6
    assert torch.func.hessian(lambda x: logp(x).sum())(x).isfinite().all()


@each_backend
def test_two_operations_that_overwrite_the_same_logits(backend):
    targets = torch.tensor([0, 1], device=DEVICE)
    for other in (
        lambda b: ops.logprobs(b, targets, inplace_backward=True, backend=backend),
        lambda b: b.logsumexp(-1),
        lambda b: ops.logprobs_and_entropy(b, targets, backend=backend).entropy,
    ):
        leaf = _numbers(2, 5).requires_grad_()
        logits = leaf * 1
        # autograd walks the later node first
        first = other(logits)
        second = ops.logprobs(logits, targets, inplace_backward=True, backend=backend)
        with pytest.raises(RuntimeError, match=OVERWRITTEN):
            (first.sum() + second.sum()).backward()


@each_backend
def test_a_result_that_a_graph_has_saved_is_not_overwritten_in_silence(backend):
    leaf = _numbers(2, 5).requires_grad_()
    logits = leaf.exp()  # saved for its own backward
    targets = torch.tensor([0, 1], device=DEVICE)
    with pytest.raises(RuntimeError, match=OVERWRITTEN):
        ops.logprobs(logits, targets, inplace_backward=True, backend=backend).sum().backward()


@each_backend
@pytest.mark.parametrize("objective", ["gpg", "gspo"])
def test_a_policy_loss_that_overwrites_its_logits(backend, objective):
    targets, advantages = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE), _numbers(2)
    old = {"gpg": None, "gspo": -_numbers(2, 3).abs()}[objective]  # one read, and two
    leaf = _numbers(2, 3, 5).requires_grad_()
    logits = leaf * 1
    square = (logits**2).sum()
    loss = ops.policy_loss_from_logits(
        logits, targets, advantages, objective, old_logprobs=old, inplace=True, backend=backend
    ).loss
    with pytest.raises(RuntimeError, match=OVERWRITTEN):
        (loss + square).backward()


@each_backend
def test_what_the_backward_scales_is_told_to_the_graphs_that_saved_it(backend):
    targets, advantages = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE), _numbers(2)
    logits = _numbers(2, 3, 5).requires_grad_() * 1
    loss = ops.policy_loss_from_logits(
        logits, targets, advantages, "gpg", inplace=True, backend=backend
    ).loss
    saved = (logits.detach() * torch.ones((), device=DEVICE, requires_grad=True)).sum()
    (2 * loss).backward()
    with pytest.raises(RuntimeError, match=OVERWRITTEN):
        saved.backward()


@each_backend
def test_upstream_gradients_of_every_kind(backend):
    logits, targets = _numbers(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    upstream = _numbers(2, 3, seed=4)
    imaginary = torch.complex(0 * upstream, -upstream).conj().imag
    assert imaginary.is_neg() and torch.equal(imaginary, upstream)

    def gradient(given: Tensor) -> Tensor:
        x = logits.clone().requires_grad_()
        return torch.autograd.grad(ops.logprobs(x, targets, backend=backend), x, given)[0]

    wanted = gradient(upstream)
    assert torch.equal(gradient(imaginary), wanted)
    zeros = torch._efficientzerotensor((2, 3), device=DEVICE)
    assert (gradient(zeros) == 0).all()
    ones = torch.ones((), device=DEVICE).expand(2, 3)
    assert torch.equal(gradient(ones), gradient(ones.contiguous()))
    x = upstream.clone().requires_grad_()
    kl = ops.approx_kl(x, 0 * upstream, backend=backend)
    dense, sparse = (
        torch.autograd.grad(kl, x, given, retain_graph=True)[0]
        for given in (upstream, upstream.to_sparse())
    )
    assert torch.equal(dense, sparse)


@each_backend
@pytest.mark.parametrize(
    "operation",
    # the one left out refuses a second backward pass
    [x for x in OPERATIONS if x.differentiable and x.name != "policy_loss_from_logits"],
    ids=lambda x: x.name,
)
def test_a_kept_graph_gives_the_same_gradient_each_time(operation, backend):
    """Leaves accumulate in place, which must not reach what the graph has saved."""
    tensors = operation.tensors()
    leaves = [tensors[name].requires_grad_() for name in operation.differentiable]
    results = [x for x in operation(tensors, backend)[: operation.outputs] if x.requires_grad]
    loss = sum(x.sum() for x in results)
    loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    for _ in range(2):
        loss.backward(retain_graph=True)
    for leaf, gradient in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * gradient, rtol=1e-5, atol=1e-6)
