"""Advantages of a step's rollouts, by the estimator that the algorithm's row names.

In:  rewards, of completions or of their steps; logprobs of the policy and of the reference; values.
Out: one advantage for each token, and where there is a critic one return.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from warpo.engine.config.algorithm import Algorithm
from warpo.engine.errors import RewardError
from warpo.engine.learner.reward_scale import RewardMoments, scale
from warpo.engine.models.step_rollouts import StepRollouts
from warpo.engine.types import Metrics
from warpo.kernels import ops

# What the kernel calls the baselines of a group.
_OF_GROUP = {"group": "mean", "leave_one_out": "leave_one_out", "optimal": "length_weighted"}


@dataclass
class AdaptiveState:
    """State that an estimator carries from step to step.

    Attributes:
        kl_coef: weight of the KL, where it adapts.
        baseline: mean of the rewards of earlier steps, or their moving average; None before the
            first step.
        rewards_seen: number of these rewards.
        moments: of the rewards of all steps, where these are normalised by them.
        adapts: whether kl_coef is part of the state. A fixed kl_coef is always the config's.
        entropy_coef: weight alpha of the entropy in the reward, where it is learned; None: that of
            the row.
    """

    kl_coef: float
    baseline: float | None = None
    rewards_seen: int = 0
    moments: RewardMoments = field(default_factory=RewardMoments)
    adapts: bool = True
    entropy_coef: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "kl_coef": self.kl_coef,
            "baseline": self.baseline,
            "rewards_seen": self.rewards_seen,
            "moments": asdict(self.moments),
            "entropy_coef": self.entropy_coef,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.baseline = state["baseline"]
        self.rewards_seen = state["rewards_seen"]
        self.moments = RewardMoments(**state["moments"])
        if self.adapts:
            self.kl_coef = state["kl_coef"]
        learned = state.get("entropy_coef")
        if self.entropy_coef is not None and learned is not None:
            self.entropy_coef = learned

    def adapt(self, algorithm: Algorithm, kl: float) -> None:
        """Move kl_coef towards the one at which the KL is the target.

        doubling:      half of it below target / 1.5, twice above 1.5 target
        proportional:  times 1 + 0.1 clip(kl / target - 1, -0.2, 0.2)

        Args:
            kl: nats per token, of the step that is over.
        """
        if algorithm.kl_target is None:
            return
        excess = kl / algorithm.kl_target
        if algorithm.kl_rule == "doubling":
            self.kl_coef *= 0.5 if excess < 1 / 1.5 else 2.0 if excess > 1.5 else 1.0
        else:
            self.kl_coef *= 1 + 0.1 * min(max(excess - 1, -0.2), 0.2)

    def learn_entropy_coef(self, algorithm: Algorithm, entropy: float) -> None:
        """A gradient step on log alpha, with J(alpha) of https://arxiv.org/abs/1812.05905 eq. 18:

        J(log alpha) = log alpha (H - target),  log alpha <- log alpha - rate (H - target)

        Equation 18 has alpha instead of its logarithm: both gradients have one sign, and alpha
        stays above 0.

        Args:
            entropy: H, the mean of -logp of the sampled tokens, nats.
        """
        if self.entropy_coef is not None and algorithm.reward_entropy_target is not None:
            target, rate = algorithm.reward_entropy_target
            self.entropy_coef *= math.exp(-rate * (entropy - target))


class _Tokens(NamedTuple):
    """Inputs of an estimator: B rollouts, (B,), with their M trained tokens in one row, (M,).

    rewards are of whole completions. They stand at the last tokens, as terminal_rewards, (B,), or
    where a source scores steps at the ends of these, as step_rewards, (M,).
    """

    rollouts: StepRollouts
    group_size: int
    lengths: Tensor
    cu_seqlens: Tensor
    rewards: Tensor
    greedy_rewards: Tensor | None
    step_rewards: Tensor | None
    terminal_rewards: Tensor | None
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor | None


class Estimate(NamedTuple):
    """advantages and returns, (M,); how many groups teach nothing, all of one reward mostly."""

    advantages: Tensor
    returns: Tensor | None = None
    num_degenerate: Tensor | None = None


def estimate(algorithm: Algorithm, rollouts: StepRollouts, state: AdaptiveState) -> Metrics:
    """Fill the columns advantages, and returns where there is a critic; returns metrics.

    Args:
        rollouts: scored.

    Raises:
        RewardError: the estimator wants rewards of steps and a rollout has none.
    """
    tokens = _tokens(algorithm, rollouts, state)
    found = _ESTIMATORS[algorithm.advantages](algorithm, tokens, state)
    if algorithm.whiten:
        found = found._replace(advantages=ops.whiten(found.advantages))
    rollouts.advantages, rollouts.returns = found.advantages, found.returns
    metrics = {"advantages/std": found.advantages.std(correction=0).item()}
    if found.num_degenerate is not None:
        degenerate = found.num_degenerate.item() * tokens.group_size
        metrics["reward/degenerate_frac"] = degenerate / len(rollouts)
    if algorithm.kl_in_reward and algorithm.reward_kl_coef:
        metrics["kl/ref"] = (tokens.logprobs - tokens.ref_logprobs).mean().item()
    if state.entropy_coef is not None:
        entropy = -tokens.logprobs.mean().item()
        metrics |= {"entropy/sampled": entropy, "entropy/coef": state.entropy_coef}
        state.learn_entropy_coef(algorithm, entropy)
    return metrics


def _tokens(algorithm: Algorithm, rollouts: StepRollouts, state: AdaptiveState) -> _Tokens:
    old, ref = rollouts.old_logprobs, rollouts.ref_logprobs
    old = rollouts.sampler_logprobs if old is None else old
    rewards, greedy, state.moments = scale(algorithm, rollouts, state.moments)
    rewards = rewards.to(rollouts.device, torch.float32)
    steps = _at_their_tokens(rollouts)
    return _Tokens(
        rollouts=rollouts,
        group_size=rollouts.group_size,
        lengths=torch.from_numpy(rollouts.lengths).to(rollouts.device),
        cu_seqlens=rollouts.cu_seqlens,
        rewards=rewards,
        greedy_rewards=None if greedy is None else greedy.to(rewards),
        step_rewards=steps,
        terminal_rewards=rewards if steps is None else None,
        logprobs=old,
        ref_logprobs=old if ref is None else ref,
        values=rollouts.values,
    )


def _at_their_tokens(rollouts: StepRollouts) -> Tensor | None:
    if rollouts.step_rewards is None:
        return None
    starts = np.cumsum(rollouts.lengths) - rollouts.lengths
    rewards = np.zeros(int(rollouts.lengths.sum()), np.float32)
    for start, steps in zip(starts, rollouts.step_rewards, strict=True):
        for end, reward in steps:
            rewards[start + end] += reward
    return torch.from_numpy(rewards).to(rollouts.device)


def _per_token(advantages: Tensor, tokens: _Tokens) -> Tensor:
    return advantages.repeat_interleave(tokens.lengths)


def _causal(algorithm: Algorithm, tokens: _Tokens, state: AdaptiveState) -> Estimate:
    """The reward of each token, the last of which carries the baseline. Every optimizer step makes
    returns of them, with its own ratios.
    """
    shaped = _gae(algorithm, tokens, state, torch.zeros_like(tokens.logprobs), 1.0)
    assert shaped.rewards is not None
    rewards = shaped.advantages[tokens.cu_seqlens[:-1].long()]
    found = _less_baseline(algorithm, tokens, rewards, state)
    by_token = shaped.rewards.clone()
    by_token[tokens.cu_seqlens[1:].long() - 1] -= rewards - found.advantages
    return found._replace(advantages=by_token)


def _outcome(algorithm: Algorithm, tokens: _Tokens, state: AdaptiveState) -> Estimate:
    """Reward of the completion, or what is still to come of it, less the baseline."""
    kl = algorithm.kl_in_reward and algorithm.reward_kl_coef > 0
    shaped = kl or algorithm.gamma != 1 or algorithm.reward_entropy_coef > 0
    rewards = tokens.rewards
    if shaped or algorithm.reward_to_go:
        to_go = _gae(algorithm, tokens, state, torch.zeros_like(tokens.logprobs), 1.0).advantages
        rewards = to_go[tokens.cu_seqlens[:-1].long()]
    found = _less_baseline(algorithm, tokens, rewards, state)
    advantages = _per_token(found.advantages, tokens)
    if algorithm.reward_to_go:
        advantages = to_go - _per_token(rewards - found.advantages, tokens)
    if algorithm.rescaled:
        assert found.num_degenerate is not None
        groups = len(tokens.rollouts) // tokens.group_size
        advantages = advantages * (groups / (groups - found.num_degenerate).clamp(min=1))
    return found._replace(advantages=advantages)


def _less_baseline(
    algorithm: Algorithm, tokens: _Tokens, rewards: Tensor, state: AdaptiveState
) -> Estimate:
    """(B,): rewards of completions less algorithm.baseline, over the group's deviation."""
    if algorithm.subtracts.of_group:
        return _less_group(algorithm, tokens, rewards)
    if algorithm.subtracts.of_history:
        return Estimate(rewards - _earlier(algorithm, rewards, state))
    if algorithm.baseline == "batch":
        return Estimate(rewards - rewards.mean())
    if algorithm.baseline == "greedy":
        assert tokens.greedy_rewards is not None
        return Estimate(rewards - tokens.greedy_rewards)
    return Estimate(rewards)


