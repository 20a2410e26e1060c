"""Estimators of advantages: every row of the table against the oracle of its paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import advantages as oracle
from tests.oracles.advantages import Sampled, Tokens
from tests.tolerance import SCAN_ABSOLUTE, SCAN_RELATIVE, assert_close
from warpo.engine.config.algorithm import Algorithm
from warpo.engine.config.algorithms import ALGORITHMS
from warpo.engine.config.estimators import BASELINES, ESTIMATORS
from warpo.engine.errors import RewardError
from warpo.engine.learner.advantages import AdaptiveState, estimate
from warpo.engine.models.step_rollouts import StepRollouts
from warpo.engine.types import TokenSequence
from warpo.kernels import ops
from warpo.kernels.objectives import KL_ESTIMATORS

ROWS = [name for name, row in ALGORITHMS.items() if row.family == "policy"]
BASELINE = 0.3

# By row, what the paper says; a row's own numbers and the KL of `with_kl` come with it.
ORACLES: dict[str, Callable[[Sampled, Algorithm], Tokens]] = {
    "reinforce": lambda s, row: oracle.reinforce(s, *kl_of(row), BASELINE),
    "reinforce_reward_to_go": lambda s, row: oracle.outcome(
        s, kl_of(row), baseline="history", earlier=BASELINE, reward_to_go=True
    ),
    "opo": lambda s, row: oracle.outcome(s, baseline="optimal"),
    "rloo": lambda s, row: oracle.rloo(s, *kl_of(row)),
    "reinforce_plus_plus": lambda s, row: oracle.reinforce_plus_plus(s, *kl_of(row)),
    "reinforce_plus_plus_baseline": lambda s, row: oracle.reinforce_plus_plus_baseline(s),
    "remax": lambda s, row: oracle.remax(s, *kl_of(row)),
    "gpg": lambda s, row: oracle.gpg(s),
    "off_policy_trajectory": lambda s, row: oracle.reinforce(s, *kl_of(row), BASELINE),
    "off_policy_first_order": lambda s, row: oracle.reinforce(s, *kl_of(row), BASELINE),
    "off_policy_prefix": lambda s, row: oracle.reinforce(s, *kl_of(row), BASELINE),
    "off_policy_causal": lambda s, row: oracle.causal(s, *kl_of(row), BASELINE),
    "grpo_process": lambda s, row: oracle.process(s, row.advantage_std),
    "gdpo": lambda s, row: oracle.gdpo(s, row.advantage_std),
    "pass_at_k": lambda s, row: oracle.best_of_k(s, row.pass_at_k, "pass_at_k_training"),
    "pkpo": lambda s, row: oracle.best_of_k(s, row.pass_at_k, "pkpo"),
    "iterative_dpo": lambda s, row: oracle.grpo(s, "none"),
}


def paper(s: Sampled, row: Algorithm) -> Tokens:
    """The advantages that the paper of a row defines."""
    if row.name in ORACLES:
        return ORACLES[row.name](s, row)
    if row.has_critic:
        rest = (row.gamma, row.gae_lambda)
        return oracle.ppo(s, *kl_of(row), *rest, whitened=row.whiten)[0]
    assert (row.advantages, row.baseline) == ("outcome", "group"), "give its oracle"
    return oracle.grpo(s, row.advantage_std)


def kl_of(row: Algorithm) -> tuple[float, str]:
    return (row.reward_kl_coef if row.kl_in_reward else 0.0), row.reward_kl_estimator


def sample(
    seed: int, *, groups: int = 3, group_size: int = 4, longest: int = 60, equal: int = 1
) -> Sampled:
    """Completions of 1 to `longest` tokens; the rewards of the first `equal` groups are equal."""
    rng = np.random.default_rng(seed)
    count = groups * group_size
    # multiples of 1/8: means and deviations of equal rewards are exact
    rewards = np.round(rng.normal(size=count) * 8) / 8
    lengths = rng.integers(1, longest + 1, count)
    steps = [
        [
            (int(end), float(round(rng.normal() * 8) / 8))
            for end in sorted(rng.choice(n, min(n, rng.integers(0, 4)), replace=False))
        ]
        for n in lengths
    ]
    for group in range(min(equal, groups)):
        members = range(group * group_size, (group + 1) * group_size)
        for i in members:
            rewards[i] = rewards[members[0]]
            steps[i] = [(end, 0.5) for end, _ in steps[i]]

    sources = np.stack([rewards, rewards > 0, np.abs(rewards) * 8], 1)

    def tokens(low: float, high: float) -> Tokens:
        return [rng.uniform(low, high, n).astype(np.float32).astype(float) for n in lengths]

    return Sampled(
        rewards=rewards,
        group_size=group_size,
        logprobs=tokens(-3, 0),
        ref_logprobs=tokens(-3, 0),
        values=tokens(-1, 1),
        steps=steps,
        greedy_rewards=rng.integers(0, 2, count).astype(float),
        source_rewards=sources,
        source_weights=np.array([1.0, 0.5, -2.0]),
    )


def rollouts(s: Sampled, *, by_sampler: bool = False, steps: bool = False) -> StepRollouts:
    """by_sampler: the logprobs are those of the sampler, and no learner's stand beside them.
    steps: with rewards of steps.
    """

    def column(parts: Tokens) -> torch.Tensor:
        return torch.tensor(np.concatenate(parts), dtype=torch.float32)

    logprobs = column(s.logprobs)
    return StepRollouts(
        sequences=[
            TokenSequence.of([7, int(group)], [3] * n)
            for group, n in zip(s.group_ids, s.lengths, strict=True)
        ],
        group_ids=np.asarray(s.group_ids),
        rewards=torch.tensor(s.rewards),
        step_rewards=s.steps if steps else None,
        source_rewards=None if s.source_rewards is None else torch.tensor(s.source_rewards),
        source_weights=None if s.source_weights is None else torch.tensor(s.source_weights),
        baseline_rewards=torch.tensor(s.greedy_rewards),
        sampler_logprobs=logprobs if by_sampler else torch.zeros_like(logprobs),
        old_logprobs=None if by_sampler else logprobs,
        ref_logprobs=column(s.ref_logprobs),
        values=column(s.values),
    )


def by_row(rollouts: StepRollouts, name: str) -> tuple[torch.Tensor, ...]:
    """A column in the parts of its rows."""
    return getattr(rollouts, name).split(rollouts.lengths.tolist())


def with_kl(name: str, **changes: object) -> Algorithm:
    """The row with a KL that is seen, where the row takes it off the reward."""
    row = ALGORITHMS[name]
    return row.replace(**({"reward_kl_coef": 0.2} if row.kl_in_reward else {}), **changes)


def estimated(
    row: Algorithm, s: Sampled, state: AdaptiveState | None = None, **options: bool
) -> tuple[StepRollouts, dict[str, float]]:
    options = {"steps": row.estimator.needs_steps or s.by_steps, **options}
    found = rollouts(s, **options)
    return found, estimate(row, found, state or AdaptiveState(row.kl_coef, BASELINE))


def compare(found: Sequence[torch.Tensor | None], expected: Tokens, what: str) -> None:
    assert [len(x) for x in found] == [len(x) for x in expected]
    together = torch.tensor(np.concatenate(expected))
    assert_close(
        torch.cat(list(found)),
        together,
        what=what,
        relative=SCAN_RELATIVE,
        absolute=SCAN_ABSOLUTE * (1 + together.abs().max().item()),
    )


def test_every_estimator_and_every_baseline_has_a_row_or_an_oracle() -> None:
    assert {ALGORITHMS[name].advantages for name in ROWS} == set(ESTIMATORS)
    assert ORACLES.keys() <= set(ROWS)


def by_steps(s: Sampled) -> Sampled:
    """The same completions, rewarded for their steps."""
    sums = [sum(reward for _, reward in steps) for steps in s.steps]
    return replace(s, rewards=np.array(sums, float), by_steps=True)


@settings(max_examples=60)
@given(
    st.integers(0, 10_000),
    st.sampled_from(list(BASELINES)),
    st.sampled_from(["none", "sample", "population"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1.0, 0.97]),
    st.sampled_from([0.0, 0.2]),
    st.sampled_from([0.0, 0.3]),
    st.booleans(),
)
def test_settings_of_the_outcome_are_those_of_the_formula(
    seed: int,
    baseline: str,
    std: str,
    reward_to_go: bool,
    whitened: bool,
    gamma: float,
    kl_coef: float,
    entropy_coef: float,
    stepwise: bool,
) -> None:
    s = replace(sample(seed, equal=0), entropy_coef=entropy_coef)
    s = by_steps(s) if stepwise else s
    if reward_to_go or not BASELINES[baseline].of_group:
        std = "none"
    row = ALGORITHMS["reinforce"].replace(
        baseline=baseline,
        advantage_std=std,
        reward_to_go=reward_to_go,
        whiten=whitened,
        gamma=gamma,
        reward_kl_coef=kl_coef,
        reward_entropy_coef=entropy_coef,
    )
    found, _ = estimated(row, s, AdaptiveState(kl_coef, BASELINE))
    expected = oracle.outcome(
        s,
        (kl_coef, "k1"),
        baseline=baseline,
        earlier=BASELINE,
        gamma=gamma,
        reward_to_go=reward_to_go,
        std=std,
        whitened=whitened,
    )
    compare(by_row(found, "advantages"), expected, baseline)


@pytest.mark.parametrize("name", [name for name in ROWS if ALGORITHMS[name].has_critic])
def test_rewards_of_steps_stand_where_the_steps_end(name: str) -> None:
    """Of 3 at token 1 and -2 at token 3 the returns are 1, 1, -2, -2."""
    row = ALGORITHMS[name].replace(gae_lambda=(1.0, 1.0), reward_kl_coef=0.0, whiten=False)
    tokens = [np.zeros(4)]
    s = Sampled(np.array([1.0]), 1, tokens, tokens, tokens, [[(1, 3.0), (3, -2.0)]], np.zeros(1))
    found, _ = estimated(row, replace(s, by_steps=True), AdaptiveState(0.0))
    assert found.returns is not None and found.returns.tolist() == [1, 1, -2, -2]
    assert found.advantages is not None and found.advantages.tolist() == [1, 1, -2, -2]
    whole, _ = estimated(row, s, AdaptiveState(0.0))
    assert whole.returns is not None and whole.returns.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
@pytest.mark.parametrize("stepwise", [True, False])
@pytest.mark.parametrize("name", ["ppo", "ppo_length_adaptive"])
def test_a_critic_reads_rewards_of_steps_and_entropy(
    name: str, stepwise: bool, entropy_coef: float
) -> None:
    s = replace(sample(11), entropy_coef=entropy_coef)
    s, row = by_steps(s) if stepwise else s, with_kl(name, reward_entropy_coef=entropy_coef)
    found, _ = estimated(row, s)
    advantages, returns = oracle.ppo(s, *kl_of(row), row.gamma, row.gae_lambda)
    compare(by_row(found, "advantages"), advantages, "advantages")
    compare(by_row(found, "returns"), returns, "returns")


def test_the_history_is_the_mean_of_all_earlier_rewards() -> None:
    """Also where the steps differ in their number of completions."""
    row, state = ALGORITHMS["reinforce"].replace(baseline="history"), AdaptiveState(0.0)
    seen = list[float]()
    for seed, groups in enumerate([3, 1, 2, 4]):
        s = sample(seed, groups=groups)
        found, _ = estimated(row, s, state)
        earlier = np.mean(seen or s.rewards)
        expected = oracle.outcome(s, baseline="history", earlier=earlier)
        compare(by_row(found, "advantages"), expected, "step")
        seen += s.rewards.tolist()
    assert state.rewards_seen == len(seen) and state.baseline == pytest.approx(np.mean(seen))


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=15)
@given(
    st.integers(0, 10_000),
    st.integers(1, 4),
    st.integers(2, 5),
    st.integers(1, 60),
    st.integers(0, 2),
    st.booleans(),
)
def test_advantages_are_those_of_the_paper(
    name: str, seed: int, groups: int, group_size: int, longest: int, equal: int, by_sampler: bool
) -> None:
    s = sample(seed, groups=groups, group_size=group_size, longest=longest, equal=equal)
    row = with_kl(name, pass_at_k=min(ALGORITHMS[name].pass_at_k, group_size))
    found, metrics = estimated(row, s, by_sampler=by_sampler)
    expected = paper(s, row)
    compare(by_row(found, "advantages"), expected, name)
    spread = np.concatenate(expected).std()
    assert metrics["advantages/std"] == pytest.approx(spread, rel=1e-3, abs=1e-4)
    assert (found.returns is not None) == row.has_critic


@pytest.mark.parametrize("kl_estimator", KL_ESTIMATORS)
@pytest.mark.parametrize(
    "name", [name for name in ROWS if ALGORITHMS[name].kl_in_reward and name != "ppo_ptx"]
)
def test_the_kl_of_each_estimator_is_taken_off_the_reward_of_its_token(
    name: str, kl_estimator: str
) -> None:
    s, row = sample(1), with_kl(name, reward_kl_estimator=kl_estimator)
    found, metrics = estimated(row, s)
    compare(by_row(found, "advantages"), paper(s, row), name)
    without, _ = estimated(row.replace(reward_kl_coef=0.0), s, AdaptiveState(0.0, BASELINE))
    assert not torch.equal(found.advantages, without.advantages)
    log_ratio = np.concatenate(s.logprobs) - np.concatenate(s.ref_logprobs)
    assert metrics["kl/ref"] == pytest.approx(log_ratio.mean(), rel=1e-5)


@pytest.mark.parametrize("gamma", [1.0, 0.97])
@pytest.mark.parametrize(
    "gae_lambda", [(0.95, 0.95), (0.9, 1.0), (0.0, 1.0), ("length:0.05", 1.0), ("length:0.2", 0.9)]
)
def test_lambda_of_the_policy_and_of_the_critic_are_two(
    gamma: float, gae_lambda: tuple[float | str, float]
) -> None:
    # lengths on both sides of 20, below which the length-adaptive lambda of alpha 0.05 is 0
    s = sample(2, groups=4, longest=50)
    assert min(s.lengths) < 20 < max(s.lengths)
    row = with_kl("ppo", gamma=gamma, gae_lambda=gae_lambda)
    found, _ = estimated(row, s)
    advantages, returns = oracle.ppo(s, *kl_of(row), gamma, gae_lambda)
    compare(by_row(found, "advantages"), advantages, "advantages")
    compare(by_row(found, "returns"), returns, "returns")


def test_completions_of_one_length_share_their_lambda_and_nothing_else() -> None:
    """Length-adaptive, in another order: each completion keeps its own returns."""
    s = sample(3, groups=2, group_size=6, longest=3)
    found, _ = estimated(with_kl("ppo_length_adaptive"), s)
    order = [5, 0, 11, 3, 2, 7, 8, 10, 1, 4, 9, 6]
    row, again = with_kl("ppo_length_adaptive"), rollouts(s)
    tokens = again.tokens_of(order)
    columns = ("sampler_logprobs", "old_logprobs", "ref_logprobs", "values")
    again = replace(
        again,
        sequences=[again.sequences[i] for i in order],
        rewards=again.rewards[order],
        **{name: getattr(again, name)[tokens] for name in columns},
    )
    estimate(row, again, AdaptiveState(row.kl_coef))
    for place, i in enumerate(order):
        assert torch.equal(by_row(again, "returns")[place], by_row(found, "returns")[i])
        torch.testing.assert_close(
            by_row(again, "advantages")[place], by_row(found, "advantages")[i]
        )


@pytest.mark.parametrize("name", ROWS)
def test_a_step_in_which_all_rewards_are_equal_teaches_nothing_and_is_no_nan(name: str) -> None:
    s = sample(4, equal=3)
    s.rewards[:] = 1.0
    s.greedy_rewards[:] = 1.0
    assert s.source_rewards is not None
    s.source_rewards[:] = 1.0
    for values in s.values:
        values[:] = 1.0
    row = ALGORITHMS[name]
    row = row.replace(reward_kl_coef=0.0, gamma=1.0)
    found, metrics = estimated(row, s, AdaptiveState(0.0, 1.0))
    assert torch.equal(found.advantages, torch.zeros(found.advantages.shape))
    if row.may_redraw:
        assert metrics["reward/degenerate_frac"] == 1.0


def test_the_share_of_groups_that_teach_nothing_is_told() -> None:
    _, metrics = estimated(ALGORITHMS["grpo"], sample(5, groups=4, equal=1))
    assert metrics["reward/degenerate_frac"] == 0.25
    for name in ("grpo_process", "gdpo", "pass_at_k", "pkpo"):
        _, metrics = estimated(ALGORITHMS[name].replace(pass_at_k=2), sample(5, groups=4, equal=1))
        assert metrics["reward/degenerate_frac"] == 0.25


def test_process_rewards_without_steps_are_refused_by_completion() -> None:
    made = replace(rollouts(sample(6)), step_rewards=None)
    with pytest.raises(RewardError, match="'grpo_process' .* completion 0 has one for the whole"):
        estimate(ALGORITHMS["grpo_process"], made, AdaptiveState(0.0))


def test_the_baseline_is_the_moving_average_of_earlier_steps() -> None:
    row, state, expected = ALGORITHMS["reinforce"], AdaptiveState(0.0), None
    for seed in range(4):
        s = sample(seed)
        mean = s.rewards.mean()
        expected = mean if expected is None else expected
        found, _ = estimated(row, s, state)
        compare(by_row(found, "advantages"), oracle.reinforce(s, 0.0, "k1", expected), "step")
        expected = 0.9 * expected + 0.1 * mean
        assert state.baseline == pytest.approx(expected)


def test_the_coefficient_in_the_reward_is_that_of_the_state() -> None:
    """Only the first one is the row's, where it adapts."""
    s, row = sample(7), with_kl("ppo", kl_target=0.1)
    found, _ = estimated(row, s, AdaptiveState(0.7))
    expected, _ = oracle.ppo(s, 0.7, "k1", row.gamma, row.gae_lambda)
    compare(by_row(found, "advantages"), expected, "advantages")


