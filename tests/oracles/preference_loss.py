"""Losses of preferences, pair by pair in float64, each as its paper writes it.

A completion is the list of the log probabilities of its tokens; (pi, ref) for policy and reference.
"""

import numpy as np


def sigmoid(x: float) -> float:
    return 1 / (1 + np.exp(-x))


def log_ratio(completion) -> float:
    pi, ref = completion
    return np.sum(pi) - np.sum(ref)


def mean_logprob(completion) -> float:
    return np.mean(completion[0])


def dpo(chosen, rejected, beta):
    """https://arxiv.org/abs/2305.18290 eq. 7."""
    return -np.log(sigmoid(beta * log_ratio(chosen) - beta * log_ratio(rejected)))


def conservative_dpo(chosen, rejected, beta, label_smoothing):
    """https://ericmitchell.ai/cdpo.pdf: a label is wrong with probability label_smoothing."""
    right, wrong = dpo(chosen, rejected, beta), dpo(rejected, chosen, beta)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def robust_dpo(chosen, rejected, beta, label_smoothing):
    """https://arxiv.org/abs/2403.00409: unbiased under labels that are wrong that often."""
    e = label_smoothing
    right, wrong = dpo(chosen, rejected, beta), dpo(rejected, chosen, beta)
    return ((1 - e) * right - e * wrong) / (1 - 2 * e)


def ipo(chosen, rejected, beta):
    """https://arxiv.org/abs/2310.12036 eq. 17, beta being its tau."""
    return (log_ratio(chosen) - log_ratio(rejected) - 1 / (2 * beta)) ** 2


def hinge(chosen, rejected, beta, margin):
    """https://arxiv.org/abs/2309.06657, the hinge loss of normalised likelihoods."""
    return max(0.0, margin - beta * (log_ratio(chosen) - log_ratio(rejected)))


def slic(chosen, rejected, beta, margin):
    """https://arxiv.org/abs/2305.10425, rank calibration: max(0, delta - log P(y+) + log P(y-))."""
    return max(0.0, margin - beta * (np.sum(chosen[0]) - np.sum(rejected[0])))


def simpo(chosen, rejected, beta, margin):
    """https://arxiv.org/abs/2405.14734 eq. 6."""
    return -np.log(sigmoid(beta * mean_logprob(chosen) - beta * mean_logprob(rejected) - margin))


def orpo(chosen, rejected, beta, nll_coef):
    """https://arxiv.org/abs/2403.07691 eq. 3 to 7, beta being its lambda."""

    def odds(completion) -> float:
        p = np.exp(mean_logprob(completion))
        return p / (1 - p)

    odds_ratio = odds(chosen) / odds(rejected)
    return -nll_coef * mean_logprob(chosen) - beta * np.log(sigmoid(np.log(odds_ratio)))


def dpo_nll(chosen, rejected, beta, nll_coef):
    """https://arxiv.org/abs/2404.19733 eq. 1, nll_coef being its alpha."""
    return dpo(chosen, rejected, beta) - nll_coef * np.sum(chosen[0]) / len(chosen[0])


def kto(completion, desirable, kl, beta, desirable_weight, undesirable_weight):
    """https://arxiv.org/abs/2402.01306 section 4.1: lambda_y - v(x, y)."""
    r = log_ratio(completion)
    if desirable:
        return desirable_weight - desirable_weight * sigmoid(beta * (r - kl))
    return undesirable_weight - undesirable_weight * sigmoid(beta * (kl - r))


def kto_reference_point(completions):
    """The same: max(0, mean over mismatched completions of log pi - log ref)."""
    return max(0.0, np.mean([log_ratio(completion) for completion in completions]))