def _less_group(algorithm: Algorithm, tokens: _Tokens, rewards: Tensor) -> Estimate:
    weighted = algorithm.baseline == "optimal"
    found = ops.group_advantages(
        rewards,
        tokens.group_size,
        std=algorithm.advantage_std,
        baseline=_OF_GROUP[algorithm.baseline],
        lengths=tokens.lengths if weighted else None,
    )
    return Estimate(found.advantages, None, found.num_degenerate)


def _earlier(algorithm: Algorithm, rewards: Tensor, state: AdaptiveState) -> float:
    """The baseline of earlier steps, in which these rewards count from here on."""
    mean = rewards.mean().item()
    baseline = mean if state.baseline is None else state.baseline
    seen = state.rewards_seen + len(rewards)
    decay = algorithm.baseline_decay
    kept = decay if algorithm.baseline == "moving" else state.rewards_seen / seen
    state.baseline, state.rewards_seen = kept * baseline + (1 - kept) * mean, seen
    return baseline


def _gae(
    algorithm: Algorithm, tokens: _Tokens, state: AdaptiveState, values: Tensor, gae_lambda: float
) -> ops.ShapedGae:
    return ops.shaped_gae(
        tokens.logprobs,
        tokens.ref_logprobs,
        values,
        gamma=algorithm.gamma,
        gae_lambda=gae_lambda,
        kl_coef=state.kl_coef if algorithm.kl_in_reward else 0.0,
        kl_estimator=algorithm.reward_kl_estimator,
        entropy_coef=_entropy_coef(algorithm, state),
        rewards=tokens.step_rewards,
        terminal_rewards=tokens.terminal_rewards,
        cu_seqlens=tokens.cu_seqlens,
        last_values=tokens.rollouts.last_values,
        return_rewards=algorithm.estimator.is_causal,
    )


