import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.integrations.compare import compare

pytest.importorskip("trl", reason="TRL is not installed: make peers; then make test-integrations")
from trl import GRPOTrainer, RLOOTrainer  # noqa: E402

from warpo.bench.peers import trl_inputs, trl_trainer  # noqa: E402
from warpo.kernels.integrations import trl  # noqa: E402
from warpo.kernels.integrations.patching import wrap  # noqa: E402
from warpo.kernels.integrations.serving import PassOn  # noqa: E402
from warpo.kernels.integrations.trl import policy  # noqa: E402

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]
PER_TOKEN = ("logprobs", "entropy", "old", "ref", "sampling")
originals = {kind: kind._compute_loss for kind in (GRPOTrainer, RLOOTrainer)}

settings_of_grpo = st.fixed_dictionaries(
    {
        "loss_type": st.sampled_from(LOSS_TYPES),
        "importance_sampling_level": st.sampled_from(["token", "sequence"]),
        "beta": st.sampled_from([0.0, 0.04]),
        "use_bias_correction_kl": st.booleans(),
        "epsilon_low": st.sampled_from([0.2, 3e-4, 1.0]),
        "epsilon_high": st.sampled_from([0.2, 4e-4, 5.0]),
        "delta": st.sampled_from([None, 1.5, 1.1]),
        "top_entropy_quantile": st.sampled_from([1.0, 0.4]),
        "off_policy_mask_threshold": st.sampled_from([None, 0.1]),
        "use_vllm": st.booleans(),
        "current_gradient_accumulation_steps": st.sampled_from([1, 4]),
        "steps_per_generation": st.sampled_from([1, 8]),
        "max_completion_length": st.just(11),
        "training": st.booleans(),
        "aux_loss_enabled": st.booleans(),
    }
)
entropy_bonus = st.sampled_from(
    [
        {},
        {"_entropy_bonus_enabled": True, "entropy_coef": 0.1},
        {"_entropy_bonus_enabled": True, "entropy_coef": 0.1, "use_adaptive_entropy": True},
        {
            "_entropy_bonus_enabled": True,
            "entropy_coef": 0.1,
            "use_adaptive_entropy": True,
            "_last_world_entropy": 0.1,
            "entropy_target": 9.0,
        },
    ]
)
shapes = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 5),
        "columns": st.integers(1, 9),
        "seed": st.integers(0, 99),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    }
)


def make(rows, columns, seed, dtype=torch.float32):
    """Tensors of one micro-batch, some rows of the mask empty."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=0.5):
        return scale * torch.randn(*shape, generator=generator)

    logprobs = -1 - normal(rows, columns).abs()
    near = {name: logprobs + normal(rows, columns) for name in ("old", "ref", "sampling")}
    lengths = torch.randint(0, columns + 1, (rows,), generator=generator)
    tensors = {name: x.to(dtype) for name, x in (near | {"logprobs": logprobs}).items()}
    mask = (torch.arange(columns) < lengths[:, None]).long()
    ratio = normal(rows, columns).exp()
    return tensors | {
        "entropy": normal(rows, columns).abs().to(dtype),
        "mask": mask,
        "advantages": normal(rows, scale=1.0),
        "aux_loss": normal(1)[0].abs(),
        # as TRL makes it: 0 where it was outside of bounds, 1 where masked
        "ratio": ratio.masked_fill(ratio > 1.5, 0.0).masked_fill(mask == 0, 1.0),
        "tools": torch.randint(0, 2, (rows, columns), generator=generator),
        "count": 3 * mask.sum(),
    }


def loss_of(name, compute, settings, inputs, seen, clean=False):
    """The loss of a new trainer as a function of its tensors; with it come the metrics and what it
    changes of the trainer.

    Args:
        inputs: names of what `_compute_loss` is given, and of the tensors that they are.
        seen: receives the names of the metrics.
        clean: masked slots become 0.
    """

    def loss(**tensors):
        mask = tensors["mask"]
        if clean:
            tensors |= {
                key: torch.where(mask != 0, x, 0.0)
                for key, x in tensors.items()
                if key in PER_TOKEN and x.shape == mask.shape
            }
        forward = tensors["logprobs"], tensors["entropy"], tensors["aux_loss"]
        trainer = trl_trainer(name, forward=forward, **settings)
        given = {key: tensors[tensor] for key, tensor in inputs.items()}
        result = compute(trainer, None, trl_inputs(tensors["advantages"], mask, **given))
        metrics = trainer._metrics["train" if trainer.model.training else "eval"]
        assert all(type(value) is float for row in metrics.values() for value in row)
        seen.append(sorted(metrics))
        adapted = [trainer.entropy_coef, trainer._last_world_entropy, trainer._entropy_window_stats]
        return result, [x for x in adapted if x is not None], dict(sorted(metrics.items()))

    return loss


@pytest.fixture(autouse=True, scope="module")
def _few_tokens_too():
    """The cases are small, and CISPO of few tokens stays TRL's."""
    before, policy.FEW_TOKENS = policy.FEW_TOKENS, 0
    yield
    policy.FEW_TOKENS = before


