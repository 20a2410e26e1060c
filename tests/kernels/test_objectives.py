"""The table of objectives: every row against the oracle of its paper, and what is refused."""

import numpy as np
import pytest
import torch

from tests.kernels.backends import DEVICE, each_backend
from tests.oracles.policy_loss import (
    CONSTANT_LENGTH,
    ORACLES,
    Completion,
    clipped,
    gradient,
    grpo_terms,
    mean_over_completions,
)
from tests.tolerance import SUM_RELATIVE, assert_close
from warpo.kernels import ops, reference
from warpo.kernels.objectives import OBJECTIVES, Objective

NAMES = list(OBJECTIVES)
LENGTHS = (6, 1, 9, 4)
# log ratios in each completion: beyond and within the bounds of every row, those of GSPO too
SPREADS = (0.5, 1e-4, 1.5, 0.05)
PER_TOKEN = ("logp", "old", "ref", "sampler", "advantages")


def make_completions() -> list[Completion]:
    random = np.random.default_rng(8)
    completions = []
    for length, spread, advantage in zip(LENGTHS, SPREADS, (1.3, 0.4, -0.9, -0.2), strict=True):
        old = -2 * random.random(length)
        logp = old + spread * random.standard_normal(length)
        completions.append(
            Completion(
                logp=logp,
                frozen=logp,
                old=old,
                ref=old + 0.3 * random.standard_normal(length),
                sampler=old + 0.7 * random.standard_normal(length),
                advantages=np.full(length, advantage),
            )
        )
    return completions


def padded(completions: list[Completion]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """float64 tensors (B, T) with NaN in the masked slots, and the mask."""
    shape = (len(completions), max(LENGTHS))
    mask = torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]
    tensors = {}
    for name in PER_TOKEN:
        tensors[name] = torch.full(shape, torch.nan, dtype=torch.float64)
        tensors[name][mask] = torch.from_numpy(
            np.concatenate([getattr(a, name) for a in completions])
        )
    return tensors, mask


def normaliser(objective: Objective) -> float:
    return {
        "token-mean": sum(LENGTHS),
        "sequence-mean-token-sum-norm": len(LENGTHS) * CONSTANT_LENGTH,
    }.get(objective.aggregation, len(LENGTHS))


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_equals_the_oracle_of_the_paper(name):
    assert name in ORACLES, f"write the oracle of {name} in tests/oracles/policy_loss.py"
    completions, objective = make_completions(), OBJECTIVES[name]
    tensors, mask = padded(completions)
    logp = tensors["logp"].requires_grad_()
    loss, _ = reference.policy_loss(
        logp,
        tensors["old"],
        tensors["advantages"],
        objective,
        torch.tensor(normaliser(objective), dtype=torch.float64),
        mask=mask,
        ref=tensors["ref"] if objective.kl_coef else None,
        sampler=tensors["sampler"],
    )
    (slopes,) = torch.autograd.grad(loss, logp)
    assert loss.item() == pytest.approx(ORACLES[name](completions), rel=1e-12)
    expected = torch.from_numpy(np.concatenate(gradient(ORACLES[name], completions)))
    assert expected.abs().max() > 0
    torch.testing.assert_close(slopes[mask], expected, rtol=1e-6, atol=1e-9)
    assert (slopes[~mask] == 0).all()


