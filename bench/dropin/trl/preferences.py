"""TRL's DPO loss and its metrics, between the model and the optimizer."""

import functools
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace

import torch

from warpo.bench.dropin.case import DropIn

# completions, chosen and rejected ones together, and tokens of each
SHAPES = ((8, 64), (256, 2048))


def cases() -> list[DropIn]:
    return [
        DropIn(
            function="DPOTrainer._compute_loss",
            size=f"{list(shape)} float32, {loss_type}",
            mode=mode,
            make=functools.partial(_make, shape, loss_type, mode),
        )
        for loss_type in ("sigmoid", "ipo")
        for mode in ("forward", "forward + backward")
        for shape in SHAPES
    ]


def _make(shape: tuple[int, int], loss_type: str, mode: str) -> Callable:
    """The trainer without its model, which returns the same log-probabilities each time."""
    from accelerate import Accelerator

    from trl.trainer.utils import FusedCausalLMOutput

    completions, steps = shape
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=Accelerator(cpu=True),
        beta=0.1,
        loss_types=[loss_type],
        loss_weights=[1.0],
        label_smoothing=0.0,
        use_weighting=False,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        aux_loss_enabled=False,
        _tp_size=1,
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
    )
    mask = (torch.arange(steps + 1) >= steps // 4).long().expand(completions, -1)
    logprobs = -torch.rand(shape) * mask[:, 1:]
    logprobs.requires_grad_(mode != "forward")
    refs = logprobs.detach().sum(1) + torch.randn(completions)
    chosen, rejected = refs.chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    fields = {"entropy": torch.rand(shape) * mask[:, 1:], "mean_logits": -logprobs.detach()}

    def model(**_: object) -> object:
        return FusedCausalLMOutput(
            log_probs=logprobs.view_as(logprobs), is_top1=mask[:, 1:] > 0, **fields
        )

    def call(function: Callable) -> object:
        trainer._metrics["train"].clear()
        logprobs.grad = None
        loss = function(trainer, model, inputs, False)
        if logprobs.requires_grad:
            loss.backward()
        return loss

    return call
