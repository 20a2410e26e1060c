"""Logprobs of given tokens by a model, without gradient; the proof that it can be trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from warpo.engine.models.batch import Batch, pack
from warpo.engine.models.model import token_logprobs
from warpo.engine.types import TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def device_of(model: nn.Module) -> torch.device:
    """Return the device on which a model computes."""
    return next(model.parameters()).device


@torch.no_grad()
def score(model: nn.Module, batch: Batch, temperature: float) -> Tensor:
    """logprobs (M,) of the trained tokens of a micro-batch, without gradient."""
    return token_logprobs(model, batch, temperature).logprobs


def pack_scored(model: nn.Module, sequences: Sequence[Sequence[int]]) -> Batch:
    """Texts in one micro-batch where the model computes; every token but their first counts."""
    return pack([TokenSequence.scored(ids) for ids in sequences]).to(device_of(model))


def loss_and_gradient(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> Tensor:
    """The mean -logprob of the tokens of sequences, and the L2 norm of its gradient with respect
    to the embedded inputs, (2,) float32: both are finite where the model can be trained on. No
    memory is taken for the gradients of weights.
    """
    batch = pack_scored(model, sequences)
    embedded: list[Tensor] = []
    hook = model.get_input_embeddings().register_forward_hook(
        # of embeddings that stay, the output has no gradient by itself
        lambda module, inputs, output: embedded.append(output.requires_grad_())
    )
    try:
        loss = -token_logprobs(model, batch, 1.0).logprobs.mean()
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad(loss, embedded[0])
    return torch.stack([loss.detach(), gradient.float().norm()])