def test_the_weight_of_the_entropy_is_learned() -> None:
    """https://arxiv.org/abs/1812.05905 eq. 18: J(alpha) = E[-alpha (log pi + target)], here of log
    alpha, whose gradient is H - target. A step sees the weight before it.
    """
    target, rate, alpha = 1.5, 0.3, 0.4
    row = ALGORITHMS["reinforce"].replace(reward_entropy_coef=0.4)
    row = row.replace(reward_entropy_target=(target, rate))
    state, log_alpha = AdaptiveState(0.0, BASELINE, entropy_coef=alpha), np.log(alpha)
    for seed in range(3):
        s = replace(sample(seed), entropy_coef=np.exp(log_alpha))
        state.baseline = BASELINE
        found, metrics = estimated(row, s, state)
        expected = oracle.outcome(s, (0.0, "k1"), baseline="moving", earlier=BASELINE)
        compare(by_row(found, "advantages"), expected, "step")
        entropy = -np.concatenate(s.logprobs).mean()
        assert metrics["entropy/sampled"] == pytest.approx(entropy, rel=1e-5)
        assert metrics["entropy/coef"] == pytest.approx(np.exp(log_alpha), rel=1e-5)
        log_alpha -= rate * (entropy - target)
        assert state.entropy_coef == pytest.approx(np.exp(log_alpha), rel=1e-5)
    resumed = AdaptiveState(0.0, entropy_coef=0.4)
    resumed.load_state_dict(state.state_dict())
    assert resumed == replace(state, kl_coef=0.0)
    # one that learns anew begins with that of the config, and a fixed one stays
    resumed = AdaptiveState(0.0, entropy_coef=0.4)
    resumed.load_state_dict(AdaptiveState(0.0).state_dict())
    assert resumed.entropy_coef == 0.4
    fixed = AdaptiveState(0.0)
    fixed.load_state_dict(state.state_dict())
    assert fixed.entropy_coef is None


