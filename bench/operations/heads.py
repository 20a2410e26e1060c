"""From hidden states or logits to logprobs and losses, without what lies between."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from warpo.bench import peers
from warpo.bench.operation import Inputs, Operation, Provider, Sizes, Work
from warpo.bench.operations.losses import grpo
from warpo.bench.operations.vocabulary import peaked_logits
from warpo.kernels import ops, reference

KEPT = 64  # ids of a token that top-k sampling kept
_HEAD: dict[str, Any] = {
    "sizes": ("tokens", "hidden", "vocabulary"),
    "tiny": {"tokens": 4, "hidden": 8, "vocabulary": 16},
    "dtypes": (torch.float32, torch.bfloat16),
    "leaves": ("hidden", "weight"),
}


def _hidden(device: str, dtype: torch.dtype, sizes: Sizes) -> Inputs:
    """Hidden states near the rows of the head that their targets have, in four sequences."""
    tokens, width, vocabulary = (sizes[name] for name in _HEAD["sizes"])
    weight = torch.randn(vocabulary, width, device=device) / width**0.5
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    hidden = 4 * weight[targets] + torch.randn(tokens, width, device=device)
    old = -torch.rand(tokens, device=device)
    return {
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "targets": targets,
        "old_logprobs": old,
        "ref_logprobs": old - 0.05,
        "advantages": torch.randn(tokens, device=device),
        "kept_ids": _kept(targets, vocabulary),
    }


def _kept(targets: Tensor, vocabulary: int) -> Tensor:
    """For each token its target and the ids after it, in a circle."""
    count = min(KEPT, vocabulary)
    return (targets[:, None] + torch.arange(count, device=targets.device)) % vocabulary


def _rows(count: int) -> Callable[[Inputs], Inputs]:
    """The first tokens, with the whole head."""

    def part(inputs: Inputs) -> Inputs:
        return {
            name: value if name == "weight" else value[:count] for name, value in inputs.items()
        }

    return part


def _products(forward: int, backward: int) -> Callable[[Sizes, int, str], Work]:
    """Matrix products of tokens x hidden x vocabulary, and an exponential of each logit."""

    def work(sizes: Sizes, itemsize: int, mode: str) -> Work:
        tokens, width, vocabulary = (sizes[name] for name in _HEAD["sizes"])
        products = {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[mode]
        matrices = (tokens + vocabulary) * width * itemsize
        return Work(
            read=matrices,
            written=0 if mode == "fwd" else matrices,
            flops=products * 2 * tokens * width * vocabulary,
            exps=tokens * vocabulary,
        )

    return work


def _eager_linear(inputs: Inputs) -> Tensor:
    logp = functional.linear(inputs["hidden"], inputs["weight"]).float().log_softmax(-1)
    return logp.gather(-1, inputs["targets"][:, None])[:, 0]


def _eager_with_entropy(inputs: Inputs) -> tuple[Tensor, Tensor]:
    logp = functional.linear(inputs["hidden"], inputs["weight"]).float().log_softmax(-1)
    return logp.gather(-1, inputs["targets"][:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def _exact_linear(inputs: Inputs) -> Tensor:
    return _exact_with_entropy(inputs)[0]


def _exact_with_entropy(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return reference.linear_logprobs(inputs["hidden"], inputs["weight"], inputs["targets"])


def _logits_twice(inputs: Inputs) -> Tensor:
    """As where they do not fit in the workspace."""
    return ops.linear_logprobs(
        inputs["hidden"], inputs["weight"], inputs["targets"], cache_logits=False
    )


def _verl_linear() -> Callable:
    module = peers.load("verl.utils.experimental.torch_functional", "FusedLinearForPPO")()
    return lambda inputs: module(
        inputs["hidden"][None], inputs["weight"], inputs["targets"][None], 1.0
    )[0][0]


def _kept_offsets(inputs: Inputs) -> Tensor:
    tokens, count = inputs["kept_ids"].shape
    return torch.arange(tokens + 1, device=inputs["kept_ids"].device) * count


def _eager_kept(inputs: Inputs) -> Tensor:
    rows = inputs["weight"][inputs["kept_ids"]]
    logits = torch.einsum("nkh,nh->nk", rows, inputs["hidden"])
    return logits.float().log_softmax(-1)[:, 0]


def _exact_kept(inputs: Inputs) -> Tensor:
    return reference.kept_set_logprobs(
        inputs["hidden"],
        inputs["weight"],
        inputs["targets"],
        inputs["kept_ids"].view(-1),
        _kept_offsets(inputs),
    )


def _from_logits(device: str, dtype: torch.dtype, sizes: Sizes) -> Inputs:
    """Logits of sequences, with what GRPO takes of each token."""
    shape = (sizes["sequences"], sizes["steps"])
    flat = peaked_logits(device, dtype, shape[0] * shape[1], sizes["vocabulary"])
    logits, targets = flat["logits"].view(*shape, -1), flat["targets"].view(shape)
    old = ops.logprobs(logits, targets) + 0.1 * torch.randn(shape, device=device)
    return {
        "logits": logits,
        "targets": targets,
        "old_logprobs": old,
        "ref_logprobs": old + 0.05,
        "advantages": torch.randn(shape[0], device=device),
        "mask": torch.ones(shape, dtype=torch.bool, device=device),
    }


def _corner(inputs: Inputs) -> Inputs:
    """Two sequences, their first eight tokens."""
    return {
        name: value[:2] if name == "advantages" else value[:2, :8] for name, value in inputs.items()
    }


def _one_read(inputs: Inputs, backend: str | None) -> Tensor:
    return ops.policy_loss_from_logits(
        inputs["logits"],
        inputs["targets"],
        inputs["advantages"],
        "grpo",
        old_logprobs=inputs["old_logprobs"],
        ref_logprobs=inputs["ref_logprobs"],
        backend=backend,
    ).loss


def _two_reads(inputs: Inputs) -> Tensor:
    return ops.policy_loss(
        ops.logprobs(inputs["logits"], inputs["targets"]),
        inputs["old_logprobs"],
        inputs["advantages"],
        "grpo",
        ref_logprobs=inputs["ref_logprobs"],
    ).loss


def _eager_from_logits(inputs: Inputs) -> Tensor:
    logp = inputs["logits"].float().log_softmax(-1)
    return grpo(inputs | {"logprobs": logp.gather(-1, inputs["targets"][..., None])[..., 0]})


def _exact_from_logits(inputs: Inputs) -> Tensor:
    return _exact_loss(reference.logprobs(inputs["logits"], inputs["targets"])[0], inputs)


def _exact_loss(logp: Tensor, inputs: Inputs, **packed: Any) -> Tensor:
    advantages = inputs["advantages"]
    if logp.dim() == 2:
        advantages = advantages[:, None].expand_as(logp)
    count = torch.tensor(float(len(logp)), dtype=logp.dtype, device=logp.device)
    objective = ops.OBJECTIVES["grpo" if logp.dim() == 2 else "dapo"]
    return reference.policy_loss(
        logp,
        inputs["old_logprobs"],
        advantages,
        objective,
        count,
        ref=inputs["ref_logprobs"] if logp.dim() == 2 else None,
        **packed,
    )[0]


def _one_sequence(inputs: Inputs) -> Tensor:
    count = len(inputs["hidden"])
    return torch.tensor([0, count], dtype=torch.int32, device=inputs["hidden"].device)


def _eager_from_hidden(inputs: Inputs) -> Tensor:
    ratio = (_eager_linear(inputs) - inputs["old_logprobs"]).exp()
    advantages = inputs["advantages"]
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages).mean()


OPERATIONS = (
    Operation(
        name="policy_loss_from_logits",
        sizes=("sequences", "steps", "vocabulary"),
        tiny={"sequences": 2, "steps": 2, "vocabulary": 8},
        dtypes=(torch.float32, torch.bfloat16),
        make=_from_logits,
        leaves=("logits",),
        part=_corner,
        ours=_one_read,
        eager=_eager_from_logits,
        exact=_exact_from_logits,
        others={"warpo, two operations": Provider(load=lambda: _two_reads)},
        # read the logits; with gradients, write those, computed in the same pass
        work=lambda sizes, itemsize, mode: Work(
            read=sizes["sequences"] * sizes["steps"] * sizes["vocabulary"] * itemsize,
            written=0
            if mode == "fwd"
            else sizes["sequences"] * sizes["steps"] * sizes["vocabulary"] * itemsize,
            exps=sizes["sequences"] * sizes["steps"] * sizes["vocabulary"],
        ),
    ),
    Operation(
        name="linear_logprobs",
        **_HEAD,
        make=_hidden,
        part=_rows(4),
        ours=lambda inputs, backend: ops.linear_logprobs(
            inputs["hidden"], inputs["weight"], inputs["targets"], backend=backend
        ),
        eager=_eager_linear,
        exact=_exact_linear,
        others={
            "warpo, logits twice": Provider(load=lambda: _logits_twice),
            "verl": Provider(load=_verl_linear),
        },
        # forward one product; backward those of both gradients
        work=_products(1, 2),
    ),
    Operation(
        name="linear_logprobs_and_entropy",
        **_HEAD,
        make=_hidden,
        part=_rows(4),
        ours=lambda inputs, backend: ops.linear_logprobs_and_entropy(
            inputs["hidden"], inputs["weight"], inputs["targets"], backend=backend
        ),
        eager=_eager_with_entropy,
        exact=_exact_with_entropy,
        work=_products(1, 2),
    ),
    Operation(
        name="policy_loss_from_hidden",
        **_HEAD,
        make=_hidden,
        part=_rows(4),
        ours=lambda inputs, backend: (
            ops.policy_loss_from_hidden(
                inputs["hidden"],
                inputs["weight"],
                inputs["targets"],
                inputs["advantages"],
                "dapo",
                old_logprobs=inputs["old_logprobs"],
                cu_seqlens=_one_sequence(inputs),
                backend=backend,
            ).loss
        ),
        eager=_eager_from_hidden,
        exact=lambda inputs: _exact_loss(
            _exact_linear(inputs), inputs, cu_seqlens=_one_sequence(inputs)
        ),
        # the logits once, and both gradients from them
        work=_products(1, 2),
    ),
    Operation(
        name="kept_set_logprobs",
        **_HEAD,
        make=_hidden,
        part=_rows(4),
        ours=lambda inputs, backend: ops.kept_set_logprobs(
            inputs["hidden"],
            inputs["weight"],
            inputs["targets"],
            inputs["kept_ids"].view(-1),
            _kept_offsets(inputs),
            backend=backend,
        ),
        eager=_eager_kept,
        exact=_exact_kept,
        # forward read the rows of the kept ids; backward read them and write a dense gradient
        work=lambda sizes, itemsize, mode: Work(
            read=sizes["tokens"] * KEPT * sizes["hidden"] * itemsize,
            written=0 if mode == "fwd" else sizes["vocabulary"] * sizes["hidden"] * itemsize,
            flops=2 * sizes["tokens"] * KEPT * sizes["hidden"] * (1 if mode == "fwd" else 3),
        ),
    ),
)
