"""The samplers: what is known of each before one is built.

Nothing heavy is imported here: `warpo train --help` and the checks of a config read this table.
"""

from __future__ import annotations

from dataclasses import dataclass

# what rollout/sampler/vllm_internals.py was written for
SUPPORTED_VLLM = ">=0.32,<0.33"


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerKind:
    """A sampler.

    Attributes:
        name: as the config has it.
        title: name of its library in messages.
        opener: "module:function"; of `SamplerSettings` it makes a `ColocatedSampler`.
        package: a package that it needs besides those of the engine; empty: none.
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
        """True if it holds a KV cache of rollout.kv_cache_gib between calls."""
        return bool(self.memory)


_KINDS = (
    SamplerKind(
        name="vllm",
        title="vLLM",
        opener="warpo.engine.rollout.sampler.vllm_sampler:open_sampler",
        package="vllm",
        memory="warpo.engine.rollout.sampler.vllm_memory:VllmMemory",
    ),
    SamplerKind(
        name="transformers",
        title="transformers",
        opener="warpo.engine.rollout.sampler.hf_sampler:open_sampler",
    ),
)
SAMPLERS = {kind.name: kind for kind in _KINDS}