def test_an_entropy_above_its_target_lowers_the_weight_and_one_below_raises_it() -> None:
    row = ALGORITHMS["reinforce"].replace(reward_entropy_target=(0.5, 0.1))
    for entropy, sign in ((0.9, -1), (0.5, 0), (0.1, 1)):
        state = AdaptiveState(0.0, entropy_coef=1.0)
        state.learn_entropy_coef(row, entropy)
        assert state.entropy_coef is not None and np.sign(state.entropy_coef - 1) == sign


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(0.0, 0.98), (0.05, 0.98), (0.09, 0.99), (0.1, 1.0), (0.11, 1.01), (0.12, 1.02), (9.0, 1.02)],
)
def test_proportional_control(kl: float, factor: float) -> None:
    """https://arxiv.org/abs/1909.08593 section 2.2: e = clip(KL / target - 1, -0.2, 0.2), beta <-
    beta (1 + 0.1 e).
    """
    state = AdaptiveState(0.5)
    state.adapt(ALGORITHMS["ppo"].replace(kl_target=0.1), kl)
    assert state.kl_coef == pytest.approx(0.5 * factor)


@pytest.mark.parametrize(
    ("kl", "factor"), [(0.0, 0.5), (0.066, 0.5), (0.067, 1.0), (0.15, 1.0), (0.151, 2.0), (9, 2.0)]
)
def test_doubling_and_halving(kl: float, factor: float) -> None:
    """https://arxiv.org/abs/1707.06347 section 4: d < target / 1.5 halves beta, d > 1.5 target
    doubles it.
    """
    state = AdaptiveState(0.5)
    state.adapt(ALGORITHMS["ppo_kl"].replace(kl_target=0.1), kl)
    assert state.kl_coef == 0.5 * factor