@each_backend
@pytest.mark.parametrize("name", NAMES)
def test_every_backend_equals_the_oracle_of_the_paper(backend, name):
    completions, objective = make_completions(), OBJECTIVES[name]
    tensors, mask = padded(completions)
    tensors = {key: x.float().to(DEVICE) for key, x in tensors.items()}
    logp = tensors["logp"].requires_grad_()
    denominator = normaliser(objective) if objective.aggregation.endswith("norm") else None
    loss, _ = ops.policy_loss(
        logp,
        tensors["old"],
        tensors["advantages"],
        name,
        mask=mask.to(DEVICE),
        ref_logprobs=tensors["ref"],
        sampler_logprobs=tensors["sampler"],
        denominator=denominator,
        backend=backend,
    )
    loss.backward()
    exact = torch.tensor(ORACLES[name](completions), dtype=torch.float64)
    assert_close(loss, exact, relative=SUM_RELATIVE, absolute=1e-5, what=name)
    expected = torch.zeros(mask.shape, dtype=torch.float64)
    expected[mask] = torch.from_numpy(np.concatenate(gradient(ORACLES[name], completions)))
    assert_close(logp.grad, expected, relative=SUM_RELATIVE, absolute=1e-6, what=f"{name} gradient")


def test_the_completions_reach_the_bounds_of_every_row():
    """Or the comparison with the oracles would say nothing of them."""
    tensors, mask = padded(make_completions())
    tensors = {key: x.float() for key, x in tensors.items()}
    for name, objective in OBJECTIVES.items():
        _, metrics = ops.policy_loss(
            tensors["logp"],
            tensors["old"],
            tensors["advantages"],
            name,
            mask=mask,
            ref_logprobs=tensors["ref"],
            sampler_logprobs=tensors["sampler"],
            denominator=1.0,
        )
        row = dict(zip(ops.METRICS, metrics.tolist(), strict=True))
        if objective.surrogate in ("clip", "dual_clip", "geometric"):
            assert row["clipped_low"] > 0 and row["clipped_high"] > 0
            assert row["clipped_low"] + row["clipped_high"] < row["tokens"]
        assert (row["clipped_dual"] > 0) == (objective.surrogate == "dual_clip")
        assert (0 < row["corrected"] < row["tokens"]) == (objective.correction != "none")
        assert (row["kl"] > 0) == (objective.kl_coef > 0)


def test_process_supervision_is_grpo_with_an_advantage_a_token():
    """https://arxiv.org/abs/2402.03300 section 4.1.3."""
    random = np.random.default_rng(4)
    completions = [
        Completion(a.logp, a.frozen, a.old, a.ref, a.sampler, random.standard_normal(len(a)))
        for a in make_completions()
    ]
    tensors, mask = padded(completions)
    loss, _ = reference.policy_loss(
        tensors["logp"],
        tensors["old"],
        tensors["advantages"],
        OBJECTIVES["grpo"],
        torch.tensor(4.0, dtype=torch.float64),
        mask=mask,
        ref=tensors["ref"],
    )
    assert loss.item() == pytest.approx(ORACLES["grpo"](completions), rel=1e-12)