def _entropy_coef(algorithm: Algorithm, state: AdaptiveState) -> float:
    learned = state.entropy_coef
    return algorithm.reward_entropy_coef if learned is None else learned


def _process(algorithm: Algorithm, tokens: _Tokens, state: AdaptiveState) -> Estimate:
    steps = tokens.rollouts.step_rewards
    if steps is None:
        raise RewardError(
            f"algorithm = {algorithm.name!r} learns from rewards of steps, and completion 0 has "
            "one for the whole: let reward.sources give steps"
        )
    flat = [step for of_one in steps for step in of_one]
    offsets = torch.tensor([0, *map(len, steps)]).cumsum(0)
    device = tokens.rewards.device
    found = ops.process_advantages(
        torch.tensor([reward for _, reward in flat], dtype=torch.float32, device=device),
        offsets.to(device),
        torch.tensor([end for end, _ in flat], dtype=torch.int64, device=device),
        tokens.logprobs.numel(),
        tokens.group_size,
        cu_seqlens=tokens.cu_seqlens,
        std=algorithm.advantage_std,
    )
    return Estimate(found.advantages, None, found.num_degenerate)


def _decoupled(algorithm: Algorithm, tokens: _Tokens, state: AdaptiveState) -> Estimate:
    rewards, weights = tokens.rollouts.source_rewards, tokens.rollouts.source_weights
    assert rewards is not None and weights is not None
    rewards = rewards.to(tokens.rewards)
    advantages = ops.decoupled_advantages(
        rewards,
        tokens.group_size,
        weights=weights.to(tokens.rewards),
        std=algorithm.advantage_std,
    )
    groups = rewards.view(-1, tokens.group_size, rewards.shape[1])
    degenerate = (groups == groups[:, :1]).all(2).all(1).sum()
    return Estimate(_per_token(advantages, tokens), None, degenerate)


