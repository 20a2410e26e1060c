"""TRL's losses of preference pairs: `DPOTrainer`, and sums of log-probabilities over completions of
CPO and ORPO.

Left to TRL, as their losses of a handful of numbers stand amid methods of hundreds of lines: KTO,
reward models, TPO and online DPO; so do the losses of CPO and ORPO, which keep one per pair.
Log-probabilities of KTO and SFT come from the fused head all the same.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from warpo.kernels import dispatch, ops
from warpo.kernels.integrations.serving import PassOn, require, require_served
from warpo.kernels.integrations.trl._library import library


@library.replaces("trl.trainer.dpo_trainer", "DPOTrainer._compute_loss", "preference_loss")
def dpo_loss(original: Callable, self: Any, model: Any, inputs: Any, return_outputs: bool) -> Any:
    """The same loss and metrics with two reads of the device for all metrics, where TRL has one or
    two for each. Served: loss types "sigmoid", "hinge", "ipo", "robust" and "sigmoid_norm", one at
    a time, under reverse KL.
    """
    require(not return_outputs, "return_outputs")
    row = _row(self)
    completion_mask = inputs["completion_mask"]
    apart = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
    outputs = model(
        **{name: value for name, value in inputs.items() if name not in apart},
        use_cache=False,
        labels=inputs["input_ids"].masked_fill(completion_mask == 0, -100),
        fused_lm_head=True,
    )
    # virtual tokens of a learnt prompt come first
    steps = completion_mask.shape[1] - 1
    # (2, B): the chosen completions, then the rejected ones
    logps = outputs.log_probs[:, -steps:].sum(1).view(2, -1)
    if self.precompute_ref_logps:
        refs = torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
    else:
        refs = torch.stack(self.compute_ref_log_probs(self.ref_model or self.model, inputs))
    ratios = logps - refs
    scores = ratios
    if self.loss_types[0] in ("ipo", "sigmoid_norm"):
        scores = scores / completion_mask.sum(1).clamp(min=1).view(2, -1)
    loss = ops.preference_loss(*scores.unsqueeze(-1).unbind(), loss=row).loss
    _log(self, inputs, outputs, steps, self.beta * ratios.detach(), logps.detach())
    weight = self.loss_weights[0]
    return loss if weight == 1 else loss * weight


def _row(trainer: Any) -> ops.Preference:
    """The trainer's loss as one of ours."""
    require(len(trainer.loss_types) == 1, "several loss types")
    require(trainer.f_divergence_type == "reverse_kl", "another divergence than reverse KL")
    require(trainer.ld_alpha is None, "ld_alpha")
    require(not trainer.use_weighting, "use_weighting")
    require(not trainer.aux_loss_enabled, "the loss of a router")
    require(trainer.accelerator.device.type in dispatch.DEVICES, "tensors on another device")
    require(trainer.beta > 0, "a beta of 0")
    require(0 <= trainer.label_smoothing < 0.5, "a label_smoothing of 0.5 or more")
    row = _preference(trainer.loss_types[0], trainer.beta, trainer.label_smoothing)
    if row is None:
        raise PassOn(f"loss type {trainer.loss_types[0]!r}")
    return row


@functools.lru_cache
def _preference(loss_type: str, beta: float, label_smoothing: float) -> ops.Preference | None:
    # the scores are relative to the reference already
    plain = ops.Preference(beta=beta, reference=False)
    rows = {
        "sigmoid": plain,
        "sigmoid_norm": plain,
        "hinge": plain.replace(link="hinge", margin=1.0),
        "ipo": plain.replace(link="square"),
        "robust": plain.replace(label_smoothing=label_smoothing, robust=True),
    }
    return rows.get(loss_type)


@torch.no_grad()
def _log(
    trainer: Any, inputs: Any, outputs: Any, steps: int, rewards: Tensor, logps: Tensor
) -> None:
    """TRL's metrics. Its per-token outputs are 0 outside completions."""
    mode = "train" if trainer.model.training else "eval"
    sides = (2, rewards.shape[1], steps)
    counts = inputs["completion_mask"][:, 1:].view(sides).sum((1, 2))
    logits = outputs.mean_logits[:, -steps:].view(sides).sum((1, 2))
    correct = outputs.is_top1[: rewards.shape[1], -steps:].sum()
    totals = torch.stack(
        [outputs.entropy[:, -steps:].sum(), inputs["attention_mask"].sum(), correct]
    )
    tokens = torch.cat([totals.double(), logits, counts])
    pairs = torch.cat([rewards, (rewards[0] > rewards[1])[None], logps]).mean(1)
    gather, gather_tokens = trainer.accelerator.gather, trainer.accelerator.gather_for_metrics
    entropy, attended, hits, *by_side = gather_tokens(tokens[None]).sum(0).tolist()
    reward, other_reward, accuracy, logp, other_logp = gather(pairs[None]).mean(0).tolist()
    (logit, other_logit), (chosen, rejected) = by_side[:2], by_side[2:]
    if mode == "train":
        trainer._total_train_tokens += int(attended) // trainer._tp_size
    metrics = trainer._metrics[mode]
    metrics["entropy"].append(_over(entropy, chosen + rejected))
    metrics["num_tokens"] = [trainer._total_train_tokens]
    for name, value in {
        "logits/chosen": _over(logit, chosen),
        "logits/rejected": _over(other_logit, rejected),
        "mean_token_accuracy": _over(hits, chosen),
        "rewards/chosen": reward,
        "rewards/rejected": other_reward,
        "rewards/accuracies": accuracy,
        "rewards/margins": reward - other_reward,
        "logps/chosen": logp,
        "logps/rejected": other_logp,
    }.items():
        metrics[name].append(value)


def _over(total: float, count: float) -> float:
    return total / count if count else 0.0


@library.replaces(
    "trl.experimental.cpo.cpo_trainer", "CPOTrainer.get_batch_logps", "logprobs", rounds=True
)
def cpo_logps(
    original: Callable,
    logits: Tensor,
    labels: Tensor,
    average_log_prob: bool = False,
    is_encoder_decoder: bool = False,
) -> Tensor:
    """Differs: the labels of an encoder-decoder stay as they were, where TRL writes zeros to them,
    and what stands in ignored rows, NaN or inf, is not read.
    """
    return _completion_logps(logits, labels, average_log_prob, is_encoder_decoder)


@library.replaces(
    "trl.experimental.orpo.orpo_trainer", "ORPOTrainer.get_batch_logps", "logprobs", rounds=True
)
def orpo_logps(
    original: Callable,
    logits: Tensor,
    labels: Tensor,
    average_log_prob: bool = False,
    is_encoder_decoder: bool = False,
) -> Tensor:
    """Differs: what stands in ignored rows, NaN or inf, is not read."""
    return _completion_logps(logits, labels, average_log_prob, is_encoder_decoder)


def _completion_logps(
    logits: Tensor, labels: Tensor, average_log_prob: bool, is_encoder_decoder: bool
) -> Tensor:
    require_served(logits)
    rows = logits.dim() == 3 and logits.shape[-1] > 0 and logits.stride(-1) == 1
    require(rows, "logits that are not dense rows")
    require(logits.shape[:-1] == labels.shape, "labels that are not one per row of logits")
    require(labels.dtype == torch.int64, "labels that are not int64")
    require(labels.device == logits.device, "tensors on two devices")
    if not is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    logps = ops.logprobs(logits, labels).sum(-1)
    if average_log_prob:
        logps = logps / (labels != -100).sum(-1)
    return logps.to(logits.dtype if logits.device.type == "cpu" else torch.float32)