def unexpected(*_):
    raise AssertionError("TRL's own loss was called")


def compare_losses(name, settings, inputs, tensors, clean=False, served=True):
    kind, seen = {"GRPOTrainer": GRPOTrainer, "RLOOTrainer": RLOOTrainer}[name], []
    replaced = trl.library.replacements[f"{name}._compute_loss"]
    own = wrap(replaced, unexpected if served else originals[kind])
    differentiable = ["logprobs"]
    differentiable += ["entropy"] if settings.get("_entropy_bonus_enabled") else []
    differentiable += ["aux_loss"] if settings.get("aux_loss_enabled") else []

    compare(
        loss_of(name, originals[kind], settings, inputs, seen, clean),
        loss_of(name, own, settings, inputs, seen),
        differentiable=differentiable,
        **tensors,
    )
    assert seen.count(seen[0]) == len(seen), seen


def has_objective(**options):
    try:
        return policy.objective_of(trl_trainer("GRPOTrainer", **options)) is not None
    except PassOn:
        return False


def grpo_loss(original):
    return wrap(trl.library.replacements["GRPOTrainer._compute_loss"], original)


@settings(max_examples=400)
@given(
    options=settings_of_grpo,
    bonus=entropy_bonus,
    shape=shapes,
    has_old=st.booleans(),
    has_sampling=st.booleans(),
    has_tools=st.booleans(),
    wide=st.booleans(),
    ratio_of_sequence=st.booleans(),
    poison=st.sampled_from([None, math.nan, math.inf]),
)
def test_grpo(
    options, bonus, shape, has_old, has_sampling, has_tools, wide, ratio_of_sequence, poison
):
    tensors = make(**shape)
    if wide:
        tensors["advantages"] = tensors["old"].float() + 1
    if ratio_of_sequence:
        tensors["ratio"] = tensors["ratio"][:, :1].contiguous()
    inputs = {"num_items_in_batch": "count", "ref_per_token_logps": "ref"}
    inputs |= {"old_per_token_logps": "old"} if has_old else {}
    inputs |= {"sampling_per_token_logps": "sampling"} if has_sampling else {}
    inputs |= {"importance_sampling_ratio": "ratio"} if options["use_vllm"] else {}
    inputs |= {"tool_mask": "tools"} if has_tools else {}
    served = shape["columns"] > 1 and has_objective(**options)
    poisoned = poison is not None and served
    if poisoned:
        for key in PER_TOKEN:
            tensors[key] = tensors[key].masked_fill(tensors["mask"] == 0, poison)
    compare_losses("GRPOTrainer", options | bonus, inputs, tensors, poisoned, served)


