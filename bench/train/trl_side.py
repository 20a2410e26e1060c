"""The job on TRL: `GRPOTrainer`, its phases timed from outside. It samples with vLLM in the same
process, or with transformers' generate.

    python -m warpo.bench.train.trl_side JOB.json RESULT.json [--correction]

What TRL is given so that it works with vLLM's CPU build, or works better: float32 (it would sample
in bfloat16), the KV cache's size (it would take half of the memory and touch all of it), blocks of
32 tokens (128 share no prompt between completions), no detokenising, eager mode, and vLLM's
weights left unpacked: the packed ones cannot be loaded into. Without vLLM: that no token ends a
completion, which TRL takes for one that is None.
"""

from __future__ import annotations

import functools
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from warpo.bench.train.job import Clock, Job, read_job, reward, versions

IMPORTS = ("trl.trainer.grpo_trainer",)


def adapt_vllm(job: Job) -> None:
    """The settings of vLLM that `GRPOConfig` has no name for."""
    from trl.generation import vllm_generation  # isort: skip  # first, for it may be missing
    import torch
    import vllm.model_executor.layers.utils as layers
    import vllm.v1.sample.sampler as sampling

    def plain(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    replace: Any = setattr
    replace(layers, "dispatch_cpu_unquantized_gemm", plain)
    # compiling this count, a token's rank, takes seconds at first use and is slower than this
    replace(sampling, "batched_count_greater_than", lambda x, values: (x >= values).sum(-1))
    vllm_generation.LLM = functools.partial(
        vllm_generation.LLM,
        dtype="float32",
        kv_cache_memory_bytes=int(job.kv_cache_gib * 2**30),
        block_size=32,
        enforce_eager=True,
        skip_tokenizer_init=True,
    )


def sampling_of(job: Job, correction: bool) -> dict[str, Any]:
    """The part of `GRPOConfig` that says who samples."""
    if job.sampler == "transformers":
        return {"use_vllm": False, "generation_kwargs": {"eos_token_id": None}}
    return {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_max_model_length": job.max_model_len,
        "vllm_importance_sampling_correction": correction,
        "generation_kwargs": {"detokenize": False},
    }


def trainer_of(job: Job, output_dir: str, correction: bool, callback: Any) -> Any:
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    settings = GRPOConfig(
        output_dir=output_dir,
        max_steps=job.steps + job.warm_up,
        seed=job.seed,
        per_device_train_batch_size=job.completions,
        num_generations=job.group_size,
        max_completion_length=job.new_tokens,
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        loss_type="grpo",
        beta=0.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **sampling_of(job, correction),
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.model_path, dtype=torch.float32),
        reward_funcs=reward,
        args=settings,
        train_dataset=load_dataset("json", data_files=job.prompts_path, split="train"),
        processing_class=PreTrainedTokenizerFast.from_pretrained(job.model_path),
        callbacks=[callback],
    )
    if job.sampler == "transformers":
        trainer.eos_token_ids = [-1]
    return trainer


def watch(trainer: Any, clock: Clock) -> None:
    """Time the phases of a trainer's step."""
    import torch
    from accelerate.optimizer import AcceleratedOptimizer

    clock.watch_learner()
    if trainer.use_vllm:
        clock.wrap(trainer.vllm_generation, "generate", "sample")
        clock.wrap(trainer.vllm_generation, "sync_weights", "publish")
    else:
        clock.wrap(trainer, "_generate_single_turn", "sample")
    clock.wrap(trainer, "_calculate_rewards", "reward")
    clock.wrap(trainer.accelerator, "clip_grad_norm_", "optimizer")
    clock.wrap(AcceleratedOptimizer, "step", "optimizer")
    logprobs = trainer._get_per_token_logps_and_entropies

    def timed(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return logprobs(*args, **kwargs)
        with clock.phase("score"):
            return logprobs(*args, **kwargs)

    trainer._get_per_token_logps_and_entropies = timed


def main() -> None:
    job, result = read_job(sys.argv[1]), Path(sys.argv[2])
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM")
    from transformers import TrainerCallback

    if job.sampler == "vllm":
        adapt_vllm(job)
    clock = Clock()

    class AtStepEnd(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end_step()

    output_dir = str(result.with_suffix(""))
    trainer = trainer_of(job, output_dir, "--correction" in sys.argv, AtStepEnd())
    watch(trainer, clock)
    trainer.train()
    last = [row for row in trainer.state.log_history if "reward" in row][-1]
    answer = clock.answer(
        job.warm_up,
        completion_tokens=last["completions/mean_length"] * job.completions,
        reward=last["reward"],
        versions=versions(job, "trl", "accelerate", "datasets"),
    )
    result.write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
