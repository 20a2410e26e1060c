"""The loss of each paper in NumPy, completion by completion and token by token, as the paper writes
it.

Every function takes the completions to a batch of prompts and returns the loss to be minimised.
Where a paper stops a gradient, the function reads `Completion.frozen` in place of
`Completion.logp`, so that the gradient is the derivative of the oracle in logp.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Completion:
    """Logprobs of the tokens of one completion; advantages one per token."""

    logp: np.ndarray
    frozen: np.ndarray
    old: np.ndarray
    ref: np.ndarray
    sampler: np.ndarray
    advantages: np.ndarray

    def __len__(self) -> int:
        return len(self.logp)


Completions = Sequence[Completion]
CONSTANT_LENGTH = 16  # of Dr. GRPO


def gradient(oracle: Callable[[Completions], float], completions: Completions) -> list[np.ndarray]:
    """Central differences of the oracle in the logprob of each token."""
    step = 1e-6
    result = []
    for i, completion in enumerate(completions):
        slopes = np.zeros(len(completion))
        for t in range(len(completion)):
            values = []
            for sign in (1, -1):
                logp = completion.logp.copy()
                logp[t] += sign * step
                moved = replace(completion, logp=logp)
                values.append(oracle([*completions[:i], moved, *completions[i + 1 :]]))
            slopes[t] = (values[0] - values[1]) / (2 * step)
        result.append(slopes)
    return result


def ratios(completion: Completion) -> np.ndarray:
    return np.exp(completion.logp - completion.old)


def mean_over_tokens(completions: Completions, terms: Callable[[Completion], np.ndarray]) -> float:
    """1 / (tokens of all completions) sum of the terms."""
    return sum(terms(a).sum() for a in completions) / sum(len(a) for a in completions)


def mean_over_completions(completions: Completions, value: Callable[[Completion], float]) -> float:
    return sum(value(a) for a in completions) / len(completions)


def reinforce(completions: Completions) -> float:
    """Williams 1992, theorem 1; with other advantages RLOO, https://arxiv.org/abs/2402.14740, and
    ReMax, https://arxiv.org/abs/2310.10505.
    """
    return -mean_over_completions(completions, lambda a: (a.advantages * a.logp).sum())


def gpg(completions: Completions) -> float:
    """https://arxiv.org/abs/2504.02546: mean over all tokens."""
    return -mean_over_tokens(completions, lambda a: a.advantages * a.logp)


def clipped(completion: Completion, low: float, high: float) -> np.ndarray:
    """PPO, https://arxiv.org/abs/1707.06347 eq. 7, of each token."""
    terms = []
    for ratio, advantage in zip(ratios(completion), completion.advantages, strict=True):
        inside = min(max(ratio, low), high)
        terms.append(min(ratio * advantage, inside * advantage))
    return np.array(terms)


def reinforce_plus_plus(completions: Completions) -> float:
    """https://arxiv.org/abs/2501.03262."""
    return -mean_over_completions(completions, lambda a: clipped(a, 0.8, 1.2).mean())


def reinforce_plus_plus_baseline(completions: Completions) -> float:
    """The same with the k2 estimator in the loss."""
    kl = mean_over_completions(completions, lambda a: (0.5 * (a.logp - a.ref) ** 2).mean())
    return reinforce_plus_plus(completions) + 1e-3 * kl


def ppo(completions: Completions) -> float:
    return -mean_over_tokens(completions, lambda a: clipped(a, 0.8, 1.2))


def ppo_dual_clip(completions: Completions) -> float:
    """https://arxiv.org/abs/1912.09729 eq. 8 with c = 3."""

    def terms(a: Completion) -> np.ndarray:
        both = zip(clipped(a, 0.8, 1.2), a.advantages, strict=True)
        return np.array([max(x, 3 * advantage) if advantage < 0 else x for x, advantage in both])

    return -mean_over_tokens(completions, terms)


def ppo_kl(completions: Completions) -> float:
    """https://arxiv.org/abs/1707.06347 eq. 8 with beta = 1; KL(reference || policy), of which the
    tokens are samples, is estimated by k3 with r = pi / reference: (r - 1) - log r.
    """

    def terms(a: Completion) -> np.ndarray:
        quotient = np.exp(a.logp - a.ref)
        return ratios(a) * a.advantages - ((quotient - 1) - np.log(quotient))

    return -mean_over_tokens(completions, terms)


