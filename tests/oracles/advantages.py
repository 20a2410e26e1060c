"""Advantages of the completions of a step in NumPy, completion by completion, from the papers.

Each function gives one array of tokens for each completion.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.oracles import pass_at_k
from tests.oracles.gae import gae
from tests.oracles.group_advantages import group_advantages
from tests.oracles.process_advantages import process_advantages
from tests.oracles.shaped_gae import KL
from tests.oracles.whiten import whiten

Tokens = list[np.ndarray]


@dataclass
class Sampled:
    """B completions; those of a prompt follow each other.

    by_steps: the rewards stand at the ends of their steps, instead of at the last token.
    entropy_coef: of the entropy in the reward.
    source_rewards: (B, K), what each source says, with the weights of source_weights.
    """

    rewards: np.ndarray
    group_size: int
    logprobs: Tokens
    ref_logprobs: Tokens
    values: Tokens
    steps: list[list[tuple[int, float]]]
    greedy_rewards: np.ndarray
    by_steps: bool = False
    entropy_coef: float = 0.0
    source_rewards: np.ndarray | None = None
    source_weights: np.ndarray | None = None

    @property
    def lengths(self) -> list[int]:
        return [len(tokens) for tokens in self.logprobs]

    @property
    def group_ids(self) -> np.ndarray:
        return np.arange(len(self.rewards)) // self.group_size

    def spread(self, advantages: np.ndarray) -> Tokens:
        """One number a completion, for each of its tokens."""
        return [np.full(n, a) for n, a in zip(self.lengths, advantages, strict=True)]


def shaped_rewards(s: Sampled, kl_coef: float, kl_estimator: str) -> Tokens:
    """https://arxiv.org/abs/2203.02155 eq. 2, token by token: less the KL of each token, and with
    the reward of the completion at the last one, or those of its steps at their ends. With an
    entropy_coef each token has the entropy bonus -log pi of the soft reward,
    https://arxiv.org/abs/1702.08165 eq. 1, by its sample.
    """
    shaped = []
    for i, (logp, ref) in enumerate(zip(s.logprobs, s.ref_logprobs, strict=True)):
        tokens = np.array([-kl_coef * KL[kl_estimator](d) for d in ref - logp])
        tokens = tokens - s.entropy_coef * logp
        for end, reward in s.steps[i] if s.by_steps else [(-1, s.rewards[i])]:
            tokens[end] += reward
        shaped.append(tokens)
    return shaped


def totals(s: Sampled, kl_coef: float, kl_estimator: str) -> np.ndarray:
    return np.array([tokens.sum() for tokens in shaped_rewards(s, kl_coef, kl_estimator)])


def normalised(parts: Tokens) -> Tokens:
    """Over all tokens of the batch."""
    together = np.concatenate(parts)
    found = whiten(together, np.ones(len(together), bool), True, 1e-8)
    return np.split(found, np.cumsum([len(part) for part in parts])[:-1])


def grpo(s: Sampled, std: str) -> Tokens:
    """https://arxiv.org/abs/2402.03300 section 4.1.2."""
    return s.spread(group_advantages(s.rewards, s.group_ids, std=std))


def gdpo(s: Sampled, std: str) -> Tokens:
    """https://arxiv.org/abs/2601.05242: each reward by itself in its group, eq. 4; their weighted
    sum, eq. 5 and 7; normalised over the completions of the batch, eq. 6.
    """
    total = np.zeros(len(s.rewards))
    for weight, column in zip(s.source_weights, s.source_rewards.T, strict=True):
        total += weight * group_advantages(column, s.group_ids, std=std)
    return s.spread((total - total.mean()) / (total.std(ddof=1) + 1e-6))


def best_of_k(s: Sampled, k: int, method: str) -> Tokens:
    """https://arxiv.org/abs/2508.10751 section 2.4 and https://arxiv.org/abs/2505.15201 eq. 33."""
    of_group = {
        "pass_at_k_training": lambda rewards: pass_at_k.pass_at_k_training(rewards, k, 1e-6),
        "pkpo": lambda rewards: pass_at_k.pkpo(rewards, k),
    }[method]
    groups = s.rewards.reshape(-1, s.group_size)
    return s.spread(np.concatenate([of_group(group) for group in groups]))


def gpg(s: Sampled) -> Tokens:
    """https://arxiv.org/abs/2504.02546: (r - mean) times B / (B - M), with M completions in groups
    whose rewards are all equal.
    """
    groups = s.rewards.reshape(-1, s.group_size)
    valid = sum(s.group_size for group in groups if len(set(group.tolist())) > 1)
    plain = group_advantages(s.rewards, s.group_ids, std="none")
    return s.spread(plain * len(s.rewards) / max(valid, 1))


def rloo(s: Sampled, kl_coef: float, kl_estimator: str) -> Tokens:
    """https://arxiv.org/abs/2402.14740 eq. 8, of the rewards of its section 2: R = r - beta KL."""
    rewards = totals(s, kl_coef, kl_estimator)
    advantages = np.zeros(len(rewards))
    for i, reward in enumerate(rewards):
        start = i // s.group_size * s.group_size
        others = [rewards[j] for j in range(start, start + s.group_size) if j != i]
        advantages[i] = reward - sum(others) / len(others)
    return s.spread(advantages)