@given(
    shape=shapes,
    low=st.sampled_from([0.2, 1.0]),
    high=st.sampled_from([0.2, 5.0]),
    aux=st.booleans(),
    training=st.booleans(),
)
def test_rloo(shape, low, high, aux, training):
    tensors = make(**shape)
    tensors["old"] = (tensors["old"] * tensors["mask"]).sum(1)
    options = {
        "epsilon_low": low,
        "epsilon_high": high,
        "aux_loss_enabled": aux,
        "training": training,
    }
    compare_losses("RLOOTrainer", options, {"old_logps": "old"}, tensors)


def state(**settings):
    tensors = make(3, 5, 0)
    forward = tensors["logprobs"].requires_grad_(), tensors["entropy"], None
    trainer = trl_trainer("GRPOTrainer", forward=forward, **settings)
    given = {"num_items_in_batch": tensors["count"], "old_per_token_logps": tensors["old"]}
    return trainer, trl_inputs(tensors["advantages"], tensors["mask"], **given)


@pytest.mark.parametrize(
    "options",
    [
        {"delta": 1.2},
        {"delta": 0.5},
        {"epsilon_low": 1.5},
        {"loss_type": "cispo"},
        {"loss_type": "sapo", "sapo_temperature_pos": 100.0},
        {"loss_type": "other"},
        {"loss_type": "vespo"},
        {"importance_sampling_level": "prefix"},
        {"mask": 0.5},
        {"mask": 2},
    ],
)
def test_settings_that_are_passed_on(options):
    weight = options.pop("mask", None)
    trainer, inputs = state(**options)
    if weight:
        inputs["completion_mask"] = weight * inputs["completion_mask"]
    calls = []
    grpo_loss(lambda *given: calls.append(given))(trainer, None, inputs)
    assert calls == [(trainer, None, inputs)]
    assert not any(trainer._metrics.values())


def test_cispo_of_few_tokens_is_passed_on_before_the_forward_pass(monkeypatch):
    monkeypatch.setattr(policy, "FEW_TOKENS", 9)
    trainer = trl_trainer("GRPOTrainer", loss_type="cispo", epsilon_high=5.0)
    few = trl_inputs(torch.ones(2), torch.ones(2, 4, dtype=torch.int64))
    assert grpo_loss(lambda *arguments: arguments[2])(trainer, None, few) is few


def test_float64_is_passed_on_after_one_forward_pass():
    trainer, inputs = state(_entropy_bonus_enabled=True, use_adaptive_entropy=True)
    trainer.forward = tuple(x.double() for x in trainer.forward[:2]) + (None,)
    forward, calls = trainer._get_per_token_logps_and_entropies, []
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: calls.append(1) or forward()
    loss = grpo_loss(originals[GRPOTrainer])(trainer, None, inputs)
    assert loss.dtype == torch.float64 and calls == [1]
    assert trainer._metrics["train"]["entropy"] and trainer._last_world_entropy < math.inf


def test_a_ratio_above_float32_is_bounded():
    trainer, inputs = state()
    inputs["advantages"] = -torch.ones(3)
    inputs["old_per_token_logps"] = inputs["old_per_token_logps"] - 200
    assert not originals[GRPOTrainer](trainer, None, inputs).isfinite()
    with trl.patch(only=["GRPOTrainer._compute_loss"]):
        loss = trainer._compute_loss(None, inputs)
    loss.backward()
    assert loss.isfinite() and trainer.forward[0].grad.isfinite().all()


def test_subclasses_of_trl_have_it():
    from trl.experimental.gmpo import GMPOTrainer

    assert "_compute_loss" in vars(GMPOTrainer)

    class Mine(GRPOTrainer):
        pass

    with trl.patch(only=["GRPOTrainer._compute_loss"]):
        assert Mine._compute_loss is GRPOTrainer._compute_loss is not originals[GRPOTrainer]
        assert GMPOTrainer._compute_loss is not GRPOTrainer._compute_loss
