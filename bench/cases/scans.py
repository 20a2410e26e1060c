"""Reverse scans over time."""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from warpo.bench import peers
from warpo.bench.case import Call, Case, each_backend, relative_error
from warpo.kernels import ops, reference

GAMMA, LAMBDA = 0.99, 0.95


@functools.cache
def _numba_loop() -> Any:
    """The recursion as a loop over a masked batch, compiled by numba for one thread."""

    def loop(rewards, values, mask, advantages, returns):
        rows, steps = rewards.shape
        for b in range(rows):
            value, trace = 0.0, 0.0
            for t in range(steps - 1, -1, -1):
                advantages[b, t] = returns[b, t] = 0.0
                if mask[b, t]:
                    trace = rewards[b, t] + GAMMA * (value + LAMBDA * trace) - values[b, t]
                    value = values[b, t]
                    advantages[b, t] = trace
                    returns[b, t] = trace + value

    return peers.load("numba", "njit")(loop)


def gae_case(device: str, rows: int, steps: int, time_dim: int) -> Case:
    """Token level [B, T] with a mask, or environment level [T, N] with terminations."""
    shape = (rows, steps) if time_dim else (steps, rows)
    rewards, values = torch.randn(2, *shape, device=device)
    flags = torch.rand(shape, device=device) < (0.8 if time_dim else 0.01)
    options: dict[str, Any] = {"mask": flags} if time_dim else {"terminated": flags, "time_dim": 0}

    def error(backend: str) -> float:
        part = (slice(0, 4), slice(None)) if time_dim else (slice(None), slice(0, 4))
        cut: dict[str, Any] = {
            k: v[part] if isinstance(v, Tensor) else v for k, v in options.items()
        }
        wanted = reference.gae(rewards[part].double(), values[part].double(), GAMMA, LAMBDA, **cut)
        actual = ops.gae(
            rewards[part], values[part], gamma=GAMMA, gae_lambda=LAMBDA, backend=backend, **cut
        )
        return max(relative_error(a, b) for a, b in zip(actual, wanted, strict=True))

    def ours(backend: str) -> Call:
        return lambda: ops.gae(
            rewards, values, gamma=GAMMA, gae_lambda=LAMBDA, backend=backend, **options
        )

    def verl() -> Call:
        function = peers.load("verl.trainer.ppo.core_algos", "compute_gae_advantage_return")
        mask = flags.float()
        return lambda: function(rewards, values, mask, GAMMA, LAMBDA)

    def numba() -> Call:
        loop = _numba_loop()
        arrays = [x.numpy() for x in (rewards, values, flags)]
        outputs = [torch.empty(shape).numpy() for _ in range(2)]
        return lambda: loop(*arrays, *outputs)

    providers: dict[str, Any] = dict(each_backend(device, ours))
    providers["eager"] = lambda: lambda: reference.gae(rewards, values, GAMMA, LAMBDA, **options)
    if time_dim:
        providers["verl"] = verl
    if time_dim and device == "cpu":
        providers["numba"] = numba
    return Case(
        name="gae tokens" if time_dim else "gae environments",
        size=f"{shape[0]} x {shape[1]} float32",
        providers=providers,
        error=error,
        # read rewards, values (4 bytes each) and flags (1), write advantages and returns (4 each)
        traffic=rewards.numel() * 17,
        goals={"verl": 100, "numba": 5, "copy": 0.5} if time_dim and device == "cpu" else {},
    )


def one_row_case(steps: int, microseconds: float) -> Case:
    """The kernel alone on one row: what a user of the raw binding waits for.

    The call goes to the compiled module with its arguments made ready.
    """
    rewards, values, advantages, returns = torch.randn(4, 1, steps)
    repeat = 1 + 200_000 // steps

    def kernel() -> Call:
        module = importlib.import_module("warpo.kernels._cpu")
        views = [(x.data_ptr(), steps, 1, 0) for x in (rewards, values, advantages, returns)]
        absent = [None] * 7
        arguments = (1, steps, None, views[0], None, views[1], *absent, GAMMA, LAMBDA, 0, False)
        arguments += (*views[2:],)

        def call() -> None:
            for _ in range(repeat):
                module.gae_forward(*arguments)

        return call

    def error(backend: str) -> float:
        wanted = reference.gae(rewards.double(), values.double(), GAMMA, LAMBDA)
        kernel()()
        return max(relative_error(a, b) for a, b in zip((advantages, returns), wanted, strict=True))

    return Case(
        name="gae, one row, kernel alone",
        size=f"1 x {steps} float32",
        providers={"cpu": kernel},
        error=error,
        traffic=rewards.numel() * 16,  # read rewards and values, write advantages and returns
        goals={"microseconds": microseconds},
        repeat=repeat,
    )
