"""Soft actor-critic."""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from warpo.bench.operation import Inputs, Operation, Sizes, Work, first_rows
from warpo.kernels import ops, reference


def _actions(device: str, dtype: torch.dtype, sizes: Sizes) -> Inputs:
    shape = (sizes["rows"], sizes["columns"])
    return {name: torch.randn(shape, device=device) for name in ("mean", "log_std", "noise")}


def _eager_actions(inputs: Inputs) -> tuple[Tensor, Tensor]:
    noise, s = inputs["noise"], inputs["log_std"].clamp(-20.0, 2.0)
    u = inputs["mean"] + s.exp() * noise
    logprobs = -noise * noise / 2 - s - math.log(2 * math.pi) / 2
    logprobs = logprobs - 2 * (math.log(2) - u - softplus(-2 * u))
    return torch.tanh(u), logprobs.sum(1)


def _work(sizes: Sizes, itemsize: int, mode: str) -> Work:
    elements = sizes["rows"] * sizes["columns"]
    # forward reads mean, log_std, noise and writes actions; backward reads them and the gradient
    # of the actions and writes two gradients; 4 bytes each
    read, written, exps = {"fwd": (12, 4, 3), "bwd": (16, 8, 2), "fwd+bwd": (28, 12, 5)}[mode]
    return Work(read=elements * read, written=elements * written, exps=elements * exps)


def _targets(device: str, dtype: torch.dtype, sizes: Sizes) -> Inputs:
    rows = sizes["rows"]
    names = ("rewards", "next_q1", "next_q2", "next_logprobs")
    return {name: torch.randn(rows, device=device) for name in names} | {
        "terminated": torch.rand(rows, device=device) < 0.01,
        "alpha": torch.tensor(0.2, device=device),
    }


def _eager_targets(inputs: Inputs) -> Tensor:
    going = 1 - inputs["terminated"].float()
    soft = torch.min(inputs["next_q1"], inputs["next_q2"])
    return inputs["rewards"] + 0.99 * going * (soft - inputs["alpha"] * inputs["next_logprobs"])


OPERATIONS = (
    Operation(
        name="squashed_gaussian",
        sizes=("rows", "columns"),
        tiny={"rows": 2, "columns": 2},
        part=first_rows(64),
        make=_actions,
        leaves=("mean", "log_std"),
        ours=lambda inputs, backend: ops.squashed_gaussian(
            inputs["mean"], inputs["log_std"], inputs["noise"], backend=backend
        ),
        eager=_eager_actions,
        exact=lambda inputs: reference.squashed_gaussian(
            inputs["mean"], inputs["log_std"], inputs["noise"]
        ),
        work=_work,
    ),
    Operation(
        name="soft_q_targets",
        sizes=("rows",),
        tiny={"rows": 2},
        part=first_rows(64),
        make=_targets,
        ours=lambda inputs, backend: ops.soft_q_targets(
            inputs["rewards"],
            inputs["terminated"],
            inputs["next_q1"],
            inputs["next_q2"],
            inputs["next_logprobs"],
            alpha=inputs["alpha"],
            gamma=0.99,
            backend=backend,
        ),
        eager=_eager_targets,
        exact=lambda inputs: reference.soft_q_targets(
            inputs["rewards"],
            inputs["terminated"],
            inputs["next_q1"],
            inputs["next_q2"],
            inputs["next_logprobs"],
            inputs["alpha"],
            0.99,
        ),
        # read four floats and a flag, write a float
        work=lambda sizes, itemsize, mode: Work(read=17 * sizes["rows"], written=4 * sizes["rows"]),
    ),
)
