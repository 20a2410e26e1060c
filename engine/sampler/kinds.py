"""The samplers: what is known of each before one is built.

Nothing heavy is imported here: `warpo train --help` and the checks of a config read this table.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from warpo.engine.config import Config
    from warpo.engine.sampler.base import ColocatedSampler, SamplerMemory, SamplerSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerKind:
    """A sampler.

    Attributes:
        name: as the config has it.
        title: of its library, in messages.
        opener: "module:function"; of `SamplerSettings` it makes a `ColocatedSampler`.
        package: what must be installed besides what the engine itself needs; empty: nothing.
        memory: "module:class", its `SamplerMemory`, made of a config, the model's config and a
            device; empty: it has no KV cache between calls, and its memory is not planned.
    """

    name: str
    title: str
    opener: str
    package: str = ""
    memory: str = ""

    @property
    def has_kv_cache(self) -> bool:
        """Whether it holds a KV cache of rollout.kv_cache_gib between calls."""
        return bool(self.memory)

    def open(self, settings: SamplerSettings) -> ColocatedSampler:
        """The sampler, with the weights of the checkpoint.

        Raises:
            SamplerError: its library or the model does not allow it.
        """
        sampler: ColocatedSampler = pkgutil.resolve_name(self.opener)(settings)
        return sampler

    def plan(
        self, config: Config, hf_config: PretrainedConfig, device: torch.device
    ) -> SamplerMemory | None:
        """What it will hold in memory, where that is planned."""
        if not self.memory:
            return None
        memory: SamplerMemory = pkgutil.resolve_name(self.memory)(config, hf_config, device)
        return memory


_KINDS = (
    SamplerKind(
        name="vllm",
        title="vLLM",
        opener="warpo.engine.sampler.vllm:open_sampler",
        package="vllm",
        memory="warpo.engine.sampler.vllm_memory:VllmMemory",
    ),
    SamplerKind(
        name="transformers",
        title="transformers",
        opener="warpo.engine.sampler.transformers:open_sampler",
    ),
)
SAMPLERS = {kind.name: kind for kind in _KINDS}
