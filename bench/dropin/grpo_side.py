"""TRL's GRPOTrainer on a job, as it is or with warpo's kernels in it.

python -m warpo.bench.dropin.grpo_side JOB.json RESULT.json [--patch] [--bf16]

Samples by `generate` of transformers; completions have their full length. Every sample is used for
two updates, and there is a KL term: so the loss has ratios that are not 1, bounds that clip, and a
reference.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

from warpo.bench.train.job import Clock, Job, read_job, reward


def trainer_of(job: Job, output_dir: str, callback: Any, **settings: Any) -> Any:
    """A GRPOTrainer; settings of `GRPOConfig` take the place of those here."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    config: dict[str, Any] = dict(
        output_dir=output_dir,
        max_steps=job.steps + job.warm_up,
        seed=job.seed,
        per_device_train_batch_size=job.completions,
        num_generations=job.group_size,
        max_completion_length=job.new_tokens,
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        loss_type="dapo",
        beta=0.04,
        num_iterations=2,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.model_path, dtype=torch.float32),
        reward_funcs=reward,
        args=GRPOConfig(**config | settings),
        train_dataset=load_dataset("json", data_files=job.prompts_path, split="train"),
        # TRL cannot do without one; it comes behind the model's vocabulary, so no completion has it
        processing_class=PreTrainedTokenizerFast.from_pretrained(job.model_path, eos_token="end"),
        callbacks=[callback],
    )


def counting_losses(calls: list[int]) -> contextlib.AbstractContextManager:
    """Within it, every call of `ops.policy_loss` adds an element to calls."""
    from unittest import mock

    from warpo.kernels import ops

    policy_loss = ops.policy_loss

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return policy_loss(*args, **kwargs)

    return mock.patch.object(ops, "policy_loss", counted)


def train(
    job: Job, output_dir: str, patched: bool, clock: Clock, **settings: Any
) -> list[dict[str, float]]:
    """Train, and return the trainer's log of each step.

    Args:
        patched: with all replacements of `warpo.kernels.integrations.trl`.
        clock: times the steps.
    """
    from transformers import TrainerCallback

    from warpo.kernels.integrations import trl

    class AtStepEnd(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end_step()

    with trl.patch() if patched else contextlib.nullcontext():
        trainer = trainer_of(job, output_dir, AtStepEnd(), **settings)
        clock.wrap(trainer, "_generate", "sample")
        trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def main() -> None:
    job, result, patched = read_job(sys.argv[1]), Path(sys.argv[2]), "--patch" in sys.argv
    clock = Clock()
    clock.watch_learner()
    calls: list[int] = []
    with counting_losses(calls):
        logs = train(job, str(result.with_suffix("")), patched, clock, bf16="--bf16" in sys.argv)
    wanted = job.steps + job.warm_up if patched else 0
    if len(calls) != wanted:
        sys.exit(f"warpo's loss was called {len(calls)} times in {len(logs)} steps, not {wanted}")
    from warpo.kernels.integrations import trl

    names = ("torch", "trl", "transformers", "accelerate")
    answer = clock.answer(
        job.warm_up,
        logs=logs,
        replaced=trl.names() if patched else [],
        losses_by_warpo=len(calls),
        calls={
            name: {"served": found.calls.served, "passed_on": dict(found.calls.passed_on)}
            for name, found in trl.library.replacements.items()
        },
        versions={name: importlib.metadata.version(name) for name in names},
    )
    result.write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