def _best_of_k(algorithm: Algorithm, tokens: _Tokens, state: AdaptiveState) -> Estimate:
    advantages = ops.pass_at_k_advantages(
        tokens.rewards, tokens.group_size, k=algorithm.pass_at_k, method=algorithm.advantages
    )
    degenerate = (advantages.view(-1, tokens.group_size) == 0).all(1).sum()
    return Estimate(_per_token(advantages, tokens), None, degenerate)


def _critic(algorithm: Algorithm, tokens: _Tokens, state: AdaptiveState) -> Estimate:
    assert tokens.values is not None
    policy_lambda, value_lambda = algorithm.gae_lambda
    found = _gae(algorithm, tokens, state, tokens.values, value_lambda)
    advantages, returns = found.advantages, found.returns
    if isinstance(policy_lambda, str):
        alpha = float(policy_lambda.removeprefix("length:"))
        advantages = _length_adaptive(algorithm, tokens, state, alpha)
    elif policy_lambda != value_lambda:
        advantages = _gae(algorithm, tokens, state, tokens.values, policy_lambda).advantages
    return Estimate(advantages, returns)


def _length_adaptive(
    algorithm: Algorithm, tokens: _Tokens, state: AdaptiveState, alpha: float
) -> Tensor:
    """One scan for each length that occurs, since that has one lambda."""
    assert tokens.values is not None
    advantages = torch.empty_like(tokens.values)
    starts = tokens.cu_seqlens[:-1].long()
    steps, terminal = tokens.step_rewards, tokens.terminal_rewards
    last_values = tokens.rollouts.last_values
    for length in set(tokens.lengths.tolist()):
        mine = tokens.lengths == length
        index = starts[mine, None] + torch.arange(length, device=starts.device)
        advantages[index] = ops.shaped_gae(
            tokens.logprobs[index],
            tokens.ref_logprobs[index],
            tokens.values[index],
            gamma=algorithm.gamma,
            gae_lambda=max(0.0, 1 - 1 / (alpha * length)),
            kl_coef=state.kl_coef if algorithm.kl_in_reward else 0.0,
            kl_estimator=algorithm.reward_kl_estimator,
            entropy_coef=_entropy_coef(algorithm, state),
            rewards=None if steps is None else steps[index],
            terminal_rewards=None if terminal is None else terminal[mine],
            last_values=None if last_values is None else last_values[mine],
        ).advantages
    return advantages


def _pairs(algorithm: Algorithm, tokens: _Tokens, state: AdaptiveState) -> Estimate:
    """Pairs are made of rewards; this counts the groups that give none."""
    found = ops.group_advantages(tokens.rewards, tokens.group_size, std="none")
    return Estimate(_per_token(found.advantages, tokens), None, found.num_degenerate)


_ESTIMATORS: dict[str, Callable[[Algorithm, _Tokens, AdaptiveState], Estimate]] = {
    "outcome": _outcome,
    "causal": _causal,
    "process": _process,
    "decoupled": _decoupled,
    "pass_at_k_training": _best_of_k,
    "pkpo": _best_of_k,
    "gae": _critic,
    "pairs": _pairs,
}
