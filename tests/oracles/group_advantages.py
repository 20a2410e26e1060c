"""Advantages relative to a group of completions, in NumPy.

GRPO: A_i = (r_i - mean(r)) / std(r), https://arxiv.org/abs/2402.03300 section 4.1.2; Dr. GRPO
leaves the std out, https://arxiv.org/abs/2503.20783; RLOO: the baseline of a completion is the mean
of the others, https://arxiv.org/abs/2402.14740 eq. 8; OPO: it is the mean weighted with the
lengths, https://arxiv.org/abs/2505.23585 section 3.
"""

import numpy as np


def group_advantages(rewards, group_ids, *, std="sample", baseline="mean", lengths=None, eps=1e-6):
    """One advantage a completion. A group whose rewards are all equal has none."""
    advantages = np.zeros(len(rewards))
    for i, (reward, group) in enumerate(zip(rewards, group_ids, strict=True)):
        members = rewards[group_ids == group]
        if np.all(members == members[0]):
            continue
        others = np.delete(rewards, i)[np.delete(group_ids, i) == group]
        if baseline == "length_weighted":
            weights = lengths[group_ids == group]
            expected = (weights * members).sum() / weights.sum()
        else:
            expected = (others if baseline == "leave_one_out" else members).mean()
        scale = 1.0 if std == "none" else members.std(ddof=1 if std == "sample" else 0) + eps
        advantages[i] = (reward - expected) / scale
    return advantages


def leave_one_out_std(rewards: np.ndarray, leave_one_out_mean: bool) -> list[float]:
    """r less the mean of the group or of the others, over the sample std of the others; not
    divided where that is 0 or there is one other.
    """
    advantages = []
    for i, reward in enumerate(rewards):
        others = np.delete(rewards, i)
        centred = reward - (others if leave_one_out_mean else rewards).mean()
        equal = len(others) < 2 or (others == others[0]).all()
        advantages.append(centred if equal else centred / (others.std(ddof=1) + 1e-6))
    return advantages
