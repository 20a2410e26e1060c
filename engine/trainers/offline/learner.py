"""The model that learns from given data: its optimizer steps, its measurement, its state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from warpo.engine.config.offline import OfflineConfig
from warpo.engine.data.examples import Example
from warpo.engine.data.stream import PromptStream
from warpo.engine.errors import TrainingError
from warpo.engine.learner.losses import sequence_scores
from warpo.engine.learner.optimizer import gradient_norm, update_metrics
from warpo.engine.learner.schedule import make_optimizer
from warpo.engine.models.layers import prepare_layers
from warpo.engine.models.micro_batches import split_by_tokens
from warpo.engine.models.model import is_packed
from warpo.engine.models.score import device_of
from warpo.engine.run.checkpoint import Stateful
from warpo.engine.run.loop import Progress, Run, check_state, due
from warpo.engine.trainers.offline.objectives import (
    MicroBatch,
    OfflineObjective,
    every_completion,
    micro_batches,
    pack_sequences,
)
from warpo.engine.types import Metrics


class OfflineLearner:
    """A model, the loss of its algorithm and the examples that it learns from.

    Args:
        stream: the examples in the order in which they are drawn.
        examples: all of them.
        eval_examples: those to be measured on.
    """

    def __init__(
        self,
        config: OfflineConfig,
        run: Run,
        objective: OfflineObjective,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        stream: PromptStream[Example],
        examples: Sequence[Example],
        eval_examples: Sequence[Example],
    ) -> None:
        self.model, self.tokenizer, self.objective = model, tokenizer, objective
        self.examples, self.stream = examples, stream
        self._config, self._run, self._eval_examples = config, run, list(eval_examples)
        prepare_layers(model, config.update)
        self.optimizer, self.schedule = make_optimizer(
            model.named_parameters(),
            config.update,
            config.steps,
            ranks=run.ranks,
        )
        self.progress = Progress()
        self.progress.track(stream=stream)
        self._recent: list[Example] = []

    @property
    def step(self) -> int:
        """Steps whose update is complete."""
        return self.progress.step

    @property
    def stateful(self) -> dict[str, Stateful]:
        """State that a checkpoint keeps next to the weights."""
        return {"optimizer": self.optimizer, "schedule": self.schedule, "stream": self.stream}

    def update(self) -> Metrics:
        """One optimizer step on the next examples.

        Raises:
            TrainingError: the gradient is not finite; the step was not taken.
        """
        examples = self.stream.next()
        with self._run.log.phase("update"):
            vector = self._gradients(examples)
            self.progress.whole = False
            try:
                update = self.optimizer.step(self._config.update.max_grad_norm)
            except TrainingError:
                self.progress.whole = True
                raise
            lr = float(self.schedule.get_last_lr()[0])
            self.schedule.step()
        self.progress.complete()
        self._recent = examples
        tokens = self._run.ranks.sum(sum(example.num_tokens for example in examples))
        return _named("train", self.objective.read(vector)) | {
            "grad_norm": update.grad_norm.item(),
            "lr": lr,
            "epoch": self.stream.epoch,
            "perf/tokens": float(tokens),
            **update_metrics(self._run.ranks.gather([update])),
        }

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """Loss on the held-out examples, where it is due.

        Raises:
            KeyboardInterrupt: a stop was asked for.
        """
        every = self._config.evaluation.every_steps
        if not every or not (self.step == 0 or due(self.step, every, self._config.steps)):
            return {}
        with self._run.log.phase("evaluate"):
            asked = self.model.base_model.register_forward_pre_hook(
                lambda *_: self._run.raise_if_stopped()
            )
            try:
                vector = self._gradients(self._eval_examples)
            finally:
                asked.remove()
        return _named("eval", self.objective.read(vector))

    def finish(self) -> None:
        """Prove before a save that training can go on from the weights: loss and gradient are
        finite on examples of the last step. After the last one let the mean reward of the training
        completions be 0, where it is free.

        Raises:
            TrainingError: they are not.
        """
        if self._recent:
            loss = self.objective.read(self._gradients(self._recent, at_most=1))
            norm = gradient_norm(self.model.parameters()).item()
            self.optimizer.zero_grad(set_to_none=True)
            check_state(self.step, loss["loss"], norm, self._config.output_dir)
        if self.objective.normalise and self.step == self._config.steps:
            self._normalise()

    def _gradients(self, examples: Sequence[Example], at_most: int | None = None) -> Tensor:
        """Add the gradient of the first micro-batches, all if not given; the loss's metrics."""
        budget, device = self._config.update.token_budget, device_of(self.model)
        micro: list[MicroBatch] = micro_batches(
            examples, self._config.algorithm, budget, shared=is_packed(self.model)
        )
        chosen = [part.to(device) for part in micro[:at_most]]
        return self.objective.gradients(self.model, chosen, self._run.ranks)

    @torch.no_grad()
    def _normalise(self) -> None:
        self.model.config.reward_bias = 0.0
        scores: list[Tensor] = []
        with self._run.log.phase("normalise") as progress:
            budget, shared = self._config.update.token_budget, is_packed(self.model)
            micro = split_by_tokens(self.examples, budget, shared=shared)
            for done, examples in enumerate(micro, start=1):
                batch = pack_sequences(every_completion(examples)).to(device_of(self.model))
                scores.append(sequence_scores(self.model, batch).double())
                progress(done, len(micro))
        mean = torch.cat(scores).mean().item()
        self.model.config.reward_bias = -mean
        self._run.log.say(
            f"training completions score {mean:.4f} on average; reward_bias = {-mean:.4f}"
        )


def _named(prefix: str, metrics: Metrics) -> Metrics:
    """Common metrics and those of a row, all under train/ or eval/."""
    return {f"{prefix}/{name.replace('/', '_')}": value for name, value in metrics.items()}