def reinforce(s: Sampled, kl_coef: float, kl_estimator: str, baseline: float) -> Tokens:
    """https://doi.org/10.1007/BF00992696: (r - b) for every factor of the completion."""
    return s.spread(totals(s, kl_coef, kl_estimator) - baseline)


def remax(s: Sampled, kl_coef: float, kl_estimator: str) -> Tokens:
    """https://arxiv.org/abs/2310.10505 algorithm 1: baseline is the greedy reward."""
    return s.spread(totals(s, kl_coef, kl_estimator) - s.greedy_rewards)


def reinforce_plus_plus(s: Sampled, kl_coef: float, kl_estimator: str) -> Tokens:
    """https://arxiv.org/abs/2501.03262: A_t = r - beta sum_{i >= t} KL_i, normalised over the
    batch.
    """
    shaped = shaped_rewards(s, kl_coef, kl_estimator)
    return normalised([np.array([r[t:].sum() for t in range(len(r))]) for r in shaped])


def reinforce_plus_plus_baseline(s: Sampled) -> Tokens:
    """https://arxiv.org/abs/2501.03262: r - mean of the group, normalised over the batch."""
    groups = s.rewards.reshape(-1, s.group_size)
    return normalised(s.spread((groups - groups.mean(1, keepdims=True)).ravel()))


def outcome(
    s: Sampled,
    kl: tuple[float, str] = (0.0, "k1"),
    *,
    baseline: str,
    earlier: float = 0.0,
    gamma: float = 1.0,
    reward_to_go: bool = False,
    std: str = "none",
    whitened: bool = False,
) -> Tokens:
    """A_t = (Q_t - b) / std, with Q_t = sum_{u >= t} gamma^(u - t) r_u, or Q_0 for every token, and
    the baseline b of Q_0: REINFORCE, https://doi.org/10.1007/BF00992696; "optimal" with the
    lengths as weights, OPO, https://arxiv.org/abs/2505.23585.

    Args:
        earlier: the baseline of "history" and "moving".
    """
    to_go = [
        np.array([sum(gamma ** (u - t) * r[u] for u in range(t, len(r))) for t in range(len(r))])
        for r in shaped_rewards(s, *kl)
    ]
    wholes, size = [q[0] for q in to_go], s.group_size
    advantages = []
    for i, (q, whole) in enumerate(zip(to_go, wholes, strict=True)):
        members = range(i // size * size, (i // size + 1) * size)
        group = [wholes[j] for j in members]
        lengths = [s.lengths[j] for j in members]
        b = {
            "none": lambda: 0.0,
            "history": lambda: earlier,
            "moving": lambda: earlier,
            "batch": lambda: sum(wholes) / len(wholes),
            "group": lambda group=group: sum(group) / size,
            "leave_one_out": lambda group=group, own=whole: (sum(group) - own) / (size - 1),
            "optimal": lambda group=group, n=lengths: np.dot(n, group) / sum(n),
            "greedy": lambda i=i: s.greedy_rewards[i],
        }[baseline]()
        spread = 1.0
        if std != "none":
            spread = np.std(group, ddof={"sample": 1, "population": 0}[std]) + 1e-6
        advantages.append(((q if reward_to_go else np.full(len(q), whole)) - b) / spread)
    return normalised(advantages) if whitened else advantages


def causal(s: Sampled, kl_coef: float, kl_estimator: str, baseline: float) -> Tokens:
    """The rewards of the tokens, the last of which carries the baseline."""
    shaped = shaped_rewards(s, kl_coef, kl_estimator)
    for tokens in shaped:
        tokens[-1] -= baseline
    return shaped


def process(s: Sampled, std: str) -> Tokens:
    """https://arxiv.org/abs/2402.03300 section 4.1.3."""
    size = s.group_size

    def grouped(parts: list) -> list:
        return [parts[i : i + size] for i in range(0, len(parts), size)]

    return process_advantages(
        grouped([[reward for _, reward in steps] for steps in s.steps]),
        grouped([[end for end, _ in steps] for steps in s.steps]),
        grouped(s.lengths), {"sample": 1, "population": 0}[std], 1e-6,
    )  # fmt: skip


def ppo(
    s: Sampled,
    kl_coef: float,
    kl_estimator: str,
    gamma: float,
    gae_lambda: tuple[float | str, float],
    *,
    whitened: bool = True,
) -> tuple[Tokens, Tokens]:
    """Advantages and returns. GAE, https://arxiv.org/abs/1506.02438 eq. 16, of the shaped rewards,
    normalised over the batch if `whitened`; decoupled and length-adaptive lambda of
    https://arxiv.org/abs/2504.05118: 1 - 1 / (alpha l), as length:alpha.
    """
    advantages, returns = [], []
    shaped = shaped_rewards(s, kl_coef, kl_estimator)
    for rewards, values in zip(shaped, s.values, strict=True):
        policy_lambda, value_lambda = gae_lambda
        if isinstance(policy_lambda, str):
            alpha = float(policy_lambda.removeprefix("length:"))
            # below 1 / alpha tokens the formula leaves [0, 1]
            policy_lambda = max(0.0, 1 - 1 / (alpha * len(rewards)))
        advantages.append(gae(rewards, values, gamma=gamma, gae_lambda=policy_lambda)[0])
        returns.append(gae(rewards, values, gamma=gamma, gae_lambda=value_lambda)[1])
    return (normalised(advantages) if whitened else advantages), returns