@each_backend
@pytest.mark.parametrize("correction", ["none", "truncate"])
@pytest.mark.parametrize("packed", [False, True])
def test_sequences_that_the_policy_moved_away_from_lose_their_negative_advantages(
    backend, correction, packed
):
    limit, completions = 0.1, make_completions()

    def oracle(completions):
        """DeepSeek-V3.2: M_t of GRPO's surrogates, not of its KL."""

        def value(a):
            drawn = a.old if correction == "none" else a.sampler
            moved = (drawn - a.frozen).mean() > limit
            dropped = np.where(moved & (a.advantages < 0), clipped(a, 0.8, 1.2), 0)
            return (grpo_terms(a) - dropped).mean()

        return -mean_over_completions(completions, value)

    assert oracle(completions) != pytest.approx(ORACLES["grpo"](completions), rel=1e-3)
    objective = OBJECTIVES["grpo"].replace(sequence_mask=limit)
    # the weights themselves stay 1
    objective = objective.replace(correction=correction, correction_low=1.0, correction_high=1.0)
    tensors, mask = padded(completions)
    tensors = {key: x.float().to(DEVICE) for key, x in tensors.items()}
    options = {"mask": mask.to(DEVICE)}
    if packed:
        tensors = {key: x[mask] for key, x in tensors.items()}
        starts = np.cumsum([0, *LENGTHS], dtype=np.int32)
        options = {"cu_seqlens": torch.from_numpy(starts).to(DEVICE)}
    logp = tensors["logp"].requires_grad_()
    loss, _ = ops.policy_loss(
        logp,
        tensors["old"],
        tensors["advantages"],
        objective,
        ref_logprobs=tensors["ref"],
        sampler_logprobs=tensors["sampler"],
        backend=backend,
        **options,
    )
    (slopes,) = torch.autograd.grad(loss, logp)
    assert loss.item() == pytest.approx(oracle(completions), rel=1e-5)
    expected = torch.from_numpy(np.concatenate(gradient(oracle, completions)))
    found = (slopes if packed else slopes[mask.to(DEVICE)]).cpu().double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"ratio_level": "group"}, "ratio_level must be one of token, sequence, prefix, product"),
        ({"surrogate": "cispo"}, "surrogate must be one of clip, dual_clip, stop_gradient"),
        ({"clip_low": 1.5}, r"clip_low must be in \[0, 1\], got 1.5"),
        ({"clip_high": -0.1}, "clip_high must be >= 0, got -0.1"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1, got 1.0"),
        ({"tau_positive": 0.0}, r"tau_positive must be in \(0, 80\], got 0.0"),
        ({"tau_negative": float("nan")}, r"tau_negative must be in \(0, 80\], got nan"),
        ({"kl_coef": -1.0}, "kl_coef must be >= 0"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of k1, k2, k3, reverse_k3"),
        ({"kl_gradient": "k3"}, "kl_gradient must be one of estimator, k2; got 'k3'"),
        ({"entropy_coef": -0.1}, "entropy_coef must be >= 0"),
        ({"correction": "clip"}, "correction must be one of none, truncate, mask"),
        ({"correction_level": "prefix"}, "correction_level must be one of token, sequence"),
        ({"correction_nan": "drop"}, "correction_nan must be one of propagate, mask; got 'drop'"),
        ({"correction_low": -1.0}, "correction_low must be >= 0"),
        ({"correction_low": 3.0}, "correction_high must be >= 3, got 2.0"),
        ({"aggregation": "mean"}, "aggregation must be one of token-mean"),
        ({"log_ratio_limit": 100.0}, "exp overflows float32"),
        ({"kl_level": "prefix"}, "kl_level must be one of token, sequence; got 'prefix'"),
        ({"kl_sampled_from": "old"}, "kl_sampled_from must be one of policy, reference"),
        ({"kl_estimator": "k1"}, "whose expectation is 0: set kl_gradient to 'k2'"),
        ({"kl_estimator": "reverse_k3", "kl_gradient": "k2"}, "set it to 'estimator' with"),
        ({"kl_sampled_from": "reference", "kl_gradient": "k2"}, "set it to 'estimator' with"),
        ({"ratio_level": "prefix"}, "set surrogate to 'stop_gradient', got 'clip'"),
        ({"surrogate": "geometric"}, "set ratio_level to 'sequence', got 'token'"),
        (
            {"surrogate": "divergence_tv", "ratio_level": "product"},
            "set ratio_level to 'token', got 'product'",
        ),
        ({"rate_negative": 0.0}, r"rate_negative must be in \(0, 80\], got 0.0"),
        ({"sequence_mask": -0.1}, "sequence_mask must be >= 0, got -0.1"),
        (
            {"surrogate": "geometric", "ratio_level": "sequence", "sequence_mask": 0.1},
            "sequence_mask = 0.1 takes advantages away",
        ),
    ],
)
def test_an_objective_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Objective(**fields)


def test_an_objective_with_a_change_is_another_one():
    changed = OBJECTIVES["grpo"].replace(clip_high=0.28)
    assert changed == Objective(
        kl_coef=0.04, aggregation="sequence-mean-token-mean", clip_high=0.28
    )
    assert changed != OBJECTIVES["grpo"]
