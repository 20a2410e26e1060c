"""The optimizer's step and the proof of what it wrote."""

from typing import Any

import torch
from torch import Tensor

from warpo.bench.operation import Inputs, Operation, Sizes, Work
from warpo.kernels import ops, reference

_NUMBERS: dict[str, Any] = {
    "lr": 1e-3,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "step": 5,
}


def _make(device: str, dtype: torch.dtype, sizes: Sizes) -> Inputs:
    count = sizes["parameters"]
    weights = torch.randn(count, device=device)
    return {
        "grad": torch.randn(count, device=device).to(dtype),
        # float32 weights are their own master, as they are for torch
        "master": None if dtype is torch.float32 else weights,
        "exp_avg": 0.1 * torch.randn(count, device=device),
        "exp_avg_sq": torch.rand(count, device=device),
        "published": weights.to(dtype),
        # of the optimizer of torch, which a fused one has on the device
        "steps": torch.full((), float(_NUMBERS["step"]), device=device),
        "dtype": dtype,
    }


_STATE = ("grad", "master", "exp_avg", "exp_avg_sq", "published")


def _first(inputs: Inputs) -> Inputs:
    return {
        k: v[:1024].clone() if isinstance(v, Tensor) and v.dim() else v for k, v in inputs.items()
    }


def _weights(inputs: Inputs) -> Tensor:
    return inputs["published"] if inputs["master"] is None else inputs["master"]


def _ours(inputs: Inputs, backend: str) -> Tensor:
    grad, master, first, second, published = (inputs[name] for name in _STATE)
    ops.adamw_publish(grad, master, first, second, published, **_NUMBERS, backend=backend)
    return _weights(inputs)


def _exact(inputs: Inputs) -> Tensor:
    grad, _, first, second, published = (inputs[name] for name in _STATE)
    weights = _weights(inputs).clone()
    # what is published has a fingerprint of its bits, so it keeps a dtype that samplers have
    reference.adamw_publish(
        grad.clone(), weights, first.clone(), second.clone(), published.float(), **_NUMBERS
    )
    return weights


def _eager(inputs: Inputs) -> Tensor:
    return _eager_of_many({name: [value] for name, value in inputs.items()})[0]


def _eager_of_many(inputs: Inputs) -> list[Tensor]:
    """The step of torch.optim.AdamW, fused, and the copy to the sampler where it has its own."""
    weights = _weights_of_many(inputs)
    torch._fused_adamw_(
        weights,
        [grad.float() for grad in inputs["grad"]],
        inputs["exp_avg"],
        inputs["exp_avg_sq"],
        [],
        inputs["steps"],
        lr=_NUMBERS["lr"],
        beta1=_NUMBERS["beta1"],
        beta2=_NUMBERS["beta2"],
        weight_decay=_NUMBERS["weight_decay"],
        eps=_NUMBERS["eps"],
        amsgrad=False,
        maximize=False,
    )
    if inputs["master"][0] is not None:
        torch._foreach_copy_(inputs["published"], weights)
    return weights


def _make_many(device: str, dtype: torch.dtype, sizes: Sizes) -> Inputs:
    made = [_make(device, dtype, sizes) for _ in range(sizes["tensors"])]
    return {name: [one[name] for one in made] for name in (*_STATE, "steps", "dtype")}


def _each(inputs: Inputs) -> list[Inputs]:
    """The inputs of each tensor."""
    return [dict(zip(inputs, one, strict=True)) for one in zip(*inputs.values(), strict=True)]


def _weights_of_many(inputs: Inputs) -> list[Tensor]:
    return inputs["published"] if inputs["master"][0] is None else inputs["master"]


def _ours_of_many(inputs: Inputs, backend: str) -> list[Tensor]:
    lists = [inputs[name] for name in _STATE]
    numbers = {name: value for name, value in _NUMBERS.items() if name != "step"}
    steps = [_NUMBERS["step"]] * len(lists[0])
    ops.adamw_publish_foreach(*lists, **numbers, steps=steps, backend=backend)
    return _weights_of_many(inputs)


def _first_of_many(inputs: Inputs) -> Inputs:
    few = [_first(one) for one in _each(inputs)[:4]]
    return {name: [one[name] for one in few] for name in inputs}


def _exact_fingerprint(inputs: Inputs) -> Tensor:
    return reference.fingerprint(inputs["published"].to(inputs["dtype"]))


def _step_work(parameters: int, itemsize: int) -> Work:
    """Reads gradient, old weights, master unless float32, and two moments; writes all but the
    gradient.
    """
    return Work(
        read=parameters * (16 if itemsize == 4 else 2 * itemsize + 12),
        written=parameters * (12 if itemsize == 4 else itemsize + 12),
    )


OPERATIONS = (
    Operation(
        name="adamw_publish",
        sizes=("parameters",),
        tiny={"parameters": 8},
        dtypes=(torch.float32, torch.bfloat16),
        part=_first,
        make=_make,
        ours=_ours,
        eager=_eager,
        exact=_exact,
        compiles=False,
        work=lambda sizes, itemsize, mode: _step_work(sizes["parameters"], itemsize),
    ),
    Operation(
        name="fingerprint",
        sizes=("parameters",),
        tiny={"parameters": 8},
        dtypes=(torch.float32, torch.bfloat16),
        part=_first,
        make=_make,
        ours=lambda inputs, backend: ops.fingerprint(inputs["published"], backend=backend),
        eager=None,
        exact=_exact_fingerprint,
        # read the weights
        work=lambda sizes, itemsize, mode: Work(read=sizes["parameters"] * itemsize),
    ),
    Operation(
        name="adamw_publish_foreach",
        sizes=("tensors", "parameters"),
        tiny={"tensors": 1, "parameters": 8},
        dtypes=(torch.float32, torch.bfloat16),
        part=_first_of_many,
        make=_make_many,
        ours=_ours_of_many,
        eager=_eager_of_many,
        exact=lambda inputs: [_exact(one) for one in _each(inputs)],
        compiles=False,
        work=lambda sizes, itemsize, mode: _step_work(
            sizes["tensors"] * sizes["parameters"], itemsize
        ),
    ),
    Operation(
        name="fingerprint_foreach",
        sizes=("tensors", "parameters"),
        tiny={"tensors": 1, "parameters": 8},
        dtypes=(torch.float32, torch.bfloat16),
        part=_first_of_many,
        make=_make_many,
        ours=lambda inputs, backend: ops.fingerprint_foreach(inputs["published"], backend=backend),
        eager=None,
        exact=lambda inputs: torch.stack([_exact_fingerprint(one) for one in _each(inputs)]),
        # read the weights
        work=lambda sizes, itemsize, mode: Work(
            read=sizes["tensors"] * sizes["parameters"] * itemsize
        ),
    ),
)
