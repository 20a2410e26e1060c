"""Returns and advantages: reverse scans over the steps."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from warpo.bench import peers
from warpo.bench.operation import Inputs, Operation, Provider, Sizes, Work, first_rows
from warpo.kernels import ops, reference

GAMMA, LAMBDA = 0.99, 0.95
STEPS = 8  # of n_step_advantages
_SIZES: dict[str, Any] = {
    "sizes": ("sequences", "steps"),
    "tiny": {"sequences": 2, "steps": 4},
    "part": first_rows(4),
    # the loop over steps unrolls into a graph of thousands of operations
    "compiles": False,
}


def tokens(device: str, dtype: torch.dtype, sizes: Sizes) -> Inputs:
    """Rewards, values, logprobs of two policies, and a mask of four fifths of the tokens."""
    shape = (sizes["sequences"], sizes["steps"])
    old = -torch.rand(shape, device=device)
    return {
        "rewards": torch.randn(shape, device=device),
        "values": torch.randn(shape, device=device),
        "logprobs": old + 0.1 * torch.randn(shape, device=device),
        "old_logprobs": old,
        "terminal_rewards": torch.randn(shape[0], device=device),
        "mask": torch.rand(shape, device=device) < 0.8,
    }


def environments(device: str, dtype: torch.dtype, sizes: Sizes) -> Inputs:
    """The same with a termination in a hundred steps in place of the mask. PufferLib has the reward
    and the end of a step beside the value after it, so with one more column.
    """
    inputs = tokens(device, dtype, sizes)
    ends = torch.rand(inputs.pop("mask").shape, device=device) < 0.01
    late = {"late_rewards": pad(inputs["rewards"], (1, 0)), "late_ends": pad(ends.float(), (1, 0))}
    return inputs | {"terminated": ends, "longer_values": pad(inputs["values"], (0, 1)), **late}


def _moves(read: int, written: int) -> Callable[[Sizes, int, str], Work]:
    """Bytes of each step that are read and written once."""

    def work(sizes: Sizes, itemsize: int, mode: str) -> Work:
        steps = sizes["sequences"] * sizes["steps"]
        return Work(read=steps * read, written=steps * written)

    return work


def _loop(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """GAE of the valid tokens as one writes it: backwards, a column at a time."""
    rewards, values, mask = inputs["rewards"], inputs["values"], inputs["mask"]
    trace = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(trace)
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        valid = mask[:, t]
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        trace = torch.where(valid, delta + GAMMA * LAMBDA * trace, trace)
        next_value = torch.where(valid, values[:, t], next_value)
        advantages[:, t] = trace
    return torch.where(mask, advantages, 0.0), torch.where(mask, advantages + values, 0.0)


def _returns_loop(inputs: Inputs) -> Tensor:
    rewards, mask = inputs["rewards"], inputs["mask"]
    running = torch.zeros_like(rewards[:, 0])
    returns = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        running = torch.where(mask[:, t], rewards[:, t] + GAMMA * running, running)
        returns[:, t] = running
    return torch.where(mask, returns, 0.0)


def _verl() -> Callable:
    function = peers.load("verl.trainer.ppo.core_algos", "compute_gae_advantage_return")
    return lambda inputs: function(
        inputs["rewards"], inputs["values"], inputs["mask"].float(), GAMMA, LAMBDA
    )


def _whitened(inputs: Inputs) -> list[Tensor]:
    advantages, returns = reference.gae(
        inputs["rewards"], inputs["values"], GAMMA, LAMBDA, mask=inputs["mask"]
    )
    return [reference.whiten(advantages, inputs["mask"]), returns]


@functools.cache
def _numba() -> Callable:
    """The loop over steps in machine code, on one core."""

    def loop(rewards, values, mask, gamma, decay, advantages, returns):  # type: ignore
        for b in range(rewards.shape[0]):
            trace, next_value = 0.0, 0.0
            for t in range(rewards.shape[1] - 1, -1, -1):
                if not mask[b, t]:
                    advantages[b, t], returns[b, t] = 0.0, 0.0
                    continue
                value = values[b, t]
                trace = rewards[b, t] + gamma * next_value - value + decay * trace
                next_value = value
                advantages[b, t] = trace
                returns[b, t] = trace + value

    compiled = peers.load("numba", "njit")(loop)

    def call(inputs: Inputs) -> tuple[Tensor, Tensor]:
        advantages, returns = (torch.empty_like(inputs["values"]) for _ in range(2))
        arrays = (inputs[name].numpy() for name in ("rewards", "values", "mask"))
        compiled(*arrays, GAMMA, GAMMA * LAMBDA, advantages.numpy(), returns.numpy())
        return advantages, returns

    return call


def _torchrl() -> Callable:
    function = peers.load(
        "torchrl.objectives.value.functional", "vec_generalized_advantage_estimate"
    )

    def call(inputs: Inputs) -> Any:
        values = inputs["values"][..., None]
        ends = inputs["terminated"][..., None]
        following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
        found = function(GAMMA, LAMBDA, values, following, inputs["rewards"][..., None], ends, ends)
        return [x[..., 0] for x in found]

    return call


def _pufferlib() -> Callable:
    peers.load("pufferlib._C", "__name__")  # which registers it with torch

    def call(inputs: Inputs) -> Tensor:
        values = inputs["longer_values"]
        advantages, ratio = torch.zeros_like(values), torch.ones_like(values)
        torch.ops.pufferlib.compute_puff_advantage(
            values,
            inputs["late_rewards"],
            inputs["late_ends"],
            ratio,
            advantages,
            GAMMA,
            LAMBDA,
            1.0,
            1.0,
        )
        return advantages[:, :-1]

    return call


def _environment_loop(inputs: Inputs) -> tuple[Tensor, Tensor]:
    rewards, values = inputs["rewards"], inputs["values"]
    going = 1.0 - inputs["terminated"].to(values.dtype)
    trace = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(trace)
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + GAMMA * next_value * going[:, t] - values[:, t]
        trace = delta + GAMMA * LAMBDA * going[:, t] * trace
        next_value = values[:, t]
        advantages[:, t] = trace
    return advantages, advantages + values


OPERATIONS = (
    Operation(
        name="gae",
        **_SIZES,
        make=tokens,
        mask="mask",
        ours=lambda inputs, backend: ops.gae(
            inputs["rewards"],
            inputs["values"],
            gamma=GAMMA,
            gae_lambda=LAMBDA,
            mask=inputs["mask"],
            backend=backend,
        ),
        eager=_loop,
        exact=lambda inputs: reference.gae(
            inputs["rewards"], inputs["values"], GAMMA, LAMBDA, mask=inputs["mask"]
        ),
        others={"numba, one core": Provider(load=_numba)},
        # read rewards, values (4 bytes each) and mask (1), write advantages and returns (4 each)
        work=_moves(9, 8),
    ),
    Operation(
        name="gae, whitened",
        **_SIZES,
        make=tokens,
        mask="mask",
        ours=lambda inputs, backend: ops.gae(
            inputs["rewards"],
            inputs["values"],
            gamma=GAMMA,
            gae_lambda=LAMBDA,
            mask=inputs["mask"],
            whiten=True,
            backend=backend,
        ),
        eager=None,
        exact=_whitened,
        others={"verl": Provider(load=_verl)},
        # as gae; mean and spread need the advantages once more
        work=_moves(13, 12),
    ),
    Operation(
        name="gae, environments",
        **_SIZES,
        make=environments,
        ours=lambda inputs, backend: ops.gae(
            inputs["rewards"],
            inputs["values"],
            gamma=GAMMA,
            gae_lambda=LAMBDA,
            terminated=inputs["terminated"],
            backend=backend,
        ),
        eager=_environment_loop,
        exact=lambda inputs: reference.gae(
            inputs["rewards"], inputs["values"], GAMMA, LAMBDA, terminated=inputs["terminated"]
        ),
        others={
            "torchrl": Provider(load=_torchrl),
            "pufferlib": Provider(load=_pufferlib),
        },
        # read rewards, values (4 bytes each) and ends (1), write advantages and returns (4 each)
        work=_moves(9, 8),
    ),
    Operation(
        name="shaped_gae",
        **_SIZES,
        make=tokens,
        mask="mask",
        ours=lambda inputs, backend: ops.shaped_gae(
            inputs["logprobs"],
            inputs["old_logprobs"],
            inputs["values"],
            gamma=1.0,
            gae_lambda=LAMBDA,
            kl_coef=0.05,
            terminal_rewards=inputs["terminal_rewards"],
            mask=inputs["mask"],
            backend=backend,
        ),
        eager=None,
        exact=lambda inputs: reference.shaped_gae(
            inputs["logprobs"],
            inputs["old_logprobs"],
            inputs["values"],
            1.0,
            LAMBDA,
            0.05,
            terminal_rewards=inputs["terminal_rewards"],
            mask=inputs["mask"],
        )[:2],
        # read two logprobs, values (4 bytes each) and mask (1), write advantages and returns
        work=_moves(13, 8),
    ),
    Operation(
        name="discounted_returns",
        **_SIZES,
        make=tokens,
        mask="mask",
        ours=lambda inputs, backend: ops.discounted_returns(
            inputs["rewards"], gamma=GAMMA, mask=inputs["mask"], backend=backend
        ),
        eager=_returns_loop,
        exact=lambda inputs: reference.discounted_returns(
            inputs["rewards"], GAMMA, mask=inputs["mask"]
        ),
        # read rewards (4 bytes) and mask (1), write returns (4)
        work=_moves(5, 4),
    ),
    Operation(
        name="lambda_returns",
        **_SIZES,
        make=tokens,
        mask="mask",
        ours=lambda inputs, backend: ops.lambda_returns(
            inputs["rewards"],
            inputs["values"],
            gamma=GAMMA,
            gae_lambda=LAMBDA,
            mask=inputs["mask"],
            backend=backend,
        ),
        eager=lambda inputs: _loop(inputs)[1],
        exact=lambda inputs: reference.lambda_returns(
            inputs["rewards"], inputs["values"], GAMMA, LAMBDA, mask=inputs["mask"]
        ),
        # read rewards, values (4 bytes each) and mask (1), write returns (4)
        work=_moves(9, 4),
    ),
    Operation(
        name="n_step_advantages",
        **_SIZES,
        make=tokens,
        mask="mask",
        ours=lambda inputs, backend: ops.n_step_advantages(
            inputs["rewards"],
            inputs["values"],
            n=STEPS,
            gamma=GAMMA,
            mask=inputs["mask"],
            backend=backend,
        ),
        eager=None,
        exact=lambda inputs: reference.n_step_advantages(
            inputs["rewards"], inputs["values"], STEPS, GAMMA, mask=inputs["mask"]
        ),
        # read rewards, values (4 bytes each) and mask (1), write advantages and returns (4 each)
        work=_moves(9, 8),
    ),
    Operation(
        name="off_policy_returns",
        **_SIZES,
        make=tokens,
        mask="mask",
        ours=lambda inputs, backend: ops.off_policy_returns(
            inputs["rewards"],
            inputs["logprobs"],
            inputs["old_logprobs"],
            mask=inputs["mask"],
            backend=backend,
        ),
        eager=None,
        exact=lambda inputs: reference.off_policy_returns(
            inputs["rewards"],
            inputs["logprobs"],
            inputs["old_logprobs"],
            mask=inputs["mask"],
        ),
        # read rewards, two logprobs (4 bytes each) and mask (1), write returns (4)
        work=_moves(13, 4),
    ),
    Operation(
        name="vtrace",
        **_SIZES,
        make=tokens,
        mask="mask",
        ours=lambda inputs, backend: ops.vtrace(
            inputs["logprobs"],
            inputs["old_logprobs"],
            inputs["rewards"],
            inputs["values"],
            gamma=GAMMA,
            mask=inputs["mask"],
            backend=backend,
        ),
        eager=None,
        exact=lambda inputs: reference.vtrace(
            inputs["logprobs"],
            inputs["old_logprobs"],
            inputs["rewards"],
            inputs["values"],
            GAMMA,
            mask=inputs["mask"],
        ),
        # read two logprobs, rewards, values (4 bytes each) and mask (1), write two (4 each)
        work=_moves(17, 8),
    ),
)
