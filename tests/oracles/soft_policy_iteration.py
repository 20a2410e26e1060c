"""Soft policy iteration in a finite decision process, state by state: the operators of
https://arxiv.org/abs/1801.01290 eq. 2 to 4, with the temperature alpha (1 in the paper).

    T_pi Q(s, a) = r(s, a) + gamma sum over s' of p(s' | s, a) V(s')
    V(s)         = sum over a of pi(a | s) (Q(s, a) - alpha log pi(a | s))
    pi_new       = argmin over pi of KL(pi(s), exp(Q(s) / alpha) / Z(s)) = softmax(Q(s) / alpha)
"""

import numpy as np


def state_values(q: np.ndarray, policy: np.ndarray, alpha: float) -> np.ndarray:
    values = []
    for row, probs in zip(q, policy, strict=True):
        values.append(sum(p * (x - alpha * np.log(p)) for x, p in zip(row, probs, strict=True)))
    return np.array(values)


def backup(
    q: np.ndarray,
    policy: np.ndarray,
    rewards: np.ndarray,
    transitions: np.ndarray,
    *,
    alpha: float,
    gamma: float,
) -> np.ndarray:
    """T_pi Q, (S, A), of transitions p (S, A, S)."""
    return rewards + gamma * transitions @ state_values(q, policy, alpha)


def evaluate(
    policy: np.ndarray,
    rewards: np.ndarray,
    transitions: np.ndarray,
    *,
    alpha: float,
    gamma: float,
) -> np.ndarray:
    """The fixed point of T_pi, as the solution of linear equations in Q, (S, A)."""
    states, actions = rewards.shape
    entropy = -(policy * np.log(policy)).sum(1)
    # the probability of (s', a') after (s, a)
    after = (transitions[:, :, :, None] * policy[None, None]).reshape(states * actions, -1)
    constant = (rewards + gamma * alpha * transitions @ entropy).reshape(-1)
    return np.linalg.solve(np.eye(states * actions) - gamma * after, constant).reshape(
        states, actions
    )


def improve(q: np.ndarray, alpha: float) -> np.ndarray:
    weights = np.exp((q - q.max(1, keepdims=True)) / alpha)
    return weights / weights.sum(1, keepdims=True)


def optimum(
    rewards: np.ndarray, transitions: np.ndarray, *, alpha: float, gamma: float
) -> np.ndarray:
    """Q of the best policy, by iterating Q = r + gamma p alpha log sum exp(Q / alpha)."""
    q = np.zeros_like(rewards)
    for _ in range(2000):
        most = q.max(1, keepdims=True)
        values = most[:, 0] + alpha * np.log(np.exp((q - most) / alpha).sum(1))
        q = rewards + gamma * transitions @ values
    return q
