"""Rows under a config: where each setting lands, and what is refused before a model is loaded."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from warpo.engine.config.algorithm import Algorithm
from warpo.engine.config.algorithms import ALGORITHMS
from warpo.engine.config.policy import load_config
from warpo.engine.config.resolve import find, resolve
from warpo.engine.errors import ConfigError

MINIMAL = """\
model: some-org/some-model
output_dir: runs/a
steps: 3
sampler: transformers
data: {train: prompts.jsonl}
reward: {sources: "rewards:exact"}
"""
ROWS = [name for name, row in ALGORITHMS.items() if row.family == "policy"]
# what a row cannot run without
NEEDS = {
    "ppo_ptx": ("--pretraining.data", "examples.jsonl"),
    "ppo_kl": ("--update.epochs", "2"),
    "kl_cov": ("--update.epochs", "2"),
    "gdpo": ("--reward.sources", "rewards:exact", "0.5 * rewards:short"),
}

Resolve = Callable[..., Algorithm]


@pytest.fixture(scope="module")
def resolved(tmp_path_factory: pytest.TempPathFactory) -> Resolve:
    """The row of a config with these settings."""
    path = tmp_path_factory.mktemp("configs") / "run.yaml"
    path.write_text(MINIMAL)

    def of(name: str, *overrides: str) -> Algorithm:
        settings = ("--algorithm", name, *NEEDS.get(name, ()), *overrides)
        return resolve(load_config(path, settings))

    return of


def changes(row: Algorithm, changed: Algorithm) -> dict[str, Any]:
    """Fields that differ, those of the objective as objective.NAME."""

    def flat(algorithm: Algorithm) -> dict[str, Any]:
        fields = {f.name: getattr(algorithm, f.name) for f in dataclasses.fields(algorithm)}
        objective = fields.pop("objective")
        own = {f.name: getattr(objective, f.name) for f in dataclasses.fields(objective) if f.init}
        return fields | {f"objective.{name}": value for name, value in own.items()}

    before, after = flat(row), flat(changed)
    assert before.keys() == after.keys()
    return {name: after[name] for name in after if after[name] != before[name]}


@pytest.mark.parametrize("name", ROWS)
def test_without_settings_a_row_is_itself(resolved: Resolve, name: str) -> None:
    assert resolved(name) == ALGORITHMS[name]


CRITIC = {"a2c", "ppo", "ppo_dual_clip", "ppo_kl", "ppo_length_adaptive", "vapo", "ppo_ptx"}
NO_BOUNDS = {
    *("reinforce", "reinforce_reward_to_go", "opo", "rloo", "remax", "gpg", "a2c"),
    "off_policy_first_order",
    *("ppo_kl", "kl_cov", "sapo", "vespo", "iterative_dpo", "pkpo"),
}
KL_IN_REWARD = (CRITIC - {"ppo_kl"}) | {
    *("reinforce", "reinforce_reward_to_go", "rloo", "remax", "reinforce_plus_plus"),
    *("off_policy_trajectory", "off_policy_first_order", "off_policy_prefix", "off_policy_causal"),
}
GROUP_STD = {
    *("grpo", "grpo_response", "grpo_token", "grpo_process", "iterative_grpo", "dr_grpo"),
    *("dapo", "gspo", "cispo", "gmpo", "sapo", "grpo_tis", "grpo_mis", "grpo_icepop"),
    *("luspo", "dppo_tv", "dppo_kl", "vespo", "gdpo", "clip_cov", "kl_cov"),
}
REDRAWN = (GROUP_STD - {"grpo_process", "gdpo"}) | {
    *("opo", "rloo", "gpg", "reinforce_plus_plus_baseline"),
}
PAIRS = {"iterative_dpo"}
EVERY = set(ROWS)
BEST_OF_K = {"pass_at_k", "pkpo"}
OTHER_REWARDS = BEST_OF_K | {"grpo_process", "gdpo"}
OUTCOME = EVERY - CRITIC - PAIRS - OTHER_REWARDS
MOVING = {
    *("reinforce", "off_policy_trajectory", "off_policy_first_order", "off_policy_prefix"),
    "off_policy_causal",
}
CAUSAL = {"off_policy_causal"}

KL = ("--loss.kl_coef", "0.625")

# setting: (its words, rows that read it, the fields it changes)
SETTINGS: dict[str, tuple[tuple[str, ...], set[str], dict[str, Any]]] = {
    "loss.clip_range": (
        ("--loss.clip_range", "0.11", "0.37"),
        EVERY - NO_BOUNDS,
        {"objective.clip_low": 0.11, "objective.clip_high": 0.37},
    ),
    "loss.entropy_coef": (
        ("--loss.entropy_coef", "0.5"),
        EVERY - PAIRS,
        {"objective.entropy_coef": 0.5},
    ),
    "loss.kl_target": (("--loss.kl_target", "0.33", *KL), EVERY - PAIRS, {"kl_target": 0.33}),
    "loss.reference_every_steps": (
        ("--loss.reference_every_steps", "7", *KL),
        EVERY - PAIRS - {"ppo_kl"},
        {"reference_every_steps": 7},
    ),
    "loss.gamma": (("--loss.gamma", "0.97"), CRITIC | OUTCOME, {"gamma": 0.97}),
    "loss.aggregation": (
        ("--loss.aggregation", "sequence-mean-token-sum-norm"),
        EVERY - PAIRS,
        {"objective.aggregation": "sequence-mean-token-sum-norm"},
    ),
    "loss.baseline": (
        ("--loss.baseline", "leave_one_out"),
        OUTCOME,
        {"baseline": "leave_one_out"},
    ),
    "loss.baseline_decay": (("--loss.baseline_decay", "0.5"), MOVING, {"baseline_decay": 0.5}),
    "loss.whiten": (("--loss.whiten", "true"), EVERY - PAIRS - CAUSAL - {"gdpo"}, {"whiten": True}),
    "loss.kl_level": (
        ("--loss.kl_level", "sequence", *KL),
        EVERY - PAIRS - KL_IN_REWARD,
        {"objective.kl_level": "sequence"},
    ),
    "loss.gae_lambda": (
        ("--loss.gae_lambda", "length:0.1", "0.5"),
        CRITIC,
        {"gae_lambda": ("length:0.1", 0.5)},
    ),
    "loss.advantage_std": (
        ("--loss.advantage_std", "population"),
        GROUP_STD | REDRAWN,
        {"advantage_std": "population"},
    ),
    "loss.correction": (
        ("--loss.correction", "truncate_sequence", "--loss.correction_range", "0.3", "1.7"),
        EVERY - PAIRS,
        {
            "objective.correction": "truncate",
            "objective.correction_level": "sequence",
            "objective.correction_low": 0.3,
            "objective.correction_high": 1.7,
        },
    ),
    "loss.nll_coef": (("--loss.nll_coef", "0.2"), PAIRS, {"objective.nll_coef": 0.2}),
    "loss.pass_at_k": (("--loss.pass_at_k", "3"), BEST_OF_K, {"pass_at_k": 3}),
    "loss.right_nll_coef": (
        ("--loss.right_nll_coef", "0.2"),
        EVERY - PAIRS,
        {"right_nll_coef": 0.2},
    ),
    "loss.covariance_share": (
        ("--loss.covariance_share", "0.01"),
        {"clip_cov", "kl_cov"},
        {"covariance_share": 0.01},
    ),
    "loss.covariance_range": (
        ("--loss.covariance_range", "0.5", "2"),
        {"clip_cov"},
        {"covariance_range": (0.5, 2.0)},
    ),
    "loss.covariance_kl_coef": (
        ("--loss.covariance_kl_coef", "0.5"),
        {"kl_cov"},
        {"covariance_kl_coef": 0.5},
    ),
    "loss.sequence_mask": (
        ("--loss.sequence_mask", "0.05", "--update.minibatches", "2"),
        EVERY - PAIRS - {"gmpo"},
        {"objective.sequence_mask": 0.05},
    ),
    "loss.pairs": (("--loss.pairs", "all"), PAIRS, {"pairs": "all"}),
    "rollout.max_draws": (("--rollout.max_draws", "3"), REDRAWN, {"max_draws": 3}),
    "pretraining.coef": (
        ("--pretraining.coef", "0.5", "--pretraining.data", "examples.jsonl"),
        EVERY,
        {"pretraining_coef": 0.5},
    ),
    "loss.reward_entropy_target": (
        ("--loss.reward_entropy_target", "0.4", "0.1", "--loss.reward_entropy_coef", "0.5"),
        CRITIC | OUTCOME,
        {"reward_entropy_target": (0.4, 0.1), "reward_entropy_coef": 0.5},
    ),
    "loss.reward_entropy_coef": (
        ("--loss.reward_entropy_coef", "0.5"),
        CRITIC | OUTCOME,
        {"reward_entropy_coef": 0.5},
    ),
    "reward.normalize": (
        ("--reward.normalize", "running"),
        CRITIC | OUTCOME,
        {"reward_normalize": "running"},
    ),
    "reward.clip": (("--reward.clip", "2.5"), CRITIC | OUTCOME, {"reward_clip": 2.5}),
    "critic.lr": (("--critic.lr", "1e-3"), CRITIC, {}),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_setting_lands_in_its_field_or_is_refused(resolved: Resolve, name: str) -> None:
    for setting, (words, readers, fields) in SETTINGS.items():
        if name not in readers:
            match = f"{setting} = .* no effect on algorithm = '{name}'"
            with pytest.raises(ConfigError, match=match):
                resolved(name, *words)
            continue
        row = resolved(name, *words)
        for field, value in fields.items():
            head, _, leaf = field.rpartition(".")
            assert getattr(row.objective if head else row, leaf) == value, setting
        # and nothing else
        found = changes(resolved(name, *(KL if "--loss.kl_coef" in words else ())), row)
        assert found.keys() <= fields.keys(), setting


@pytest.mark.parametrize("name", ROWS)
def test_the_kl_lands_in_the_reward_or_in_the_loss(resolved: Resolve, name: str) -> None:
    if name in PAIRS:
        assert changes(resolved(name), resolved(name, *KL)) == {"objective.beta": 0.625}
        with pytest.raises(ConfigError, match="kl_estimator = 'k2' has no effect on algorithm"):
            resolved(name, *KL, "--loss.kl_estimator", "k2")
        return
    row = resolved(name, *KL, "--loss.kl_estimator", "k2")
    place = "reward_kl" if name in KL_IN_REWARD else "objective.kl"
    expected = {f"{place}_coef": 0.625, f"{place}_estimator": "k2"}
    found = changes(ALGORITHMS[name], row)
    assert expected.items() >= found.items() and f"{place}_coef" in found
    assert row.kl_coef == 0.625
    assert row.has_reference == (name != "ppo_kl")
    assert "reference" in row.models or name == "ppo_kl"
    assert not resolved(name, "--loss.kl_coef", "0", *no_renewal(name)).has_reference


@pytest.mark.parametrize("name", sorted(EVERY - PAIRS - OTHER_REWARDS - {"ppo_kl"}))
def test_the_kl_moves_with_its_coefficient(resolved: Resolve, name: str) -> None:
    """From loss to reward and back; each place has an estimator of its own."""
    row, other = resolved(name, *KL), "loss" if name in KL_IN_REWARD else "reward"
    moved = resolved(name, *KL, "--loss.kl_in", other)
    places = {"reward_kl_coef", "objective.kl_coef", "kl_in"}
    assert changes(row, moved).keys() == places
    assert moved.kl_in_reward == (other == "reward") and moved.kl_coef == 0.625
    assert moved.has_reference and sorted(map(moved_coef(moved), places - {"kl_in"})) == [0, 0.625]
    assert changes(row, resolved(name, *KL, "--loss.kl_in", row.kl_in)) == {}


def moved_coef(row: Algorithm) -> Callable[[str], float]:
    objective: Any = row.objective
    return lambda place: row.reward_kl_coef if place == "reward_kl_coef" else objective.kl_coef


def test_the_coefficient_of_the_row_moves_too(resolved: Resolve) -> None:
    grpo: Any = resolved("grpo", "--loss.kl_in", "reward")
    assert (grpo.reward_kl_coef, grpo.objective.kl_coef, grpo.models[-1]) == (0.04, 0, "reference")
    ppo: Any = resolved("ppo", "--loss.kl_in", "loss")
    assert (ppo.reward_kl_coef, ppo.objective.kl_coef, ppo.models[-1]) == (0, 0.02, "reference")


def test_the_gradient_of_the_kl_in_the_loss_may_be_that_of_k2(resolved: Resolve) -> None:
    words = ("--loss.kl_estimator", "k1", "--loss.kl_gradient", "k2")
    objective: Any = resolved("grpo", *words).objective
    assert (objective.kl_estimator, objective.kl_gradient) == ("k1", "k2")
    assert changes(ALGORITHMS["grpo"], resolved("grpo", *words[2:])) == {
        "objective.kl_gradient": "k2"
    }


def test_the_kl_in_the_reward_may_be_that_of_the_other_direction(resolved: Resolve) -> None:
    found = changes(ALGORITHMS["ppo"], resolved("ppo", "--loss.kl_estimator", "reverse_k3"))
    assert found == {"reward_kl_estimator": "reverse_k3"}


def test_a_baseline_decides_what_else_is_read(resolved: Resolve) -> None:
    std = ("--loss.advantage_std", "population")
    assert resolved("reinforce", "--loss.baseline", "group", *std).advantage_std == "population"
    decay = ("--loss.baseline_decay", "0.5")
    none = ("--loss.advantage_std", "none")
    assert resolved("grpo", "--loss.baseline", "moving", *none, *decay).baseline_decay == 0.5
    assert resolved("grpo", "--loss.baseline", "greedy", *none).subtracts.needs_greedy
    redrawn = resolved("reinforce", "--loss.baseline", "optimal", "--rollout.max_draws", "3")
    assert redrawn.max_draws == 3 and redrawn.needs_group
    assert resolved("dr_grpo", "--loss.reward_to_go", "true").reward_to_go


def no_renewal(name: str) -> tuple[str, ...]:
    """Settings that go with a coefficient of 0."""
    if ALGORITHMS[name].reference_every_steps:
        return ("--loss.reference_every_steps", "0")
    return ("--loss.kl_target", "fixed") if ALGORITHMS[name].kl_target else ()


def test_the_correction_is_that_of_the_row_unless_told(resolved: Resolve) -> None:
    def corrected(name: str, *overrides: str) -> tuple[Any, ...]:
        objective: Any = resolved(name, *overrides).objective
        bounds = (objective.correction_low, objective.correction_high)
        return objective.correction, objective.correction_level, bounds

    assert corrected("grpo_icepop") == ("mask", "token", (0.5, 5.0))
    assert corrected("grpo", "--loss.correction", "truncate_sequence") == (
        *("truncate", "sequence"),
        (0.0, 2.0),
    )
    told = ("--loss.correction", "mask_token", "--loss.correction_range")
    assert corrected("grpo", *told, "0.5", "3") == ("mask", "token", (0.5, 3.0))
    assert corrected("grpo", *told, "0.5,3") == ("mask", "token", (0.5, 3.0))
    assert corrected("grpo", *told, "algorithm") == ("mask", "token", (0.0, 2.0))
    icepop = ("--loss.correction_range", "0.8", "1.2")
    assert corrected("grpo_icepop", *icepop) == ("mask", "token", (0.8, 1.2))
    assert corrected("grpo_mis", "--loss.correction", "none")[0] == "none"


def test_a_target_may_be_fixed(resolved: Resolve) -> None:
    assert resolved("ppo_kl").kl_target == 0.01
    assert resolved("ppo_kl", "--loss.kl_target", "fixed").kl_target is None


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "grop",
            [],
            r"'grop' is unknown, did you mean 'grpo'\? Known: reinforce, reinforce_reward_to_go, ",
        ),
        ("dpo", [], r"algorithm = 'dpo' trains from given data or environments"),
        ("ppo_gymnasium", [], r"algorithm = 'ppo_gymnasium' trains from given data or env"),
        (
            "ppo",
            ["--critic.model", "none"],
            r"critic\.model = 'none', but algorithm = 'ppo' takes its advantages from a critic: "
            r"set critic\.model to policy, shared or a directory, or choose .* reinforce_plus_plus",
        ),
        ("ppo", ["--critic.model", "./absent"], r"critic\.model: there is no directory ./absent"),
        (
            "ppo",
            ["--critic.model", "shared", "--critic.lr", "1e-3"],
            r"critic\.lr = 0\.001 has no effect on critic\.model = 'shared': remove it$",
        ),
        (
            "ppo",
            ["--critic.model", "shared", "--critic.warmup_steps", "1"],
            r"critic\.warmup_steps = 1 has no effect on critic\.model = 'shared': remove it$",
        ),
        (
            "ppo",
            ["--critic.coef", "0.1"],
            r"critic\.coef = 0\.1 has no effect on critic\.model = 'policy': remove it$",
        ),
        (
            "grpo",
            ["--critic.model", "shared"],
            r"critic\.model = 'shared' has no effect on algorithm = 'grpo': remove it \(it has no",
        ),
        (
            "ppo",
            ["--critic.warmup_steps", "3"],
            r"critic\.warmup_steps = 3 leaves no step of steps = 3 to the policy",
        ),
        *(
            (
                name,
                ["--rollout.group_size", "1"],
                rf"group_size = 1 is too small for algorithm = '{name}': its advantages compare "
                r"the completions of a prompt.*Set rollout\.group_size to 2 or more",
            )
            for name in sorted((GROUP_STD | REDRAWN | PAIRS) - {"grpo_process"})
        ),
        (
            "grpo",
            ["--rollout.group_size", "1"],
            r"the standard deviation of one is 0 \(loss\.advantage_std = 'sample'\)",
        ),
        (
            "ppo",
            ["--loss.gae_lambda", "length:0", "1"],
            r"loss\.gae_lambda = length:0 1\.0: ALPHA must be above 0",
        ),
        (
            "iterative_dpo",
            ["--rollout.max_model_len", "600", "--update.token_budget", "800"],
            r"budget = 800 cannot hold a pair of algorithm = 'iterative_dpo': raise it to 856",
        ),
        ("iterative_dpo", ["--loss.kl_coef", "0"], r"beta of algorithm = 'iterative_dpo': set it"),
        ("dapo", ["--loss.kl_estimator", "k1"], r"no effect: .* is 0 in algorithm 'dapo'"),
        (
            "grpo",
            ["--loss.kl_coef", "0", "--loss.kl_estimator", "k1"],
            r"kl_estimator = 'k1' has no effect: loss\.kl_coef is 0$",
        ),
        (
            "dapo",
            ["--loss.reward_entropy_target", "0.4", "0.1"],
            r"reward_entropy_target = 0\.4 0\.1 needs a loss\.reward_entropy_coef above 0 to start",
        ),
        ("dapo", ["--loss.kl_target", "0.1"], r"kl_target = 0\.1 needs a loss\.kl_coef above 0"),
        (
            "ppo_kl",
            ["--update.epochs", "1"],
            r"'ppo_kl' has no penalty in the first optimizer step .* or update\.minibatches to 2",
        ),
        (
            "kl_cov",
            ["--update.epochs", "1"],
            r"'kl_cov' has no penalty in the first optimizer step .* or update\.minibatches to 2",
        ),
        (
            "clip_cov",
            ["--loss.covariance_range", "5", "1"],
            r"covariance_range = 5 1: the lowest covariance must be below the highest",
        ),
        (
            "grpo",
            ["--loss.covariance_share", "0.1"],
            r"covariance_share = 0\.1 has no effect on algorithm = 'grpo': remove it",
        ),
        ("grpo", ["--update.max_kl", "0.1"], r"max_kl = 0\.1 has no effect: it ends the epochs"),
        (
            "grpo",
            ["--loss.sequence_mask", "0.1"],
            r"sequence_mask = 0\.1 has no effect: the policy",
        ),
        (
            "iterative_grpo",
            ["--loss.kl_coef", "0"],
            r"reference_every_steps = 50 has no effect on algorithm = 'iterative_grpo': it has no",
        ),
        (
            "ppo_ptx",
            ["--pretraining.data", ""],
            r"pretraining\.coef = 27\.8 of algorithm = 'ppo_ptx' needs pretraining\.data: give",
        ),
        (
            "grpo",
            ["--pretraining.data", "a.jsonl"],
            r"pretraining\.data has no effect on algorithm = 'grpo': set pretraining\.coef",
        ),
        (
            "grpo",
            ["--pretraining.aggregation", "sequence-mean-token-sum"],
            r"pretraining\.aggregation = .* has no effect on algorithm = 'grpo': its pretraining",
        ),
        (
            "grpo",
            ["--loss.correction_range", "0.5", "2"],
            r"range = 0\.5 2 has no effect: loss\.correction is none in algorithm 'grpo'",
        ),
        (
            "grpo_tis",
            ["--loss.correction", "none", "--loss.correction_range", "0.5", "2"],
            r"has no effect: loss\.correction is none$",
        ),
        (
            "grpo",
            ["--loss.correction", "mask_token", "--loss.correction_range", "2", "0.5"],
            r"2 0\.5: the lowest w must be below the highest",
        ),
        (
            "grpo",
            ["--loss.baseline", "history"],
            r"loss\.baseline = 'history' compares no completions of a group, whose deviation "
            r"algorithm = 'grpo' divides by: set loss\.advantage_std to none",
        ),
        (
            "grpo",
            ["--loss.reward_to_go", "true"],
            r"loss\.reward_to_go = True gives each token .* set loss\.advantage_std to none",
        ),
        (
            "gpg",
            ["--loss.baseline", "batch"],
            r"loss\.baseline = 'batch' does not go with algorithm = 'gpg'",
        ),
        (
            "dapo",
            ["--loss.baseline", "batch", "--loss.advantage_std", "none"],
            r"max_draws = 10 of algorithm = 'dapo' replaces groups .* set rollout\.max_draws to 1",
        ),
        (
            "reinforce",
            ["--loss.baseline", "batch", "--loss.baseline_decay", "0.5"],
            r"baseline_decay = 0\.5 has no effect on loss\.baseline = 'batch': remove it",
        ),
        (
            "reinforce",
            ["--loss.baseline", "group", "--rollout.group_size", "1"],
            r"group_size = 1 is too small for algorithm = 'reinforce'",
        ),
        (
            "grpo",
            ["--loss.kl_in", "reward", "--loss.kl_gradient", "k2"],
            r"loss\.kl_gradient = 'k2' has no effect on loss\.kl_in = 'reward': remove it",
        ),
        (
            "ppo_kl",
            ["--loss.kl_in", "reward"],
            r"loss\.kl_in = 'reward' has no effect on algorithm = 'ppo_kl'",
        ),
        ("dapo", ["--loss.kl_in", "reward"], r"kl_in = 'reward' has no effect: .* in algorithm"),
        (
            "grpo",
            ["--loss.kl_estimator", "k1"],
            r"loss of algorithm = 'grpo': kl_estimator 'k1' .* set kl_gradient to 'k2'",
        ),
        ("dapo", ["--loss.kl_gradient", "k2"], r"kl_gradient = 'k2' has no effect: .* is 0"),
        (
            "grpo",
            ["--critic.aggregation", "sequence-mean-token-mean"],
            r"critic\.aggregation = .* has no effect on algorithm = 'grpo'",
        ),
        (
            "grpo_process",
            ["--reward.sources", "math"],
            r"algorithm = 'grpo_process' learns from rewards of steps, and reward\.sources = math "
            r"gives none: add process_model:DIR, or a function or server",
        ),
        (
            "gdpo",
            ["--reward.sources", "math"],
            r"algorithm = 'gdpo' normalises the rewards of two or more sources apart, and "
            r"reward\.sources = math has 1 of a weight other than 0: add one, or choose grpo",
        ),
        (
            "gdpo",
            ["--reward.sources", "math", "0 * rewards:exact"],
            r"sources = math, 0 \* rewards:exact has 1 of a weight other than 0",
        ),
        *(
            (
                name,
                ["--loss.pass_at_k", "9"],
                rf"loss\.pass_at_k = 9 of algorithm = '{name}' is more than the completions of a "
                r"prompt, rollout\.group_size = 8: lower the one or raise the other",
            )
            for name in sorted(BEST_OF_K)
        ),
        (
            "pass_at_k",
            ["--loss.pass_at_k", "8"],
            r"loss\.pass_at_k = 8 of algorithm = 'pass_at_k' is all of the completions .* is 0",
        ),
        (
            "pkpo",
            ["--loss.pass_at_k", "1"],
            r"loss\.pass_at_k = 1 of algorithm = 'pkpo' leaves no other completion",
        ),
    ],
)
def test_what_cannot_run_is_refused_with_row_setting_and_fix(
    resolved: Resolve, name: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(name, *overrides)


def test_what_may_give_steps_is_not_refused(resolved: Resolve, tmp_path: Path) -> None:
    for sources in (
        [f"process_model:{tmp_path}"],
        ["rewards:steps"],
        ["math", "0.5 * rewards:steps"],
    ):
        assert resolved("grpo_process", "--reward.sources", *sources).advantages == "process"


def test_the_row_is_found_by_its_name() -> None:
    assert all(find(name) is row and row.name == name for name, row in ALGORITHMS.items())


def test_the_models_of_rlhf_are_four(resolved: Resolve) -> None:
    assert resolved("ppo").models == ("actor", "critic", "reward", "reference")
    assert resolved("ppo", "--loss.kl_coef", "0").models == ("actor", "critic", "reward")
    assert resolved("grpo").models == ("actor", "reward", "reference")
    assert resolved("dapo").models == ("actor", "reward")


def test_a_refusal_comes_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(MINIMAL + "algorithm: ppo\ncritic: {model: none}\n")
    code = (
        "import sys; from warpo.engine.cli import main; "
        "assert main(['train', 'run.yaml']) == 1; "
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "but algorithm = 'ppo' takes its advantages from a critic" in result.stderr
