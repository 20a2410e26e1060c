from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.integrations.compare import compare

pytest.importorskip(
    "openrlhf", reason="OpenRLHF is not installed: make peers; then make test-integrations"
)
from openrlhf.models import loss as losses  # noqa: E402

from tests.integrations.openrlhf.cases import (  # noqa: E402
    DTYPES,
    LAYOUTS,
    MASK_DTYPES,
    SEEDS,
    laid_out,
    mask_of,
    pair,
    without_none,
)
from warpo.kernels.integrations import openrlhf  # noqa: E402

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 9))
# dp_size, batch_num_tokens and global_batch_size, as its trainers pass them, or none of them
COUNTS = st.sampled_from(
    [
        {},
        {"dp_size": 2, "batch_num_tokens": 13.0, "global_batch_size": 5},
        {"batch_num_tokens": torch.tensor(17.0), "global_batch_size": torch.tensor(7.0)},
    ]
)


def tensors(count, shape, dtype, layout, seed, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    values = spread * torch.randn(count, *shape, generator=generator)
    return [laid_out(x.to(dtype), layout) for x in values], generator


@given(
    SHAPES, DTYPES, LAYOUTS, MASK_DTYPES, st.booleans(), st.sampled_from([0.2, 1.0]), COUNTS, SEEDS
)
def test_value_loss(shape, dtype, layout, mask_dtype, token_level, clip, counts, seed):
    (values, old, returns), generator = tensors(3, shape, dtype, layout, seed)
    mask = mask_of(shape, generator, some_empty=True).to(mask_dtype)
    original, ours = pair("ValueLoss.forward", losses.ValueLoss(clip, token_level))
    compare(original, ours, values, old, returns, mask, differentiable=[0], scale=20.0, **counts)


OBJECTIVES = [
    {},
    {"clip_eps_low": 0.1, "clip_eps_high": 0.28, "token_level_loss": False},
    {"dual_clip": 1.5},
    {"policy_loss_type": "gspo", "clip_eps_low": 0.05, "clip_eps_high": 0.05},
    {"policy_loss_type": "gspo", "dual_clip": 1.2},
]
BAND, BOUND = (0.8, 1.3), (-1.0, 0.07)
CORRECTIONS = [
    {},
    {"is_correction_level": "token", "is_correction_threshold": BAND},
    {"is_correction_level": "token", "is_correction_threshold": BAND, "is_correction_mode": "clip"},
    {"is_correction_level": "seq", "is_correction_threshold": BAND},
    *(
        {
            "is_correction_level": level,
            "is_correction_gating": gating,
            "is_correction_threshold": BOUND,
        }
        for level in ("token", "seq")
        for gating in ("tv", "binary_kl")
    ),
]


@given(
    SHAPES,
    DTYPES,
    LAYOUTS,
    MASK_DTYPES,
    st.sampled_from(OBJECTIVES),
    st.sampled_from(CORRECTIONS),
    COUNTS,
    SEEDS,
)
def test_policy_loss(shape, dtype, layout, mask_dtype, objective, correction, counts, seed):
    (logp, moved, advantages), generator = tensors(3, shape, dtype, layout, seed, 0.3)
    (sampled,), _ = tensors(1, shape, dtype, layout, seed + 1, 0.2)
    logp = -2 * logp.abs()
    old = laid_out(logp + moved, layout)
    rollout = laid_out(old + sampled, layout)
    mask = mask_of(shape, generator, some_empty=True).to(mask_dtype)
    original, ours = pair("PolicyLoss.forward", losses.PolicyLoss(**objective, **correction))
    compare(
        without_none(original),
        without_none(ours),
        logp,
        old,
        advantages,
        mask,
        rollout,
        differentiable=[0],
        scale=4.0,
        **counts,
    )


@pytest.mark.parametrize("name", ["PolicyLoss.forward", "ValueLoss.forward"])
def test_masked_slots_do_not_spread(name):
    """The replacement has a number where the library's result is NaN."""
    module = {
        "PolicyLoss.forward": [losses.PolicyLoss()],
        "ValueLoss.forward": [losses.ValueLoss(0.2)],
    }
    original, ours = pair(name, *module.get(name, []))
    generator = torch.Generator().manual_seed(0)
    clean = [torch.randn(2, 5, generator=generator) for _ in range(3)]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    dirty = [x.masked_fill(mask == 0, torch.nan) for x in clean]

    def first(function, inputs):
        leaf = inputs[0].clone().requires_grad_()
        result = function(leaf, *inputs[1:], mask)
        result = result if isinstance(result, torch.Tensor) else result[0]
        return result, *torch.autograd.grad(result, leaf)

    assert first(original, dirty)[0].isnan()
    for found, wanted in zip(first(ours, dirty), first(original, clean), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("token_level", [True, False])
def test_no_valid_token(token_level):
    values = torch.randn(2, 3, requires_grad=True)
    original, ours = pair("ValueLoss.forward", losses.ValueLoss(0.2, token_level))
    arguments = (values, torch.randn(2, 3), torch.randn(2, 3), torch.zeros(2, 3))
    assert original(*arguments).isnan()
    loss = ours(*arguments)
    loss.backward()
    assert loss == 0
    assert not values.grad.any()


@pytest.mark.parametrize("options", [*OBJECTIVES[:4], CORRECTIONS[1], CORRECTIONS[3]])
@pytest.mark.parametrize(
    "counts", [{}, {"dp_size": 2, "batch_num_tokens": 13.0, "global_batch_size": 5}]
)
def test_metrics_without_a_valid_token_are_the_librarys(options, counts):
    original, ours = pair("PolicyLoss.forward", losses.PolicyLoss(**options))
    arguments = [*torch.randn(3, 2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.randn(2, 3)]
    arguments[0].requires_grad_()  # a correction without gradient is the library's
    found, wanted = ours(*arguments, **counts), original(*arguments, **counts)
    assert found[0] == 0
    torch.testing.assert_close(found[1:], wanted[1:], equal_nan=True)


def test_what_a_step_of_the_actor_calls_by_default_is_served():
    from openrlhf.models import actor, utils
    from openrlhf.utils.loss_utils import get_loss_batch_info

    sequences, mask = torch.randint(0, 9, (2, 6)), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    head = torch.randn(2, 6, 9, requires_grad=True)
    policy = SimpleNamespace(
        model=lambda *_, **__: Output(logits=2.0 * head), packing_samples=False, temperature=0.7
    )
    with openrlhf.patch():
        logprobs, output = actor.Actor.forward(
            policy,
            sequences,
            mask,
            torch.ones_like(sequences),
            return_output=True,
            return_entropy=True,
        )
        old = logprobs.detach() + 0.1
        info = get_loss_batch_info(SimpleNamespace(dp_group=None), mask)
        loss, *_ = losses.PolicyLoss()(logprobs, old, torch.randn(2, 4), mask, **info)
        kl = utils.compute_approx_kl(logprobs, old, kl_estimator="k3")
        (loss + kl.mean() + output.entropy.mean()).backward()
        calls = {name: r.calls for name, r in openrlhf.library.replacements.items()}
    served = {name: found.served for name, found in calls.items() if found.served}
    names = ("log_probs_from_logits", "compute_entropy", "PolicyLoss.forward", "compute_approx_kl")
    assert served == dict.fromkeys(names, 1)
    assert not any(found.passed_on for found in calls.values())


class Output(dict):
    """Output of a model of transformers."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


WEIGHTS = [torch.tensor([[1, 0.5, 1], [1, 0.25, 0]]), torch.tensor([[1, 2, 1], [1, 1, 0]])]
VALUE, POLICY = losses.ValueLoss(0.2), losses.PolicyLoss()
TRAINED = torch.randn(2, 3, requires_grad=True)
ONES = torch.ones(2, 3)
REFUSED = [
    ("ValueLoss.forward", [losses.ValueLoss()], list(torch.randn(3, 2, 3))),
    ("ValueLoss.forward", [VALUE], list(torch.randn(3, 6))),
    ("ValueLoss.forward", [VALUE], [*torch.randn(3, 2, 3).double(), ONES]),
    ("ValueLoss.forward", [VALUE], [*torch.randn(3, 2, 3), torch.ones(1, 3)]),
    ("ValueLoss.forward", [VALUE], [*torch.randn(3, 2, 3), ONES, 1, torch.tensor(6)]),
    ("ValueLoss.forward", [VALUE], [torch.randn(2, 3), TRAINED, torch.randn(2, 3)]),
    ("PolicyLoss.forward", [POLICY], [*torch.randn(2, 2, 3), torch.randn(2, 1), ONES]),
    ("PolicyLoss.forward", [losses.PolicyLoss(clip_eps_low=1.5)], [*torch.randn(3, 2, 3), ONES]),
    ("PolicyLoss.forward", [POLICY], [torch.randn(2, 3), TRAINED, torch.randn(2, 3), ONES]),
    *(("ValueLoss.forward", [VALUE], [*torch.randn(3, 2, 3), mask]) for mask in WEIGHTS),
    *(("PolicyLoss.forward", [POLICY], [*torch.randn(3, 2, 3), mask]) for mask in WEIGHTS),
    ("DPOLoss.forward", [losses.DPOLoss(0.1)], [torch.randn(2).double()] + [torch.randn(2)] * 3),
    ("LogExpLoss.forward", [losses.LogExpLoss()], [torch.randn(2).double(), torch.randn(2)]),
]


@pytest.mark.parametrize(("name", "bound", "arguments"), REFUSED)
def test_passed_through(name, bound, arguments):
    """With the arguments as they came."""
    original, ours = pair(name, *bound)
    for found, wanted in zip(
        torch.utils._pytree.tree_leaves(ours(*arguments)),
        torch.utils._pytree.tree_leaves(original(*arguments)),
        strict=True,
    ):
        assert found is wanted is None or torch.equal(found, wanted)


@pytest.mark.parametrize(
    "module",
    [losses.PolicyLoss(policy_loss_type="gspo"), losses.PolicyLoss(is_correction_level="token")],
)
def test_what_the_library_refuses(module):
    """A mask, or logprobs of the sampler, that are not given."""
    _, ours = pair("PolicyLoss.forward", module)
    with pytest.raises((TypeError, AttributeError)):
        ours(*torch.randn(3, 2, 4))


@given(st.integers(1, 9), DTYPES, st.booleans(), st.sampled_from([1.0, 200.0]), SEEDS)
def test_log_exp_loss(pairs, dtype, with_margin, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected, margin = (spread * torch.randn(3, pairs, generator=generator)).to(dtype)
    original, ours = pair("LogExpLoss.forward", losses.LogExpLoss())
    if spread == 1.0:
        compare(
            original,
            ours,
            chosen,
            rejected,
            margin if with_margin else None,
            differentiable=[0, 1],
            scale=4.0,
        )
    wanted = torch.logaddexp(rejected.double() - chosen.double(), torch.zeros(()).double()).mean()
    found = ours(chosen, rejected).double()
    assert abs(found - wanted) <= (1e-6 if dtype == torch.float32 else 2e-2) * wanted.clamp(min=1)


def test_log_exp_loss_does_not_overflow():
    chosen, rejected = torch.tensor([-100.0]), torch.tensor([100.0])
    original, ours = pair("LogExpLoss.forward", losses.LogExpLoss())
    assert original(chosen, rejected).isinf()
    assert ours(chosen, rejected) == 200


@given(
    st.integers(1, 9),
    DTYPES,
    st.sampled_from([{}, {"label_smoothing": 0.1}, {"ipo": True}]),
    st.sampled_from([0.1, 0.5]),
    SEEDS,
)
def test_dpo_loss(pairs, dtype, options, beta, seed):
    generator = torch.Generator().manual_seed(seed)
    logps = (10 * torch.randn(4, pairs, generator=generator)).to(dtype)
    original, ours = pair("DPOLoss.forward", losses.DPOLoss(beta, **options))
    # smoothing takes a term of this size from the gradient, which may be all of it
    terms = beta * options.get("label_smoothing", 0.0)
    compare(original, ours, *logps, differentiable=[0, 1], scale=1000.0, gradient_scale=terms)
