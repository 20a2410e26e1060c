"""Process supervision of GRPO in NumPy, from https://arxiv.org/abs/2402.03300 section 4.1.3: the
rewards R of all steps of all outputs of a question are normalised by mean(R) and std(R), and the
advantage of token t is the sum of the normalised rewards of the steps with index(j) >= t.
"""

import numpy as np


def process_advantages(
    rewards: list[list[list[float]]], ends: list[list[list[int]]], lengths: list[list[int]],
    correction: int, eps: float,
) -> list[np.ndarray]:  # fmt: skip
    """rewards[question][output][step], ends alike, lengths[question][output] -> advantages of the
    tokens of each output. `correction` and `eps` are ours: the paper leaves the std open.
    """
    result = []
    for outputs, output_ends, output_lengths in zip(rewards, ends, lengths, strict=True):
        collection = np.array([r for output in outputs for r in output])
        same = len(set(collection.tolist())) <= 1
        std = 0.0 if same else collection.std(ddof=correction)
        for output, index, length in zip(outputs, output_ends, output_lengths, strict=True):
            advantages = np.zeros(length)
            for t in range(length):
                for r, end in zip(output, index, strict=True):
                    if end >= t and not same:
                        advantages[t] += (r - collection.mean()) / (std + eps)
            result.append(advantages)
    return result
