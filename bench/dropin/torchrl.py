"""torchrl's value estimators that are replaced: [N, T, 1] as its collectors lay steps out."""

from collections.abc import Callable

import torch

from warpo.bench.dropin.case import DropIn
from warpo.kernels.integrations.torchrl import library

SIZES = ((8, 16), (4, 128), (64, 256), (512, 4096))
GAMMA, LAMBDA = 0.99, 0.95


def cases() -> list[DropIn]:
    return [
        DropIn(
            function=function,
            size=f"{rows} x {steps}, float32",
            mode="forward",
            make=_make(function, rows, steps),
        )
        for function in library.names()
        for rows, steps in SIZES
    ]


def _make(name: str, rows: int, steps: int) -> Callable[[], Callable[[Callable], object]]:
    def make() -> Callable[[Callable], object]:
        generator = torch.Generator().manual_seed(0)
        reward, value, after, log_pi, log_mu = (
            torch.randn(rows, steps, 1, generator=generator) for _ in range(5)
        )
        done = torch.rand(rows, steps, 1, generator=generator) < 0.01
        terminated = done & (torch.rand(rows, steps, 1, generator=generator) < 0.5)
        flags = (done, terminated)
        arguments = {
            "generalized_advantage_estimate": (GAMMA, LAMBDA, value, after, reward, *flags),
            "vec_generalized_advantage_estimate": (GAMMA, LAMBDA, value, after, reward, *flags),
            "td1_return_estimate": (GAMMA, after, reward, *flags),
            "td_lambda_return_estimate": (GAMMA, LAMBDA, after, reward, *flags),
            "vec_td_lambda_return_estimate": (GAMMA, LAMBDA, after, reward, *flags),
            "vtrace_advantage_estimate": (GAMMA, log_pi, log_mu, value, after, reward, *flags),
            "reward2go": (reward, done, GAMMA),
        }[name]
        return lambda function: function(*arguments)

    return make