def test_a_coefficient_without_a_target_is_fixed() -> None:
    state = AdaptiveState(0.5)
    state.adapt(ALGORITHMS["ppo"], 100.0)
    assert state.kl_coef == 0.5


def test_the_state_goes_round() -> None:
    state = AdaptiveState(0.5)
    estimated(ALGORITHMS["reinforce"], sample(8), state)
    state.adapt(ALGORITHMS["ppo_kl"], 100.0)
    again = AdaptiveState(0.1)
    again.load_state_dict(state.state_dict())
    assert again == state and again.kl_coef == 1.0 and again.baseline is not None
    # a fixed coefficient is the config's, also in a run that resumes
    fixed = AdaptiveState(0.1, adapts=False)
    fixed.load_state_dict(state.state_dict())
    assert (fixed.kl_coef, fixed.baseline) == (0.1, state.baseline)
    assert (
        estimated(ALGORITHMS["reinforce"], sample(9), again)[1]
        == (estimated(ALGORITHMS["reinforce"], sample(9), state)[1])
    )


def test_process_supervision_is_biased_where_the_policy_ends_the_steps() -> None:
    """As the row's caution says. Each step pays 0.5, and after it the policy goes on
    with probability p = sigmoid(theta), for 5 steps at most: the gradient in theta is known
    exactly, and the estimate is 0, as no step is above the mean of all.
    """
    generator = np.random.default_rng(0)
    p, pay, most, groups, size = 0.574, 0.5, 5, 4000, 8
    lengths = np.minimum(generator.geometric(1 - p, groups * size), most)
    exact = sum(
        p ** (n - 1)
        * (1.0 if n == most else 1 - p)
        * ((n - 1) * (1 - p) - (0.0 if n == most else p))
        * (pay * n)
        for n in range(1, most + 1)
    )
    offsets = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]))
    ends = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))
    total = int(lengths.sum())
    advantages = ops.process_advantages(
        torch.full((total,), pay),
        offsets,
        ends,
        total,
        size,
        cu_seqlens=offsets.int(),
        std="none",
    ).advantages.numpy()
    last = np.zeros(total, bool)
    last[offsets[1:].numpy() - 1] = True
    at_most = np.concatenate([np.arange(1, n + 1) for n in lengths]) == most
    score = np.where(at_most, 0.0, np.where(last, -p, 1 - p))  # d log pi of each decision
    estimated = (score * advantages).sum() / (groups * size)
    assert exact > 0.2 and abs(estimated) < 1e-6
    assert ALGORITHMS["grpo_process"].caution
