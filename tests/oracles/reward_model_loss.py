"""Losses of a reward model, pair by pair in float64, from the papers."""

import itertools

import numpy as np


def log_sigmoid(x: float) -> float:
    return -np.log1p(np.exp(-x)) if x > 0 else x - np.log1p(np.exp(x))


def sigmoid(x: float) -> float:
    return float(np.exp(log_sigmoid(x)))


def pairs(chosen, rejected, margins, centering_coef, denominator):
    """-log sigmoid(r_c - r_r - m), Llama 2, https://arxiv.org/abs/2307.09288 eq. 2, and the mean of
    c (r_c + r_r)^2, https://arxiv.org/abs/2312.09244. (loss, gradients).
    """
    loss, grad_chosen, grad_rejected = 0.0, [], []
    for c, r, m in zip(chosen, rejected, margins, strict=True):
        loss += (-log_sigmoid(c - r - m) + centering_coef * (c + r) ** 2) / denominator
        slope, pull = sigmoid(-(c - r - m)), 2 * centering_coef * (c + r)
        grad_chosen.append((pull - slope) / denominator)
        grad_rejected.append((pull + slope) / denominator)
    return loss, grad_chosen, grad_rejected


def rankings(groups, ranks, centering_coef, denominator):
    """InstructGPT, https://arxiv.org/abs/2203.02155 eq. 1: -1 / (K choose 2) times the sum over the
    pairs (w better than l) of log sigmoid(r_w - r_l). (loss, gradients of every group).
    """
    total, gradients = 0.0, []
    for scores, order in zip(groups, ranks, strict=True):
        size = len(scores)
        gradient = np.zeros(size)
        for i, j in itertools.combinations(range(size), 2):
            if order[i] == order[j]:
                continue
            w, worse = (i, j) if order[i] < order[j] else (j, i)
            weight = 1 / (size * (size - 1) / 2 * denominator)
            loss, (up,), (down,) = pairs([scores[w]], [scores[worse]], [0.0], centering_coef, 1.0)
            total += weight * loss
            gradient[w] += weight * up
            gradient[worse] += weight * down
        gradients.append(gradient)
    return total, gradients