def grpo_terms(completion: Completion) -> np.ndarray:
    """https://arxiv.org/abs/2402.03300 eq. 3 and 4: what is averaged."""
    quotient = np.exp(completion.ref - completion.logp)
    return clipped(completion, 0.8, 1.2) - 0.04 * (quotient - np.log(quotient) - 1)


def grpo(completions: Completions) -> float:
    return -mean_over_completions(completions, lambda a: grpo_terms(a).mean())


def grpo_response(completions: Completions) -> float:
    """https://arxiv.org/abs/2501.12948 eq. 1 and 2: probabilities of completions."""

    def value(a: Completion) -> float:
        pi, old, ref = (np.prod(np.exp(x)) for x in (a.logp, a.old, a.ref))
        ratio, advantage = pi / old, a.advantages[0]
        surrogate = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
        return surrogate - 0.04 * (ref / pi - np.log(ref / pi) - 1)

    return -mean_over_completions(completions, value)


def dr_grpo(completions: Completions) -> float:
    """https://arxiv.org/abs/2503.20783 section 3.2: a constant instead of the length."""
    return -mean_over_completions(
        completions, lambda a: clipped(a, 0.8, 1.2).sum() / CONSTANT_LENGTH
    )


def dapo(completions: Completions) -> float:
    """https://arxiv.org/abs/2503.14476 eq. 8."""
    return -mean_over_tokens(completions, lambda a: clipped(a, 0.8, 1.28))


def gspo(completions: Completions) -> float:
    """https://arxiv.org/abs/2507.18071 eq. 5 to 7; an advantage a completion."""

    def value(a: Completion) -> float:
        s = np.prod(ratios(a)) ** (1 / len(a))
        advantage = a.advantages[0]
        return min(s * advantage, min(max(s, 1 - 3e-4), 1 + 4e-4) * advantage)

    return -mean_over_completions(completions, value)


def luspo(completions: Completions) -> float:
    """https://arxiv.org/abs/2602.05261: GSPO, each completion times its length."""

    def value(a: Completion) -> float:
        s = np.prod(ratios(a)) ** (1 / len(a))
        advantage = a.advantages[0]
        return len(a) * min(s * advantage, min(max(s, 1 - 3e-4), 1 + 4e-4) * advantage)

    return -mean_over_completions(completions, value)


def dppo(
    completions: Completions, divergence: Callable[[float, float], float], most: float
) -> float:
    """https://arxiv.org/abs/2602.04879 eq. 11 and 12: mean over tokens of M r A."""

    def terms(a: Completion) -> np.ndarray:
        values = ratios(a) * a.advantages
        for t in range(len(a)):
            p, old = np.exp(a.frozen[t]), np.exp(a.old[t])
            away = (a.advantages[t] > 0 and p > old) or (a.advantages[t] < 0 and p < old)
            if away and divergence(old, p) > most:
                values[t] = 0
        return values

    return -mean_over_tokens(completions, terms)


def dppo_tv(completions: Completions) -> float:
    """Eq. 13: |p - q|."""
    return dppo(completions, lambda q, p: abs(p - q), 0.2)


def dppo_kl(completions: Completions) -> float:
    """Eq. 14: between Bernoulli distributions."""
    return dppo(
        completions, lambda q, p: q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p)), 0.05
    )


def vespo(completions: Completions) -> float:
    """https://arxiv.org/abs/2602.10693: phi(W) = W^k exp(lambda (1 - W)) weighs A grad log pi of
    the tokens, W being the ratio of the completion.
    """

    def terms(a: Completion) -> np.ndarray:
        w = np.prod(np.exp(a.frozen - a.old))
        k, rate = (2, 3) if a.advantages[0] >= 0 else (3, 2)
        return w**k * np.exp(rate * (1 - w)) * a.advantages * a.logp

    return -mean_over_tokens(completions, terms)


def cispo(completions: Completions) -> float:
    """https://arxiv.org/abs/2506.13585 eq. 4 and 5 without a lower bound."""

    def terms(a: Completion) -> np.ndarray:
        weight = np.minimum(np.exp(a.frozen - a.old), 1.28)
        return weight * a.advantages * a.logp

    return -mean_over_tokens(completions, terms)


