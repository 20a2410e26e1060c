"""AdamW with float32 master weights, whose step writes the rounded weights where they are read.

A parameter may be a view of the sampler's storage: it is written in place, never moved, so that a
step is also the publication of its weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from warpo.engine.errors import TrainingError
from warpo.engine.ranks import ONE_RANK, Ranks
from warpo.kernels import ops

# Gradients on their way to the host while it computes.
IN_FLIGHT = 2


class WeightUpdate(NamedTuple):
    """Effect of a step on the weights; on the device that keeps the state.

    Attributes:
        fingerprints: by name of the parameter: `ops.fingerprint` of its weights after the step.
        changed: () int64: weights whose bits the step changed.
        total: weights.
        master_update, published_update: () float32: sum of |new - old| before and after rounding.
        grad_norm: () float32: L2 norm of the gradient before clipping.
    """

    fingerprints: dict[str, Tensor]
    changed: Tensor
    total: int
    master_update: Tensor
    published_update: Tensor
    grad_norm: Tensor


class AdamW(torch.optim.Optimizer):
    """AdamW on float32 weights, rounded into the parameters; see `ops.adamw_publish`.

    Values are those of torch.optim.AdamW on float32 copies of the parameters. The state of a
    parameter is made at its first step: two float32 moments, and float32 master weights where the
    parameter is bfloat16; 8 and 12 bytes per element. With state = "host" it lies in host memory,
    next to a copy of the weights in their dtype, pinned: the step then runs on the CPU, while
    gradients and weights of other parameters are on their way. On a CPU "host" is "device".

    A parameter without gradient keeps its weights and its moments. Gradients accumulate in float32,
    see `float32_gradients`.

    Args:
        named_parameters: (name, parameter), as `nn.Module.named_parameters` gives them: leaves,
            float32 | bfloat16, on one device, dense or rows of any stride.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        state: where moments and master weights lie, and the step is computed.
        ranks: whose gradients are one.
        setting: the setting to lower if the gradient is not finite.

    Raises:
        ValueError: a parameter or a number is not as above.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state: Literal["device", "host"] = "device",
        ranks: Ranks = ONE_RANK,
        setting: str = "update.lr",
    ) -> None:
        named = list(named_parameters)
        _check_numbers(lr=lr, eps=eps, weight_decay=weight_decay)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        if state not in ("device", "host"):
            raise ValueError(f"state must be 'device' or 'host', got {state!r}")
        _check_parameters(named)
        float32_gradients(parameter for _, parameter in named)
        super().__init__(
            named, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self._device = named[0][1].device
        self._staged = state == "host" and self._device.type != "cpu"
        self._host_weights: dict[Tensor, Tensor] = {}
        self._landing: list[Tensor] = []
        self._ranks, self._setting = ranks, setting

    def reset(self) -> None:
        """Forget moments and master weights; to be called when other weights were loaded."""
        self.state.clear()
        self._host_weights.clear()

    @torch.no_grad()
    def step(self, max_grad_norm: float = math.inf) -> WeightUpdate:  # type: ignore[override]
        """One step from the gradients that the parameters hold, which it clears.

        Args:
            max_grad_norm: the gradient is scaled down to this L2 norm.

        Raises:
            TrainingError: the norm is not finite. Nothing is stepped.
        """
        parameters = []
        for name, parameter, _ in self._parameters():
            if parameter.grad is not None and parameter.grad.is_sparse:
                raise ValueError(f"the gradient of {name} is sparse: build it with sparse=False")
            parameters.append(parameter)
        self._ranks.sum_gradients(parameters)
        grad_norm = self._ranks.norm(gradient_norm(parameters))
        if not torch.isfinite(grad_norm):
            self.zero_grad(set_to_none=True)
            raise TrainingError(
                f"the gradient norm is {grad_norm.item()}: the step was not taken. Lower "
                f"{self._setting}, or check the rewards and the model for NaN"
            )
        update = self._step(grad_norm, clip_coefficient(grad_norm, max_grad_norm))
        self.zero_grad(set_to_none=True)
        return update

    def _step(self, grad_norm: Tensor, grad_scale: Tensor) -> WeightUpdate:
        total = sum(parameter.numel() for _, parameter, _ in self._parameters())
        stepped, fingerprints = [], self._fingerprints_without_gradient()
        for group in self.param_groups:
            named = [
                (name, parameter)
                for name, parameter in zip(group["param_names"], group["params"], strict=True)
                if parameter.grad is not None
            ]
            if not named:
                continue
            names, parameters = [name for name, _ in named], [parameter for _, parameter in named]
            step = self._step_on_host if self._staged else self._step_on_device
            results = step(parameters, group, grad_scale)
            fingerprints |= zip(names, results.fingerprint.unbind(), strict=True)
            stepped.append(results)
        return WeightUpdate(
            fingerprints,
            _sum([results.changed for results in stepped], torch.int64),
            total,
            _sum([results.master_update for results in stepped], torch.float32),
            _sum([results.published_update for results in stepped], torch.float32),
            grad_norm,
        )

    def _fingerprints_without_gradient(self) -> dict[str, Tensor]:
        resting = {name: x for name, x, _ in self._parameters() if x.grad is None}
        if not resting:
            return {}
        fingerprints = ops.fingerprint_foreach(list(resting.values()))
        return dict(zip(resting, fingerprints.unbind(), strict=True))

    def _parameters(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                yield name, parameter, group

    def _step_on_device(
        self, parameters: Sequence[Tensor], group: dict[str, Any], grad_scale: Tensor
    ) -> ops.AdamwPublish:
        grads = [_gradient(parameter) for parameter in parameters]
        return self._update(parameters, group, grads, parameters, grad_scale)

    def _update(
        self,
        parameters: Sequence[Tensor],
        group: dict[str, Any],
        grads: Sequence[Tensor],
        weights: Sequence[Tensor],
        grad_scale: Tensor,
    ) -> ops.AdamwPublish:
        """Step `weights`, which are the parameters of a group or their copies on the host."""
        states = [self._state(x, weight) for x, weight in zip(parameters, weights, strict=True)]
        result = ops.adamw_publish_foreach(
            grads,
            [state.get("master") for state in states],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            weights,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            steps=[state["step"] + 1 for state in states],
            grad_scale=grad_scale,
            backend="cpu" if self._staged else None,
        )
        for state in states:
            state["step"] += 1
        return result

    def _state(self, parameter: Tensor, weights: Tensor) -> dict[str, Any]:
        """That of a parameter, made at its first step."""
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros(
                    parameter.shape, dtype=torch.float32, device=weights.device
                )
            if parameter.dtype != torch.float32:
                dense = torch.contiguous_format
                state["master"] = weights.to(torch.float32, memory_format=dense)
        return state

    def _step_on_host(
        self, parameters: Sequence[Tensor], group: dict[str, Any], grad_scale: Tensor
    ) -> ops.AdamwPublish:
        """Gradients down, a step on the CPU, weights up: a parameter at a time, overlapped.

        A landing place is free again once its step is computed, which blocks; the copies of the
        weights read memory that the next call of this function writes after the gradients of new
        weights have arrived. So no other wait is needed.
        """
        scale = grad_scale.cpu()
        streams = torch.get_device_module(self._device)
        current = streams.current_stream(self._device)
        down, up = self._streams
        down.wait_stream(current)
        up.wait_stream(current)
        places = self._landing_places(parameters)

        def fetch(i: int) -> tuple[Tensor, Any]:
            grad = parameters[i].grad
            assert grad is not None
            place = places[i % IN_FLIGHT][: grad.numel() * grad.element_size()]
            landed, arrived = place.view(grad.dtype).view(grad.shape), streams.Event()
            with streams.stream(down):
                landed.copy_(grad, non_blocking=True)
                arrived.record(down)
            return landed, arrived

        results = []
        coming = [fetch(i) for i in range(min(IN_FLIGHT, len(parameters)))]
        for i, parameter in enumerate(parameters):
            weights = self._weights_on_host(parameter)
            landed, arrived = coming[i]
            arrived.synchronize()
            results.append(self._update([parameter], group, [landed], [weights], scale))
            if i + IN_FLIGHT < len(parameters):
                coming.append(fetch(i + IN_FLIGHT))
            with streams.stream(up):
                parameter.copy_(weights, non_blocking=True)
        current.wait_stream(up)
        return ops.AdamwPublish(*[torch.cat(parts) for parts in zip(*results, strict=True)])

    @cached_property
    def _streams(self) -> tuple[Any, Any]:
        """For gradients to the host and for weights to the device; of no effect on a CPU."""
        module = torch.get_device_module(self._device)
        return module.Stream(self._device), module.Stream(self._device)

    def _landing_places(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        size = max((p.grad.nbytes for p in parameters if p.grad is not None), default=0)
        if not self._landing or self._landing[0].numel() < size:
            self._landing = [self._host_tensor((size,), torch.uint8) for _ in range(IN_FLIGHT)]
        return self._landing

    def _weights_on_host(self, parameter: Tensor) -> Tensor:
        if parameter not in self._host_weights:
            copy = self._host_tensor(parameter.shape, parameter.dtype)
            self._host_weights[parameter] = copy.copy_(parameter)
        return self._host_weights[parameter]

    def _host_tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=self._device.type == "cuda")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the weights must be those of that moment. Learning
        rate, betas and weight decay stay those of this optimizer.

        Raises:
            ValueError: it belongs to other parameters, or to parameters of another dtype.
        """
        own = [name for name, *_ in self._parameters()]
        groups = state_dict["param_groups"]
        settings = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.param_groups
        ]
        # Without the state, which torch would round to the dtype of the parameters.
        super().load_state_dict({"state": {}, "param_groups": groups})
        for group, values in zip(self.param_groups, settings, strict=True):
            group.update(values)
        self.reset()
        saved = [name for group in groups for name in group.get("param_names", group["params"])]
        for name, other in zip(own, saved, strict=True):
            if name != other:
                raise ValueError(f"it has parameter {other!r} where {name!r} was expected")
        ids = [i for group in groups for i in group["params"]]
        for i, (name, parameter, _) in zip(ids, self._parameters(), strict=True):
            if i in state_dict["state"]:
                self.state[parameter] = self._loaded(name, parameter, state_dict["state"][i])

    def _loaded(self, name: str, parameter: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
        wanted = {"step", "exp_avg", "exp_avg_sq"}
        wanted |= {"master"} if parameter.dtype != torch.float32 else set()
        if saved.keys() != wanted:
            raise ValueError(
                f"{name}, which is {parameter.dtype}, needs {', '.join(sorted(wanted))}, and "
                f"{', '.join(sorted(saved))} are kept: resume with the dtype that the run had"
            )
        device = torch.device("cpu") if self._staged else self._device
        state: dict[str, Any] = {"step": int(saved["step"])}
        for key in wanted - {"step"}:
            if saved[key].shape != parameter.shape or saved[key].dtype != torch.float32:
                raise ValueError(
                    f"{key} of {name} must be float32 {tuple(parameter.shape)}, got "
                    f"{saved[key].dtype} {tuple(saved[key].shape)}"
                )
            state[key] = torch.empty(parameter.shape, dtype=torch.float32, device=device)
            state[key].copy_(saved[key])
        return state


def float32_gradients(parameters: Iterable[Tensor]) -> None:
    """Let the gradients of bfloat16 parameters be float32, so that a sum over micro-batches is
    rounded as in float32: in bfloat16 one of 1000 is off by 4 %.
    """
    for parameter in parameters:
        if parameter.dtype == torch.bfloat16:
            parameter.grad_dtype = torch.float32


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """L2 norm of all gradients together, () float32, computed in float32 whatever their dtype."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, torch.float32)))


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """Return the factor that scales gradients to max_norm, as torch's `clip_grad_norm_` does."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def update_metrics(updates: Sequence[WeightUpdate]) -> dict[str, float]:
    """Over the optimizer steps of a step: the share of the weights whose bits changed, and the
    share of the update that rounding to the dtype of the weights has kept back. The master weights
    have it still, so it is below 0 where a step makes up for earlier ones; in float32 it is 0 up to
    the rounding of the sums.
    """
    changed = sum(int(update.changed) for update in updates)
    master = sum(float(update.master_update) for update in updates)
    published = sum(float(update.published_update) for update in updates)
    return {
        "update/changed_frac": changed / sum(update.total for update in updates),
        "update/rounding_lost_frac": 1 - published / master if master else 0.0,
    }


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.contiguous()


def _sum(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat(list(parts)).sum() if parts else torch.zeros((), dtype=dtype)


def _check_numbers(**numbers: float) -> None:
    for name, value in numbers.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a number >= 0, got {value}")


def _check_parameters(named: Sequence[tuple[str, nn.Parameter]]) -> None:
    if not named:
        raise ValueError("there are no parameters to step")
    if not all(isinstance(entry, tuple) for entry in named):
        raise ValueError("parameters need names: pass model.named_parameters()")
    device = named[0][1].device
    for name, parameter in named:
        if parameter.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{name} must be float32 or bfloat16, got {parameter.dtype}")
        if parameter.device != device:
            raise ValueError(f"{name} is on {parameter.device}, {named[0][0]} on {device}")
        if parameter.dim() and parameter.shape[-1] > 1 and parameter.stride(-1) != 1:
            raise ValueError(
                f"{name} must be dense in its last dimension, got strides {parameter.stride()}"
            )
