"""Peak memory of a phase: on a GPU of PyTorch's allocator, on a CPU of the resident set."""

from __future__ import annotations

import ctypes
import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from warpo.engine.config.policy import Config
from warpo.engine.learner.optimizer import AdamW
from warpo.engine.learner.step import accumulate_gradients
from warpo.engine.models.files import read_config
from warpo.engine.models.layers import prepare_layers
from warpo.engine.models.model import load_model
from warpo.engine.plan.memory import Shape, rollouts_of
from warpo.engine.rollout.sampler.base import SamplerSettings, SamplingOptions, open_sampler
from warpo.engine.run.process import return_freed_memory
from warpo.engine.weights.resync import Resync
from warpo.kernels.objectives import OBJECTIVES


class PeakMemory:
    """Peaks of phases, in bytes above what the process held when this was built."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.peaks: dict[str, int] = {}
        if not self._cuda:
            return_freed_memory()
        self._baseline = self._reset()

    @property
    def what(self) -> str:
        if self._cuda:
            return "torch.cuda.max_memory_allocated"
        return "resident set above that after imports"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what runs within; of several of one name the largest counts."""
        self._reset()
        yield
        peak = torch.cuda.max_memory_allocated() if self._cuda else _resident("VmHWM")
        self.peaks[name] = max(self.peaks.get(name, 0), peak - self._baseline)

    def _reset(self) -> int:
        """Forget the peak; returns what is held now."""
        gc.collect()
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        ctypes.CDLL(None).malloc_trim(0)
        # 5 sets the peak back to what is resident now, `man 5 proc`
        Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS")


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def rehearse(config: Config, device: torch.device) -> object:
    """Sample, publish and update once with one layer of the model and a small vocabulary.

    Code is loaded when it first runs, vLLM's above all: 0.2 GiB of the resident set that no config
    can foresee.

    Returns:
        An object to keep alive, lest its memory be used again.
    """
    if device.type == "cuda":
        return None  # its allocator counts only tensors
    hf_config = read_config(config.model)
    hf_config.num_hidden_layers, hf_config.vocab_size, hf_config.pad_token_id = 1, 64, None
    if getattr(hf_config, "layer_types", None):
        hf_config.layer_types = hf_config.layer_types[:1]
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).save_pretrained(folder)
        model = load_model(folder, config.dtype, device)
        prepare_layers(model, config.update)
        settings = SamplerSettings(
            model_path=folder,
            dtype=config.dtype,
            max_model_len=32,
            eos_token_ids=[1],
            kv_cache_gib=1 / 64,
            device=device,
        )
        sampler = open_sampler(config.sampler, settings)
    shape = Shape(sequences=4, prompt_tokens=8, completion_tokens=8)
    batch = rollouts_of(shape, 64).batch(range(4))
    resync = Resync(sampler.load_weights, sampler.module, model, config.resync)
    optimizer = AdamW(model.named_parameters(), lr=1e-3)
    for _ in range(2):
        options = SamplingOptions(group_size=2, temperature=1.0, max_new_tokens=4, seed=0)
        sampler.generate([[2, 3, 4]] * 4, options)
        sampler.score([[2, 3, 4]])
        objective = OBJECTIVES["grpo"].replace(kl_coef=0.0)
        accumulate_gradients(model, [batch], objective, temperature=1.0, max_new_tokens=8)
        optimizer.step(max_grad_norm=1.0)
        resync.publish()
        sampler.weights_changed(1)
        resync.verify()
    return model, sampler, optimizer
