"""Operations over the vocabulary."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from warpo.bench import peers
from warpo.bench.operation import Inputs, Operation, Provider, Sizes, Work, first_rows
from warpo.kernels import ops, reference


def peaked_logits(device: str, dtype: torch.dtype, tokens: int, vocabulary: int) -> Inputs:
    """Logits as those of a policy: one large, that of the target, over noise."""
    logits = 2 * torch.randn(tokens, vocabulary, device=device, dtype=dtype)
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    eight = torch.full((tokens, 1), 8.0, device=device, dtype=dtype)
    return {"logits": logits.scatter_add_(-1, targets[:, None], eight), "targets": targets}


def _make(device: str, dtype: torch.dtype, sizes: Sizes) -> Inputs:
    return peaked_logits(device, dtype, sizes["tokens"], sizes["vocabulary"])


def _work(sizes: Sizes, itemsize: int, mode: str) -> Work:
    elements = sizes["tokens"] * sizes["vocabulary"]
    once = elements * itemsize
    # forward reads the logits; backward reads them again and writes their gradient
    reads, writes, exps = {"fwd": (1, 0, 1), "bwd": (1, 1, 1), "fwd+bwd": (2, 1, 2)}[mode]
    return Work(read=reads * once, written=writes * once, exps=exps * elements)


def _eager(inputs: Inputs) -> Tensor:
    logp = torch.log_softmax(inputs["logits"], -1)
    return logp.gather(-1, inputs["targets"][..., None])[..., 0]


def _eager_with_entropy(inputs: Inputs) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(inputs["logits"], -1)
    chosen = logp.gather(-1, inputs["targets"][..., None])[..., 0]
    return chosen, -(logp.exp() * logp).sum(-1)


def _flat(module: str, name: str) -> Provider:
    """A function of (logits, targets)."""

    def load() -> Callable:
        function = peers.load(module, name)
        return lambda inputs: function(inputs["logits"], inputs["targets"])

    return Provider(load=load)


def _batched(module: str, name: str) -> Provider:
    """A function that takes batches of sequences: here one sequence."""

    def load() -> Callable:
        function = peers.load(module, name)

        def call(inputs: Inputs) -> list[Tensor]:
            found = function(inputs["logits"][None], inputs["targets"][None])
            return [x[0] for x in (found if isinstance(found, tuple) else (found,))]

        return call

    return Provider(load=load)


def _flash_attn() -> Callable:
    function = peers.load("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss")
    return lambda inputs: -function(inputs["logits"], inputs["targets"])[0]


def _quack() -> Callable:
    function = peers.load("quack", "cross_entropy")
    return lambda inputs: -function(inputs["logits"], inputs["targets"], reduction="none")


def _liger() -> Callable:
    function = peers.load("liger_kernel.transformers.functional", "liger_cross_entropy")
    return lambda inputs: -function(inputs["logits"], inputs["targets"], reduction="none")


def _inplace(function: Callable) -> Provider:
    """The gradient takes the place of the logits."""
    return Provider(
        load=lambda: (
            lambda inputs: function(inputs["logits"], inputs["targets"], inplace_backward=True)
        ),
        own_inputs=True,
        modes=("fwd+bwd",),
    )


_LOGITS: dict[str, Any] = {
    "sizes": ("tokens", "vocabulary"),
    "tiny": {"tokens": 2, "vocabulary": 8},
    "dtypes": (torch.float32, torch.bfloat16),
    "leaves": ("logits",),
    "part": first_rows(4),
    "make": _make,
    "work": _work,
}

OPERATIONS = (
    Operation(
        name="logprobs",
        **_LOGITS,
        ours=lambda inputs, backend: ops.logprobs(
            inputs["logits"], inputs["targets"], backend=backend
        ),
        eager=_eager,
        exact=lambda inputs: reference.logprobs(inputs["logits"], inputs["targets"])[0],
        others={
            "warpo, in place": _inplace(ops.logprobs),
            "trl": _batched("trl.trainer.utils", "selective_log_softmax"),
            "verl": _flat("verl.utils.torch_functional", "logprobs_from_logits"),
            "openrlhf": _batched("openrlhf.models.utils", "log_probs_from_logits"),
            "flash-attn": Provider(load=_flash_attn),
            "quack": Provider(load=_quack),
            # its forward pass writes the gradient over the logits
            "liger": Provider(load=_liger, own_inputs=True),
        },
    ),
    Operation(
        name="logprobs_and_entropy",
        **_LOGITS,
        ours=lambda inputs, backend: ops.logprobs_and_entropy(
            inputs["logits"], inputs["targets"], backend=backend
        ),
        eager=_eager_with_entropy,
        exact=lambda inputs: reference.logprobs(inputs["logits"], inputs["targets"]),
        others={
            "warpo, in place": _inplace(ops.logprobs_and_entropy),
            "trl": _batched("trl.trainer.utils", "selective_log_softmax_and_entropy"),
        },
    ),
)
