"""Transfer of the learner's weights to the sampler: shared memory, or copies in buckets.

The sampler fuses, pads and renames parameters. Where each one goes is found by asking the
sampler's own weight loader: it is fed tensors that record the copies made from them, and the
recorded copies are the map from one model to the other. With "alias" the learner's parameters
become the places that the map names, views of the sampler's own storage: publishing then copies
nothing. With "copy" the map is replayed, a bucket at a time.

In both modes `Resync.verify` proves that the sampler holds what was published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from warpo.engine.errors import SamplerError, WeightMismatch
from warpo.kernels import ops

LoadWeights = Callable[[Iterable[tuple[str, Tensor]]], object]

BUCKET_BYTES = 256 * 2**20


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
    names = list(dict.fromkeys(names))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _storage(tensor: Tensor) -> int:
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
    storages = {name: _storage(p) for name, p in learner.named_parameters()}
    for write in writes:
        if _storage(write.source) != storages[write.name]:
            raise SamplerError(
                f"the sampler's loader transforms the learner's {write.name} instead of copying "
                "it: its weights cannot be kept equal to the learner's"
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
    """Every parameter of the sampler is written, once; only the rows that pad a vocabulary are
    not.
    """
    written: dict[int, int] = {}
    starts: dict[int, str] = {}
    for write in writes:
        storage = _storage(write.target)
        written[storage] = written.get(storage, 0) + write.target.numel()
        other = starts.setdefault(write.target.data_ptr(), write.name)
        if other != write.name:
            raise SamplerError(
                f"the sampler's loader writes the learner's {other} and {write.name} to one place"
            )
    for name, parameter in sampler.named_parameters():
        count = written.get(_storage(parameter), 0)
        module = sampler.get_submodule(name.rpartition(".")[0])
        rows = getattr(module, "org_vocab_size", None)
        expected = parameter.numel() if rows is None else parameter[:rows].numel()
        if count != expected:
            raise SamplerError(
                f"the sampler's {name} {tuple(parameter.shape)} would get {count} of its "
                f"{expected} elements: the learner lacks a parameter, or ties one that the "
                "sampler does not tie"
            )


def _checked_writes(
    load_weights: LoadWeights, sampler: nn.Module, learner: nn.Module
) -> list[Write]:
    writes = trace_writes(load_weights, learner)
    _check_sources(writes, learner)
    _check_targets(writes, sampler)
    return writes


def _obstacle(writes: Sequence[Write], learner: nn.Module) -> str | None:
    """Why the learner's parameters cannot be views of the sampler's storage; None: they can."""
    parameters = dict(learner.named_parameters())
    for write in writes:
        whole = parameters[write.name]
        if write.source.numel() != whole.numel():
            return f"the sampler keeps {write.name} {tuple(whole.shape)} in parts"
        if write.source.stride() != whole.stride() or write.target.stride(-1) != 1:
            return f"the sampler keeps {write.name} {tuple(whole.shape)} transposed"
        if write.target.is_inference():
            return f"the sampler made {write.name} in inference mode, where autograd cannot use it"
        if write.source.dtype != write.target.dtype:
            return (
                f"{write.name} is {write.source.dtype} with the learner and {write.target.dtype} "
                "with the sampler"
            )
    return None


def _rebind(learner: nn.Module, places: Mapping[str, Tensor]) -> None:
    """Make the places the learner's parameters; a tied one is replaced wherever it is used."""
    leaves = {
        id(parameter): nn.Parameter(places[name], requires_grad=parameter.requires_grad)
        for name, parameter in learner.named_parameters()
    }
    for module in learner.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = leaves[id(parameter)]


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...], torch.dtype]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.dtype


