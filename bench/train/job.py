"""The job that both trainers run: model, data and reward, made on the spot and equal for both.

The tokenizer and the model name no end-of-sequence token, so every completion has its full length
and both trainers see equal token counts. Words stand for tokens: "w7" is token 7.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Shapes of Qwen2; "tiny" is that of the main job (1.7 M parameters).
MODELS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=64,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        intermediate_size=768,
    ),
    "20m": dict(
        vocab_size=8192,
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=1408,
    ),
    "32k": dict(
        vocab_size=32000,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=768,
    ),
    "100m": dict(
        vocab_size=32768,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=2,
        intermediate_size=2304,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A GRPO run of one model: AdamW, one update a step, no KL term, float32.

    Attributes:
        folder: holds `model`, `prompts.jsonl` and what the runs write.
        sampler: vllm | transformers, of both trainers.
        steps: timed optimizer steps of one process; `warm_up` more go before them.
        group_size: completions of each prompt.
        new_tokens: length of every completion.
    """

    folder: str
    model: str
    sampler: str
    steps: int
    warm_up: int
    prompts_per_step: int
    group_size: int
    prompt_tokens: int
    new_tokens: int
    lr: float
    kv_cache_gib: float
    seed: int = 0

    @property
    def model_path(self) -> str:
        return str(Path(self.folder) / "model")

    @property
    def prompts_path(self) -> str:
        return str(Path(self.folder) / "prompts.jsonl")

    @property
    def completions(self) -> int:
        return self.prompts_per_step * self.group_size

    @property
    def max_model_len(self) -> int:
        return self.prompt_tokens + self.new_tokens

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def read_job(path: str | Path) -> Job:
    return Job(**json.loads(Path(path).read_text(encoding="utf-8")))


def reward(completions: Sequence[str], **_: object) -> list[float]:
    """Share of even tokens in each completion."""
    words = [completion.split() for completion in completions]
    return [sum(word[-1] in "02468" for word in row) / max(1, len(row)) for row in words]


def make(job: Job) -> int:
    """Write model, tokenizer and prompts into the job's folder.

    Returns:
        Bytes of the model's weights.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    shape = MODELS[job.model]
    words = {f"w{i}": i for i in range(shape["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0").save_pretrained(
        job.model_path
    )
    config = Qwen2Config(
        **shape,
        max_position_embeddings=job.max_model_len,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(job.seed)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(job.model_path)
    rng = random.Random(job.seed)
    rows = (
        [f"w{rng.randrange(1, shape['vocab_size'])}" for _ in range(job.prompt_tokens)]
        for _ in range(job.prompts_per_step * (job.steps + job.warm_up))
    )
    lines = [json.dumps({"prompt": " ".join(row)}) + "\n" for row in rows]
    Path(job.prompts_path).write_text("".join(lines), encoding="utf-8")
    return sum(parameter.nbytes for parameter in model.parameters())


def memory_bytes(field: str) -> int:
    """Memory of this process that is resident, "VmRSS", or the most that was so far, "VmHWM"."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only")


class Clock:
    """Seconds of the phases of a step, and at its end the step itself.

    Attributes:
        steps: of each step but the first: seconds by phase, "step" and "cpu".
        resident_bytes: memory before the first update, which holds weights, KV cache and no
            gradients or moments yet.
        peak_bytes: the most memory until the end of the last step.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.resident_bytes = self.peak_bytes = 0
        self.phases: dict[str, float] = {}
        self._end: tuple[float, float] | None = None
        self._forward_start: float | None = None

    def add(self, phase: str, seconds: float) -> None:
        self.phases[phase] = self.phases.get(phase, 0.0) + seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Count the time in owner.attribute as phase `name`."""
        function = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        setattr(owner, attribute, timed)

    def watch_learner(self) -> None:
        """Time "forward", from the model's call with gradients to the call of backward (the loss
        is part of it), and "backward".
        """
        import torch
        from transformers import Qwen2Model

        forward, backward = Qwen2Model.forward, torch.Tensor.backward

        def timed_forward(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                if not self.resident_bytes:
                    ctypes.CDLL(None).malloc_trim(0)  # lest loading's freed memory count
                    self.resident_bytes = memory_bytes("VmRSS")
                self._forward_start = time.perf_counter()
            return forward(*args, **kwargs)

        def timed_backward(*args: Any, **kwargs: Any) -> None:
            assert self._forward_start is not None
            self.add("forward", time.perf_counter() - self._forward_start)
            with self.phase("backward"):
                backward(*args, **kwargs)

        replace: Callable[..., None] = setattr
        replace(Qwen2Model, "forward", timed_forward)
        replace(torch.Tensor, "backward", timed_backward)

    def end_step(self, **phases: float) -> None:
        """Close a step: it began where the last one ended, and all that no phase counted is
        "other". "cpu" is the processor time of all threads, which other processes do not stretch.
        """
        now, cpu = time.perf_counter(), time.process_time()
        found = self.phases | phases
        if self._end is not None:
            start, cpu_start = self._end
            found["other"] = now - start - sum(found.values())
            self.steps.append({"step": now - start, "cpu": cpu - cpu_start} | found)
        self.phases, self._end = {}, (now, cpu)
        self.peak_bytes = memory_bytes("VmHWM")

    def answer(self, warm_up: int, **figures: Any) -> dict[str, Any]:
        """Report of a side: its steps without those that warm up, its memory and `figures`."""
        return {
            "steps": self.steps[warm_up - 1 :],
            "resident_bytes": self.resident_bytes,
            "peak_bytes": self.peak_bytes,
        } | figures


def versions(job: Job, *names: str) -> dict[str, str]:
    """Versions of what a side runs on, and of these distributions."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers", *names)}
    if job.sampler == "vllm":
        import vllm  # the distribution's name differs from build to build

        found["vllm"] = vllm.__version__
    return found
