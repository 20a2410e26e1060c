"""How the learner's weights become the sampler's.

The sampler fuses, pads and renames parameters. Where each one goes is found by asking the
sampler's own weight loader: it is fed tensors that record the copies made from them, and the
recorded copies are the plan. `CopyPlan` replays them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from warpo.engine.errors import SamplerError

LoadWeights = Callable[[Iterable[tuple[str, Tensor]]], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Write:
    """One copy that the loader would make: a view of the sampler's, a view of the learner's."""

    name: str
    target: Tensor
    source: Tensor


class _Traced(Tensor):
    """A learner's tensor that records the copies made from it and keeps them from happening."""

    parameter: str
    writes: list[Write]

    @classmethod
    def of(cls, name: str, tensor: Tensor, writes: list[Write]) -> _Traced:
        traced = tensor.detach().as_subclass(cls)
        traced.parameter, traced.writes = name, writes
        return traced

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.copy_ and isinstance(args[1], cls):
            target, source = (tensor.as_subclass(Tensor).detach() for tensor in args[:2])
            args[1].writes.append(Write(name=args[1].parameter, target=target, source=source))
            return args[0]
        result = super().__torch_function__(func, types, args, kwargs or {})
        origin = next((arg for arg in args if isinstance(arg, cls)), None)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, cls) and origin is not None:
                tensor.parameter, tensor.writes = origin.parameter, origin.writes
        return result


def trace_writes(load_weights: LoadWeights, learner: nn.Module) -> list[Write]:
    """The copies that `load_weights` makes of the learner's parameters; none is carried out.

    Raises:
        SamplerError: the loader refuses a parameter; it is named.
    """
    writes: list[Write] = []
    current = ""

    def weights() -> Iterator[tuple[str, Tensor]]:
        nonlocal current
        for name, parameter in learner.named_parameters():
            current = f"{name} {tuple(parameter.shape)}"
            yield name, _Traced.of(name, parameter, writes)

    try:
        with torch.no_grad():
            load_weights(weights())
    except (AssertionError, KeyError, ValueError, RuntimeError) as error:
        raise SamplerError(
            f"the sampler's model has no place for the learner's {current}: "
            f"{error or type(error).__name__}"
        ) from error
    return writes


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _check_sources(writes: list[Write], learner: nn.Module) -> None:
    """Every parameter of the learner is copied, whole, once, from its own memory."""
    for write in writes:
        if write.target.shape != write.source.shape:
            raise SamplerError(
                f"the learner's {write.name} is copied as {tuple(write.source.shape)} into "
                f"{tuple(write.target.shape)}: the sampler holds another model"
            )
    copied: dict[str, int] = {}
    for write in writes:
        copied[write.name] = copied.get(write.name, 0) + write.source.numel()
    addresses = {name: _address(p) for name, p in learner.named_parameters()}
    for write in writes:
        if _address(write.source) != addresses[write.name]:
            raise SamplerError(
                f"the sampler's loader transforms the learner's {write.name} instead of copying "
                "it: its weights cannot be kept up to date by a copy plan"
            )
    wrong = [
        f"{name} ({copied.get(name, 0)} of {p.numel()} elements)"
        for name, p in learner.named_parameters()
        if copied.get(name, 0) != p.numel()
    ]
    if wrong:
        raise SamplerError(
            f"the sampler's loader does not copy these learner parameters exactly once: "
            f"{_some(wrong)}"
        )


def _check_targets(writes: list[Write], sampler: nn.Module) -> None:
    """Every parameter of the sampler is written; only the rows that pad a vocabulary are not."""
    written: dict[int, int] = {}
    for write in writes:
        address = _address(write.target)
        written[address] = written.get(address, 0) + write.target.numel()
    for name, parameter in sampler.named_parameters():
        count = written.get(_address(parameter), 0)
        module = sampler.get_submodule(name.rpartition(".")[0])
        rows = getattr(module, "org_vocab_size", None)
        expected = parameter.numel() if rows is None else parameter[:rows].numel()
        if count != expected:
            raise SamplerError(
                f"the sampler's {name} {tuple(parameter.shape)} would get {count} of its "
                f"{expected} elements: the learner lacks a parameter, or ties one that the "
                "sampler does not tie"
            )


def _identity(learner: nn.Module) -> list[tuple[str, int, torch.dtype]]:
    return [(name, p.data_ptr(), p.dtype) for name, p in learner.named_parameters()]


class CopyPlan:
    """Every copy that publishing takes, for one learner and one sampler, found once.

    The plan holds views of both models, so parameters must be updated in place on both sides;
    `fits` says whether the learner's still are where they were. A dtype may differ: the copy
    rounds to the sampler's.
    """

    def __init__(self, load_weights: LoadWeights, sampler: nn.Module, learner: nn.Module) -> None:
        """Args:
            load_weights: writes named tensors into `sampler`, by `copy_`.
            sampler: the module whose parameters are written.
            learner: the module whose parameters are read; a tied one counts once.

        Raises:
            SamplerError: a parameter of either side has no counterpart of its shape; it is named.
        """
        writes = trace_writes(load_weights, learner)
        _check_sources(writes, learner)
        _check_targets(writes, sampler)
        self._targets = [write.target for write in writes]
        self._sources = [write.source for write in writes]
        self._identity = _identity(learner)
        self.num_bytes = sum(target.nbytes for target in self._targets)

    def fits(self, learner: nn.Module) -> bool:
        """Whether these are the parameters that the plan reads."""
        return self._identity == _identity(learner)

    @torch.no_grad()
    def replay(self) -> int:
        """Copy every parameter.

        Returns:
            Bytes written into the sampler.
        """
        torch._foreach_copy_(self._targets, self._sources)
        return self.num_bytes