def _places(module: nn.Module) -> dict[str, tuple[int, tuple[int, ...], torch.dtype]]:
    """Return the place of each parameter; a tied one under each of its names."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: _place(parameter) for name, parameter in named}


def _moved(before: Mapping[str, Any], module: nn.Module) -> list[str]:
    now = _places(module)
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def _fingerprints(tensors: Iterable[Tensor]) -> Tensor:
    """Fingerprint any views: those that the kernel cannot read are made dense first."""
    return ops.fingerprint_foreach(
        [x if x.is_contiguous() or x.stride(-1) == 1 else x.contiguous() for x in tensors]
    )


class Resync:
    """One learner's weights in one sampler.

    The map holds views of both models, so parameters must be updated in place on both sides:
    `verify` says if one has moved.

    Attributes:
        mode: "alias": both models are one memory. "copy": each has its own.
        reason: why the mode is "copy" where "alias" was wanted too; else empty.
        extra_bytes: bytes of the learner's parameters outside the sampler's storage.
    """

    def __init__(
        self,
        load_weights: LoadWeights,
        sampler: nn.Module,
        learner: nn.Module,
        mode: Literal["alias", "copy", "auto"] = "auto",
        *,
        device: torch.device | str | None = None,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """The sampler holds the learner's values afterwards, and with "alias" the learner's
        parameters are new leaves: make the optimizer after this. Rows that pad a vocabulary stay
        the sampler's own.

        Args:
            load_weights: writes named tensors into `sampler`, by `copy_`.
            sampler: the module whose parameters are written.
            learner: the module whose parameters are read; a tied one counts once.
            mode: "auto" takes "alias" where every parameter allows it.
            device: where the learner computes: it is moved there, with "alias" without a second
                copy of its weights.
            bucket_bytes: bytes of the sampler's that one copy writes; a larger parameter is a
                bucket of its own.

        Raises:
            SamplerError: a parameter of either side has no counterpart of its shape, or the mode
                is "alias" and a parameter does not allow it; it is named.
        """
        writes = _checked_writes(load_weights, sampler, learner)
        obstacle = _obstacle(writes, learner) if mode != "copy" else None
        if mode == "alias" and obstacle:
            raise SamplerError(
                f"resync = alias is impossible: {obstacle}; set resync to copy or auto"
            )
        self.reason = obstacle or ""
        self.mode: Literal["alias", "copy"] = "copy" if mode == "copy" or obstacle else "alias"
        if self.mode == "copy" and device is not None:
            learner.to(device)
            writes = _checked_writes(load_weights, sampler, learner)
        self._sampler, self._learner, self._writes = sampler, learner, writes
        self._noted: dict[str, Tensor] = {}
        self._published = False
        self._buckets = _buckets(writes, bucket_bytes)
        self._copy()
        if self.mode == "alias":
            self._share(device)
        self._learner_places, self._sampler_places = _places(learner), _places(sampler)
        storages = {_storage(parameter) for parameter in sampler.parameters()}
        self.extra_bytes = sum(
            p.nbytes for p in learner.parameters() if _storage(p) not in storages
        )

    def _share(self, device: torch.device | str | None) -> None:
        """Make the learner's parameters views of the sampler's, which hold their values by now."""
        _rebind(self._learner, {write.name: write.target for write in self._writes})
        self._learner.to(device or self._writes[0].target.device)
        self._writes = [
            Write(name=write.name, target=write.target, source=write.target)
            for write in self._writes
        ]
        self._buckets = []

    @torch.no_grad()
    def _copy(self) -> int:
        for targets, sources in self._buckets:
            torch._foreach_copy_(targets, sources)
        return sum(target.nbytes for targets, _ in self._buckets for target in targets)

    def publish(self, fingerprints: Mapping[str, Tensor] | None = None) -> int:
        """Make the learner's weights the sampler's.

        Args:
            fingerprints: with "alias", what `verify` expects: of the learner's parameters by name,
                as the optimizer that wrote them reports them. Computed here where not given.

        Returns:
            Bytes copied: 0 with "alias".
        """
        num_bytes = self._copy()
        self._published = True
        if self.mode == "alias":
            # Two names of one memory: what it holds is noted while it is right.
            self._noted = self.fingerprints() if fingerprints is None else dict(fingerprints)
        return num_bytes

    def fingerprints(self) -> dict[str, Tensor]:
        """Fingerprint the learner's bits as the sampler should hold them, by parameter name."""
        parts = [
            _fingerprints(
                source.to(target.dtype) for target, source in zip(targets, sources, strict=True)
            )
            for targets, sources in self._places_to_read()
        ]
        names = [name for name, _ in self._named()]
        return dict(zip(names, torch.cat(parts).unbind(), strict=True))

    def _places_to_read(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Targets and sources: with "copy" one by one, since reading may convert or copy them."""
        if self.mode == "copy":
            return [([write.target], [write.source]) for write in self._writes]
        targets = [write.target for write in self._writes]
        return [(targets, targets)]

    def _named(self) -> Iterator[tuple[str, Write]]:
        """The writes by the name of their parameter, numbered where there are several."""
        counts: dict[str, int] = {}
        for write in self._writes:
            part = counts[write.name] = counts.get(write.name, -1) + 1
            yield (f"{write.name}[{part}]" if part else write.name), write

    def verify(self) -> None:
        """Prove that the sampler holds what was published last.

        Every parameter of both models is where it was, and the fingerprints of the sampler's bits
        are those that `publish` noted ("alias") or those of the learner's bits ("copy"). They are
        computed here, on the device: a read of the weights, or of both copies.

        Raises:
            WeightMismatch: the names of the parameters that have moved or that differ.
        """
        moved = _moved(self._sampler_places, self._sampler)
        if moved:
            raise WeightMismatch(
                f"these parameters of the sampler are no longer in the memory that is published "
                f"to: {_some(moved)}. Something has replaced them: a reload, a cast, .to()"
            )
        moved = _moved(self._learner_places, self._learner)
        if moved:
            raise WeightMismatch(
                f"these parameters of the learner are no longer in the memory that is published: "
                f"{_some(moved)}. Change parameters in place only: no .to(), .half(), p.data = ..."
            )
        if not self._published:
            raise WeightMismatch("nothing has been published yet: call publish first")
        names = [name for name, _ in self._named()]
        noted = self._noted if self.mode == "alias" else self.fingerprints()
        held = torch.cat([_fingerprints(targets) for targets, _ in self._places_to_read()])
        expected = torch.stack([noted[name].to(held.device) for name in names])
        differ = (expected != held).nonzero().flatten().tolist()
        if differ:
            raise WeightMismatch(
                "the sampler does not hold the weights that were published: "
                f"{_some(names[i] for i in differ)} ({len(differ)} of {len(names)} differ). "
                "Something wrote to them since, or a copy did not arrive"
            )


def _buckets(writes: Sequence[Write], bucket_bytes: int) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Targets and sources, in groups of at most `bucket_bytes`."""
    buckets: list[tuple[list[Tensor], list[Tensor]]] = []
    room = 0
    for write in writes:
        if not buckets or write.target.nbytes > room:
            buckets.append(([], []))
            room = bucket_bytes
        buckets[-1][0].append(write.target)
        buckets[-1][1].append(write.source)
        room -= write.target.nbytes
    return buckets
