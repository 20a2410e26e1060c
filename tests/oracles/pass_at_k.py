"""Advantages for the best of k in one group, over all of its subsets, in NumPy.

Pass@k Training, https://arxiv.org/abs/2508.10751 section 2.4: the reward of a subset is the largest
of its rewards, the advantage of a completion the mean of the standardised rewards of its subsets.
PKPO, https://arxiv.org/abs/2505.15201 eq. 33: the largest of k less that of the k - 1 others, added
up for the subsets with the completion, over the number of all subsets.
"""

from itertools import combinations
from math import comb

import numpy as np


def pass_at_k_training(rewards, k, eps):
    subsets = list(combinations(range(len(rewards)), k))
    best = np.array([rewards[list(subset)].max() for subset in subsets])
    standardised = (best - best.mean()) / (best.std() + eps)
    return [standardised[[i in subset for subset in subsets]].mean() for i in range(len(rewards))]


def binary_pass_at_k_training(rewards, k, eps):
    """The closed form for rewards of 0 and 1."""
    n, wrong = len(rewards), int((rewards == 0).sum())
    mean = 1 - comb(wrong, k) / comb(n, k)
    std = np.sqrt(mean * (1 - mean)) + eps
    of_wrong = 1 - mean - comb(max(wrong - 1, 0), k - 1) / comb(n - 1, k - 1)
    return np.where(rewards == 1, 1 - mean, of_wrong) / std


def pkpo(rewards, k):
    found = np.zeros(len(rewards))
    for subset in combinations(range(len(rewards)), k):
        for i in subset:
            others = [j for j in subset if j != i]
            found[i] += rewards[list(subset)].max() - rewards[others].max()
    return found / comb(len(rewards), k)
