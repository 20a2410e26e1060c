"""`GRPOTrainer._compute_loss` and `RLOOTrainer._compute_loss` on given logprobs."""

import itertools
from collections.abc import Callable
from typing import Any

import torch

from warpo.bench.dropin.case import DropIn
from warpo.bench.peers import trl_inputs, trl_trainer

SHAPES = ((256, 2048), (8, 64))
DTYPES = (torch.float32, torch.bfloat16)
MODES = ("forward", "forward + backward")
SETTINGS: dict[str, dict[str, Any]] = {
    loss_type: {"loss_type": loss_type}
    for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "sapo", "vespo")
} | {
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "grpo with KL": {"loss_type": "grpo", "beta": 0.04},
    "grpo of sequences": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "dapo of vLLM": {"loss_type": "dapo", "use_vllm": True},
    "dapo on-policy": {"loss_type": "dapo", "on_policy": True},
}


def make(
    name: str, settings: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype, backward: bool
) -> Callable[[Callable], object]:
    """The call that is timed: a loss of TRL or ours of one micro-batch, and its gradient."""
    generator = torch.Generator().manual_seed(0)
    logprobs, old, ref = (-torch.rand(shape, generator=generator) for _ in range(3))
    lengths = torch.randint(shape[1] // 2, shape[1] + 1, shape[:1], generator=generator)
    mask = (torch.arange(shape[1]) < lengths[:, None]).long()
    logprobs, old, ref = (x.to(dtype) for x in (logprobs, old, ref))
    logprobs.requires_grad_(backward)
    inputs = trl_inputs(
        torch.randn(shape[0], generator=generator),
        mask,
        ref_per_token_logps=ref,
        num_items_in_batch=mask.sum(),
        importance_sampling_ratio=0.5 + torch.rand(shape, generator=generator),
        old_logps=(old * mask).sum(1, dtype=torch.float32),
    )
    on_policy = settings.get("on_policy", False)
    inputs |= {} if on_policy else {"old_per_token_logps": old}
    trainer = trl_trainer(name, forward=(logprobs, ref.neg(), None), **settings)

    def call(compute: Callable) -> object:
        trainer._metrics["train"].clear()
        logprobs.grad = None
        loss = compute(trainer, None, inputs)
        if backward:
            loss.backward()
        return loss

    return call


def cases() -> list[DropIn]:
    named = [("GRPOTrainer", label, settings) for label, settings in SETTINGS.items()]
    named.append(("RLOOTrainer", "", {}))
    return [
        _case(name, label, settings, shape, dtype, mode)
        for (name, label, settings), shape, dtype, mode in itertools.product(
            named, SHAPES, DTYPES, MODES
        )
    ]


def _case(
    name: str,
    label: str,
    settings: dict[str, Any],
    shape: tuple[int, int],
    dtype: torch.dtype,
    mode: str,
) -> DropIn:
    size = f"{shape[0]} x {shape[1]} {str(dtype).removeprefix('torch.')}"
    return DropIn(
        function=f"{name}._compute_loss",
        size=f"{label}, {size}" if label else size,
        mode=mode,
        make=lambda: make(name, settings, shape, dtype, mode == MODES[1]),
    )
