"""What the algorithms' losses have in common, as identities of the operations."""

import math

import pytest
import torch

from tests.kernels.backends import DEVICE, each_backend, each_backend_slow_triton
from warpo.kernels import ops
from warpo.kernels.objectives import KL_ESTIMATORS, OBJECTIVES

LENGTHS = (5, 1, 9, 3)
TOKENS = sum(LENGTHS)


def starts(lengths=LENGTHS) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(DEVICE)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def loss_and_gradient(logp, old, advantages, objective, **options):
    logp = logp.clone().requires_grad_()
    loss, _ = ops.policy_loss(logp, old, advantages, objective, **options)
    loss.backward()
    return loss.detach(), logp.grad


@each_backend
def test_gspo_of_responses_of_one_token_is_grpo(backend):
    """With the same bounds and KL: the mean of the log ratios of one token is that of the token."""
    number = 6 if backend == "triton" else 64
    old = -normal(number).abs()
    logp = old + torch.linspace(-0.6, 0.6, number, device=DEVICE)
    ref, advantages = old + 0.3 * normal(number, seed=2), normal(number, seed=3)
    of = {}
    for length in (1, 2):
        for name in ("gspo", "grpo"):
            objective = OBJECTIVES[name].replace(clip_low=0.2, clip_high=0.28, kl_coef=0.04)
            of[name, length] = loss_and_gradient(
                logp,
                old,
                advantages,
                objective,
                cu_seqlens=starts([length] * (number // length)),
                ref_logprobs=ref,
                backend=backend,
            )
    torch.testing.assert_close(of["gspo", 1], of["grpo", 1], rtol=1e-6, atol=1e-8)
    # of longer ones it is not
    assert not torch.allclose(of["gspo", 2][1], of["grpo", 2][1], rtol=1e-2)


def weight_of_token(aggregation: str) -> torch.Tensor:
    """Each token's share of the loss, with the denominator that is counted."""
    if aggregation == "token-mean":
        return torch.full((TOKENS,), 1 / TOKENS)
    shares = [1 / n if "token-mean" in aggregation else 1.0 for n in LENGTHS]
    weights = [torch.full((n,), s / len(LENGTHS)) for n, s in zip(LENGTHS, shares, strict=True)]
    return torch.cat(weights) / (7 if aggregation.endswith("norm") else 1)


@each_backend
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_where_the_ratio_is_1_the_gradient_is_the_policy_gradient(backend, name):
    """grad = -A grad log pi, weighed as the row aggregates, for every surrogate and correction; the
    KL to a reference that is the policy adds nothing.
    """
    objective = OBJECTIVES[name]
    logp = -normal(TOKENS).abs()
    # one advantage a response: where the ratio is the response's, its tokens share it
    advantages = normal(len(LENGTHS), seed=1).repeat_interleave(torch.tensor(LENGTHS).to(DEVICE))
    is_norm = objective.aggregation.endswith("norm")
    _, gradient = loss_and_gradient(
        logp,
        logp,
        advantages,
        objective,
        cu_seqlens=starts(),
        ref_logprobs=logp,
        sampler_logprobs=logp,
        denominator=7.0 * len(LENGTHS) if is_norm else None,
        backend=backend,
    )
    # a product moves by each of its tokens as a whole, where the gradient goes through it
    through = objective.surrogate not in ("stop_gradient", "gamma")
    product = objective.ratio_level == "product" and through
    weight = weight_of_token("sequence-mean-token-sum" if product else objective.aggregation)
    expected = -advantages * weight.to(DEVICE)
    torch.testing.assert_close(gradient, expected, rtol=2e-6, atol=1e-8)


@each_backend
@pytest.mark.parametrize("name", ["dpo", "conservative_dpo", "robust_dpo"])
def test_dpo_of_equal_pairs_is_log_2(backend, name):
    """Chosen and rejected are one response; or the policy is the reference. Whatever the labels."""
    one, ref, other = (-normal(6, 5, seed=seed).abs() for seed in range(3))
    for chosen, rejected, ref_chosen, ref_rejected in (
        (one, one, ref, ref),
        (one, other, one, other),
    ):
        loss, metrics = ops.preference_loss(
            chosen, rejected, ref_chosen, ref_rejected, loss=name, backend=backend
        )
        assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
        assert ops.preference_metrics(metrics)["reward/margin"] == 0


@each_backend
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_k3_is_not_negative_and_its_expectation_is_the_kl(backend, estimator):
    """E over the policy's categories, every one of them, so nothing is sampled. k1 has the same
    expectation and a sign; k2 has a bias; the reverse estimator is of the other direction.
    """
    logits, ref_logits = 2 * normal(40, seed=4), 2 * normal(40, seed=5)
    logp, ref = logits.log_softmax(0), ref_logits.log_softmax(0)
    zeros = torch.zeros_like(logp)
    found = -ops.shaped_gae(
        logp[:, None],
        ref[:, None],
        zeros[:, None],
        gamma=1.0,
        gae_lambda=1.0,
        kl_coef=1.0,
        kl_estimator=estimator,
        rewards=zeros[:, None],
        return_rewards=True,
        backend=backend,
    ).rewards[:, 0]
    p = logp.double().exp()
    kl = (p * (logp.double() - ref.double())).sum().item()
    if estimator == "reverse_k3":
        kl = (ref.double().exp() * (ref.double() - logp.double())).sum().item()
    expectation = (p * found.double()).sum().item()
    assert kl > 0.5
    assert (expectation == pytest.approx(kl, rel=1e-5)) == (estimator != "k2")
    assert (found >= 0).all() == (estimator != "k1")
    # the same in the loss: a token's share of it is its estimate
    gradient = "estimator" if estimator == "reverse_k3" else "k2"
    row = OBJECTIVES["gpg"].replace(kl_coef=1.0, kl_estimator=estimator, kl_gradient=gradient)
    for i in (0, 7, 39):
        loss, _ = ops.policy_loss(
            logp[i : i + 1, None],
            logp[i : i + 1, None],
            zeros[:1],
            row,
            ref_logprobs=ref[i : i + 1, None],
            backend=backend,
        )
        assert loss.item() == pytest.approx(found[i].item(), rel=1e-5)


def expected_kl(backend, objective, logits, ref_logits, drawn_from):
    """What the KL adds to a loss, and its gradient with respect to the logits, in expectation: over
    every category, as `drawn_from` draws it.
    """
    logp, ref = logits.log_softmax(0)[:, None], ref_logits.log_softmax(0)[:, None]
    row, zeros = objective.replace(kl_coef=1.0), torch.zeros_like(logp[:, 0])
    options = {"denominator": 1.0, "backend": backend}
    _, slopes = loss_and_gradient(logp, logp, zeros, row, ref_logprobs=ref, **options)
    values = [
        ops.policy_loss(*(x[i : i + 1] for x in (logp, logp, zeros)), row,
                        ref_logprobs=ref[i : i + 1], **options).loss
        for i in range(len(logp))
    ]  # fmt: skip
    weights = drawn_from.double().softmax(0)
    slopes = weights * slopes[:, 0].double()
    gradient = slopes - slopes.sum() * logits.double().softmax(0)
    return (weights * torch.stack(values).double()).sum(), gradient


def kl_to(of, to, differentiated):
    """KL(of || to) of two vectors of logits, and its gradient with respect to one of them."""
    of, to = (x.double().requires_grad_(x is differentiated) for x in (of, to))
    kl = (of.softmax(0) * (of.log_softmax(0) - to.log_softmax(0))).sum()
    kl.backward()
    return kl.detach(), next(x.grad for x in (of, to) if x.requires_grad)


# estimator, gradient, source of the samples: is the value unbiased, and is the gradient?
ESTIMATED = [
    ("k1", "k2", "policy", True, True),
    ("k3", "k2", "policy", True, True),
    ("k3", "estimator", "policy", True, False),
    ("k2", "k2", "policy", False, True),
    ("reverse_k3", "estimator", "policy", True, False),
    ("k1", "estimator", "reference", True, True),
    ("k2", "estimator", "reference", False, False),
    ("k3", "estimator", "reference", True, True),
    ("reverse_k3", "estimator", "reference", True, True),
]


@each_backend_slow_triton
@pytest.mark.parametrize("estimator, gradient, source, unbiased, follows", ESTIMATED)
def test_the_kl_in_the_loss_is_that_of_who_drew_the_tokens(
    backend, estimator, gradient, source, unbiased, follows
):
    """A penalty whose direction or sign is wrong drives the policies apart."""
    policy, reference = 0.5 * normal(40, seed=4), 0.5 * normal(40, seed=5)
    # the reverse estimator is of the KL from the one that did not draw them
    first, second = (policy, reference) if source == "policy" else (reference, policy)
    if estimator == "reverse_k3":
        first, second = second, first
    kl, slope = kl_to(first, second, policy)
    objective = OBJECTIVES["ppo_kl"].replace(
        kl_estimator=estimator, kl_gradient=gradient, kl_sampled_from=source
    )
    drawn_from = policy if source == "policy" else reference
    value, found = expected_kl(backend, objective, policy, reference, drawn_from)
    assert kl > 0.1
    assert (value.item() == pytest.approx(kl.item(), rel=1e-5)) == unbiased
    assert (torch.nn.functional.cosine_similarity(found, slope, dim=0) > 1 - 1e-6) == follows
    assert torch.nn.functional.cosine_similarity(found, slope, dim=0) > 0.8


def test_ppo_kl_penalises_the_kl_from_the_policy_that_drew_the_tokens():
    """And every estimator that a run may choose has a gradient that lowers it."""
    row = OBJECTIVES["ppo_kl"]
    assert (row.kl_sampled_from, row.kl_estimator) == ("reference", "k3")
    for estimator in KL_ESTIMATORS:
        row.replace(kl_estimator=estimator)


@each_backend
def test_a_mean_over_tokens_and_one_over_completions_may_differ_in_sign(backend):
    """PPO as most trainers average, and as the papers write it: completions of 1 and 5 tokens."""
    advantages = torch.tensor([1.0, -0.6], device=DEVICE)
    logp = -torch.ones(6, device=DEVICE)
    starts_of_two = torch.tensor([0, 1, 6], device=DEVICE, dtype=torch.int32)
    losses = {
        aggregation: ops.policy_loss(
            logp,
            logp,
            advantages,
            OBJECTIVES["ppo"].replace(aggregation=aggregation),
            cu_seqlens=starts_of_two,
            backend=backend,
        ).loss.item()
        for aggregation in ("token-mean", "sequence-mean-token-mean")
    }
    assert losses["token-mean"] == pytest.approx(-(1 - 5 * 0.6) / 6)
    assert losses["sequence-mean-token-mean"] == pytest.approx(-(1 - 0.6) / 2)
