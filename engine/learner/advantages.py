"""Advantages of a step's rollouts, by the estimator that the algorithm's row names.

In:  rewards, of completions or of their steps; logprobs of the policy and of the reference; values.
Out: one advantage for each token, and where there is a critic one return.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpo.engine.config.algorithm import Algorithm
from warpo.engine.errors import RewardError
from warpo.engine.models.step_rollouts import StepRollouts
from warpo.engine.types import Metrics
from warpo.kernels import ops

# Share of the old baseline in the new one, of "moving average".
BASELINE_DECAY = 0.9


@dataclass
class AdaptiveState:
    """State that an estimator carries from step to step.

    Attributes:
        kl_coef: weight of the KL, where it adapts.
        baseline: moving average of the rewards; None before the first step.
        adapts: whether kl_coef is part of the state. A fixed kl_coef is always the config's.
    """

    kl_coef: float
    baseline: float | None = None
    adapts: bool = True

    def state_dict(self) -> dict[str, Any]:
        return {"kl_coef": self.kl_coef, "baseline": self.baseline}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.baseline = state["baseline"]
        if self.adapts:
            self.kl_coef = state["kl_coef"]

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


class _Tokens(NamedTuple):
    """Inputs of an estimator: B rollouts, (B,), with their M trained tokens in one row, (M,)."""

    rollouts: StepRollouts
    group_size: int
    lengths: Tensor
    cu_seqlens: Tensor
    rewards: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor | None


class Estimate(NamedTuple):
    """advantages and returns, (M,); how many groups have one reward for all."""

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
    tokens = _tokens(rollouts)
    found = _ESTIMATORS[algorithm.advantages](algorithm, tokens, state)
    rollouts.advantages, rollouts.returns = found.advantages, found.returns
    metrics = {"advantages/std": found.advantages.std(correction=0).item()}
    if found.num_degenerate is not None:
        degenerate = found.num_degenerate.item() * tokens.group_size
        metrics["reward/degenerate_frac"] = degenerate / len(rollouts)
    if algorithm.kl_in_reward and algorithm.reward_kl_coef:
        metrics["kl/ref"] = (tokens.logprobs - tokens.ref_logprobs).mean().item()
    return metrics


def _tokens(rollouts: StepRollouts) -> _Tokens:
    old, ref = rollouts.old_logprobs, rollouts.ref_logprobs
    old = rollouts.sampler_logprobs if old is None else old
    return _Tokens(
        rollouts,
        rollouts.group_size,
        torch.from_numpy(rollouts.lengths).to(rollouts.device),
        rollouts.cu_seqlens,
        rollouts.rewards.to(rollouts.device, torch.float32),
        old,
        old if ref is None else ref,
        rollouts.values,
    )


def _per_token(advantages: Tensor, tokens: _Tokens) -> Tensor:
    return advantages.repeat_interleave(tokens.lengths)


def _shaped_rewards(algorithm: Algorithm, tokens: _Tokens, state: AdaptiveState) -> Tensor:
    """(B,): the reward of each completion less kl_coef times its KL, summed over its tokens."""
    if not algorithm.reward_kl_coef:
        return tokens.rewards
    return _reward_to_go(algorithm, tokens, state)[tokens.cu_seqlens[:-1].long()]


def _reward_to_go(algorithm: Algorithm, tokens: _Tokens, state: AdaptiveState) -> Tensor:
    """(M,): what is still to come of the KL-shaped reward, undiscounted."""
    return _gae(algorithm, tokens, state, torch.zeros_like(tokens.logprobs), 1.0).advantages


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
        terminal_rewards=tokens.rewards,
        cu_seqlens=tokens.cu_seqlens,
    )


def _group(algorithm: Algorithm, tokens: _Tokens, state: AdaptiveState) -> Estimate:
    found = ops.group_advantages(tokens.rewards, tokens.group_size, std=algorithm.advantage_std)
    return Estimate(_per_token(found.advantages, tokens), None, found.num_degenerate)


def _rescaled_group(algorithm: Algorithm, tokens: _Tokens, state: AdaptiveState) -> Estimate:
    """A group of one reward has no gradient; the others make up for it."""
    found = _group(algorithm, tokens, state)
    assert found.num_degenerate is not None
    groups = len(tokens.rollouts) // tokens.group_size
    scale = groups / (groups - found.num_degenerate).clamp(min=1)
    return found._replace(advantages=found.advantages * scale)


def _leave_one_out(algorithm: Algorithm, tokens: _Tokens, state: AdaptiveState) -> Estimate:
    rewards = _shaped_rewards(algorithm, tokens, state)
    found = ops.group_advantages(rewards, tokens.group_size, std="none", baseline="leave_one_out")
    return Estimate(_per_token(found.advantages, tokens), None, found.num_degenerate)


def _moving_average(algorithm: Algorithm, tokens: _Tokens, state: AdaptiveState) -> Estimate:
    rewards = _shaped_rewards(algorithm, tokens, state)
    mean = rewards.mean().item()
    baseline = mean if state.baseline is None else state.baseline
    state.baseline = BASELINE_DECAY * baseline + (1 - BASELINE_DECAY) * mean
    return Estimate(_per_token(rewards - baseline, tokens))


def _greedy(algorithm: Algorithm, tokens: _Tokens, state: AdaptiveState) -> Estimate:
    assert tokens.rollouts.baseline_rewards is not None
    rewards = _shaped_rewards(algorithm, tokens, state)
    baselines = tokens.rollouts.baseline_rewards.to(rewards.device, torch.float32)
    return Estimate(_per_token(rewards - baselines, tokens))


def _batch(algorithm: Algorithm, tokens: _Tokens, state: AdaptiveState) -> Estimate:
    return Estimate(ops.whiten(_reward_to_go(algorithm, tokens, state)))


def _group_batch(algorithm: Algorithm, tokens: _Tokens, state: AdaptiveState) -> Estimate:
    found = _group(algorithm, tokens, state)
    return found._replace(advantages=ops.whiten(found.advantages))


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
    return Estimate(ops.whiten(advantages), returns)


def _length_adaptive(
    algorithm: Algorithm, tokens: _Tokens, state: AdaptiveState, alpha: float
) -> Tensor:
    """One scan for each length that occurs, since that has one lambda."""
    assert tokens.values is not None
    advantages = torch.empty_like(tokens.values)
    starts = tokens.cu_seqlens[:-1].long()
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
            terminal_rewards=tokens.rewards[mine],
        ).advantages
    return advantages


_ESTIMATORS: dict[str, Callable[[Algorithm, _Tokens, AdaptiveState], Estimate]] = {
    "group": _group,
    "rescaled group": _rescaled_group,
    "leave one out": _leave_one_out,
    "moving average": _moving_average,
    "greedy": _greedy,
    "batch": _batch,
    "group, batch": _group_batch,
    "process": _process,
    "gae": _critic,
    # Pairs are made of rewards; this counts the groups that give none.
    "pairs": _group,
}
