"""The adapters of a policy: merged into its weights after an optimizer step, and kept in the format
of PEFT.

    adapter_model.safetensors   base_model.model.<layer>.lora_A.weight (rank, in) and lora_B.weight
                                (out, rank), float32
    adapter_config.json         rank, alpha, the layers by name, and the directory of the base
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from warpo.engine.config.lora import LoraSettings
from warpo.engine.errors import CheckpointError, WeightMismatch
from warpo.engine.learner.optimizer import WeightUpdate
from warpo.engine.models.lora import LoraLinear, attach
from warpo.kernels import ops

# Rows of a weight that are merged at a time, in elements: their product is float32.
TILE = 4 << 20
_PREFIX = "base_model.model."


class Adapters:
    """Adapters of a policy.

    Args:
        model: whose parameters lie where they stay; its class of target layers is replaced.
        path: directory of the model, for PEFT.

    Attributes:
        layers: those that have one, by name.
        fingerprints: of the model's parameters by name, as `merge` wrote them last.

    Raises:
        ConfigError: see `warpo.engine.models.lora.targets_of`.
    """

    def __init__(
        self, model: PreTrainedModel, settings: LoraSettings, *, seed: int, path: str
    ) -> None:
        self._settings, self._path = settings, path
        self._computes_base = False
        self.layers: dict[str, LoraLinear] = attach(
            model, settings, seed=seed, computes_base=lambda: self._computes_base
        )
        self.fingerprints = _fingerprints(dict(model.named_parameters()))
        self._base = {name: int(value) for name, value in self.fingerprints.items()}

    def __str__(self) -> str:
        learned = sum(parameter.numel() for _, parameter in self.named_parameters())
        return (
            f"LoRA: adapters of rank {self._settings.rank} on {len(self.layers)} layers, "
            f"{learned / 1e6:.3g} M parameters that learn"
        )

    @contextmanager
    def base(self) -> Iterator[None]:
        """Let the model compute with W0, which is the reference."""
        self._computes_base = True
        try:
            yield
        finally:
            self._computes_base = False

    @torch.no_grad()
    def merge(self) -> WeightUpdate:
        """Write W = round(W0 + s B A) where learner and sampler read it.

        Returns:
            What it wrote, `master_update` being the sum of |s B A| and `published_update` that of
            |W - W0|; grad_norm is NaN.
        """
        device = next(iter(self.layers.values())).weight.device
        changed = torch.zeros((), dtype=torch.int64, device=device)
        master, published = torch.zeros((), device=device), torch.zeros((), device=device)
        total = 0
        for name, layer in self.layers.items():
            merged = torch.empty(layer.weight.shape, dtype=layer.weight.dtype, device=device)
            for rows in _tiles(layer.weight):
                wanted, moved = _merge_rows(layer, merged, rows)
                master += wanted
                published += moved
            changed += _count_changed(merged, layer.weight)
            # of what was computed, not of what is read back: a write that is lost is found by it
            self.fingerprints[f"{name}.weight"] = ops.fingerprint(merged)
            _write(layer.weight, merged)
            total += merged.numel()
        nothing = torch.full((), torch.nan, device=device)
        return WeightUpdate(dict(self.fingerprints), changed, total, master, published, nothing)

    def after(self, update: WeightUpdate) -> WeightUpdate:
        """Merge after an optimizer step; the step's effect on the weights of the model."""
        names = {name for name, _ in self.named_parameters()}
        others = {name: x for name, x in update.fingerprints.items() if name not in names}
        merged = self.merge()
        return merged._replace(
            fingerprints=merged.fingerprints | others, grad_norm=update.grad_norm
        )

    def check_base(self) -> None:
        """Prove that W0 of every layer is what the run began with.

        Raises:
            WeightMismatch: something has written to one; it is named.
        """
        for name, layer in self.layers.items():
            if ops.fingerprint(layer.adapter.base).item() != self._base[f"{name}.weight"]:
                raise WeightMismatch(
                    f"the base weight of {name} is not what the run began with: something has "
                    "written to it, and nothing made of it is saved"
                )

    def check_merged(self) -> None:
        """Prove that the learner's own weights are those that `merge` computed.

        Raises:
            WeightMismatch: a write of them was lost, or something has written to one.
        """
        for name, layer in self.layers.items():
            if ops.fingerprint(layer.weight) != self.fingerprints[f"{name}.weight"]:
                raise WeightMismatch(
                    f"the learner does not hold the merged weight of {name}: the write of its "
                    "adapters did not arrive, or something wrote to it since"
                )

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those that learn, by PEFT's names."""
        for name, layer in self.layers.items():
            yield f"{_PREFIX}{name}.lora_A.weight", layer.adapter.a
            yield f"{_PREFIX}{name}.lora_B.weight", layer.adapter.b

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors of adapter_model.safetensors, which share memory with the parameters."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write the two files of PEFT.

        Args:
            options: state_dict, instead of `self.state_dict()`.
        """
        tensors = options.get("state_dict", self.state_dict())
        tensors = {name: x.cpu().contiguous() for name, x in tensors.items()}
        save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(self._config(), indent=2)
        (Path(folder) / "adapter_config.json").write_text(text + "\n", encoding="utf-8")

    def _config(self) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self._path,
            "r": self._settings.rank,
            "lora_alpha": self._settings.alpha,
            "target_modules": sorted(self.layers),
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }

    @property
    def record(self) -> BaseRecord:
        """What a checkpoint keeps of the base."""
        return BaseRecord(self._base)


class BaseRecord:
    """Fingerprints of the model that adapters belong to."""

    def __init__(self, fingerprints: Mapping[str, int]) -> None:
        self._fingerprints = dict(fingerprints)

    def state_dict(self) -> dict[str, int]:
        return self._fingerprints

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Compare with those of a checkpoint.

        Raises:
            CheckpointError: its adapters are of another base.
        """
        for name in sorted(state.keys() | self._fingerprints.keys()):
            if state.get(name) != self._fingerprints.get(name):
                raise CheckpointError(
                    f"its adapters are of another base: {name} of model is not what it was; set "
                    "model to the one that the run began with"
                )


def _fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = ops.fingerprint_foreach([tensor.detach() for tensor in tensors.values()])
    return dict(zip(tensors, found.unbind(), strict=True))


def _tiles(weight: Tensor) -> Iterator[slice]:
    step = max(1, TILE // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)


def _merge_rows(layer: LoraLinear, merged: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Fill some rows; the sums of |s B A| and of |W - W0| over them."""
    adapter = layer.adapter
    base = adapter.base[rows].to(merged.device, torch.float32)
    product = (adapter.b[rows] @ adapter.a).mul_(adapter.scale)
    wanted = product.abs().sum()
    merged[rows] = product.add_(base)
    return wanted, (merged[rows].float() - base).abs().sum()


def _count_changed(merged: Tensor, weight: Tensor) -> Tensor:
    bits = torch.int32 if merged.dtype == torch.float32 else torch.int16
    return (merged.view(bits) != weight.detach().contiguous().view(bits)).sum()


def _write(weight: Tensor, merged: Tensor) -> None:
    weight.copy_(merged)