def gmpo(completions: Completions) -> float:
    """https://arxiv.org/abs/2507.20673 eq. 4; an advantage a completion."""

    def value(a: Completion) -> float:
        sign = np.sign(a.advantages[0])
        product = 1.0
        for ratio in ratios(a):
            signed = ratio**sign
            product *= min(signed, min(max(signed, np.exp(-0.4)), np.exp(0.4))) ** sign
        return product ** (1 / len(a)) * a.advantages[0]

    return -mean_over_completions(completions, value)


def sapo(completions: Completions) -> float:
    """https://arxiv.org/abs/2511.20347 with temperatures 1 and 1.05."""

    def value(a: Completion) -> float:
        tau = np.where(a.advantages > 0, 1.0, 1.05)
        gate = 4 / tau / (1 + np.exp(-tau * (ratios(a) - 1)))
        return (gate * a.advantages).mean()

    return -mean_over_completions(completions, value)


def off_policy_trajectory(completions: Completions) -> float:
    """grad J = E (prod_t pi(a_t) / old(a_t)) (sum_t grad log pi(a_t)) A."""

    def value(a: Completion) -> float:
        weight = np.prod(np.exp(a.frozen - a.old))
        return weight * (a.logp * a.advantages).sum()

    return -mean_over_completions(completions, value)


def off_policy_prefix(completions: Completions) -> float:
    """grad J = E sum_t grad log pi(a_t) (prod_{u <= t} pi(a_u) / old(a_u)) A_t."""

    def value(a: Completion) -> float:
        total, weight = 0.0, 1.0
        for t in range(len(a)):
            weight *= np.exp(a.frozen[t] - a.old[t])
            total += weight * a.advantages[t] * a.logp[t]
        return total

    return -mean_over_completions(completions, value)


def off_policy_first_order(completions: Completions) -> float:
    """grad J = E sum_t (pi(a_t) / old(a_t)) grad log pi(a_t) A_t: that of the ratio itself."""

    def value(a: Completion) -> float:
        weight = np.exp(a.frozen - a.old)
        # the first term has the value, the second the gradient
        return (weight * a.advantages + weight * a.advantages * (a.logp - a.frozen)).sum()

    return -mean_over_completions(completions, value)


def corrected_grpo(completions: Completions, weigh: Callable[[Completion], np.ndarray]) -> float:
    """GRPO, with the surrogates but not the KL weighed by a function of old / sampler."""

    def value(a: Completion) -> float:
        surrogate = clipped(a, 0.8, 1.2)
        return (grpo_terms(a) + (weigh(a) - 1) * surrogate).mean()

    return -mean_over_completions(completions, value)


def grpo_tis(completions: Completions) -> float:
    """https://fengyao.notion.site/off-policy-rl: min(old / sampler, 2)."""
    return corrected_grpo(completions, lambda a: np.minimum(np.exp(a.old - a.sampler), 2.0))


def grpo_mis(completions: Completions) -> float:
    """https://richardli.xyz/rl-collapse: the ratio of the whole completion, 0 above 2."""

    def weigh(a: Completion) -> np.ndarray:
        weight = np.prod(np.exp(a.old - a.sampler))
        return np.full(len(a), weight if weight <= 2 else 0.0)

    return corrected_grpo(completions, weigh)


def grpo_icepop(completions: Completions) -> float:
    """https://arxiv.org/abs/2510.18855: old / sampler where it lies in [0.5, 5], else 0."""

    def weigh(a: Completion) -> np.ndarray:
        weight = np.exp(a.old - a.sampler)
        return np.where((weight >= 0.5) & (weight <= 5), weight, 0.0)

    return corrected_grpo(completions, weigh)


ORACLES: dict[str, Callable[[Completions], float]] = {
    "reinforce": reinforce,
    "rloo": reinforce,
    "remax": reinforce,
    "gpg": gpg,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "ppo": ppo,
    "ppo_dual_clip": ppo_dual_clip,
    "ppo_kl": ppo_kl,
    "grpo": grpo,
    "grpo_response": grpo_response,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "luspo": luspo,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
    "vespo": vespo,
    "cispo": cispo,
    "gmpo": gmpo,
    "sapo": sapo,
    "off_policy_trajectory": off_policy_trajectory,
    "off_policy_prefix": off_policy_prefix,
    "off_policy_causal": off_policy_prefix,
    "off_policy_first_order": off_policy_first_order,
    "grpo_tis": grpo_tis,
    "grpo_mis": grpo_mis,
    "grpo_icepop": grpo_icepop,
}
