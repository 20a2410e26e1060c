"""The frozen model that the KL is measured against, kept on disk for a run that resumes."""

from __future__ import annotations

import copy
import shutil
from contextlib import nullcontext
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from warpo.engine.config.algorithm import Algorithm
from warpo.engine.config.policy import Config
from warpo.engine.errors import CheckpointError, ConfigError
from warpo.engine.learner.adapters import Adapters
from warpo.engine.models.batch import Batch
from warpo.engine.models.model import load_model
from warpo.engine.models.score import device_of, score
from warpo.engine.run import checkpoint, manifest


class Reference:
    """The reference of a run; none where the algorithm has no KL to one.

    Args:
        adapters: of the policy, whose base is the reference then: no second model, none on disk.
    """

    def __init__(
        self, config: Config, algorithm: Algorithm, adapters: Adapters | None = None
    ) -> None:
        self._config, self._algorithm, self._adapters = config, algorithm, adapters
        self._model: PreTrainedModel | None = None

    def __bool__(self) -> bool:
        return self._model is not None

    def logprobs(self, batch: Batch) -> Tensor:
        """(M,) float32 of the trained tokens of a micro-batch."""
        assert self._model is not None
        with nullcontext() if self._adapters is None else self._adapters.base():
            return score(self._model, batch, self._config.rollout.temperature)

    def freeze(self, policy: PreTrainedModel) -> None:
        """Take the policy as it is."""
        if not self._algorithm.has_reference:
            return
        if self._adapters is None:
            self._model = copy.deepcopy(policy).requires_grad_(False).eval()
        else:
            self._model = policy

    def begin(self, policy: PreTrainedModel) -> None:
        """Freeze the model that step 1 starts from, and keep it on disk."""
        self.freeze(policy)
        if self._model is not None and self._adapters is None:
            # what an earlier run without a checkpoint has left is not this run's
            shutil.rmtree(self._root, ignore_errors=True)
            checkpoint.save_model(self._root / _step_name(0), self._model)

    def renew(self, policy: PreTrainedModel, step: int) -> None:
        """Make the policy after this step the reference, where it is due."""
        every = self._algorithm.reference_every_steps
        if self._model is None or not every or step % every:
            return
        self._model.load_state_dict(policy.state_dict())
        checkpoint.save_model(self._root / _step_name(step), self._model)
        # A run that resumes goes back to the oldest checkpoint at most.
        saved = checkpoint.complete(Path(self._config.output_dir) / "checkpoints")
        first = _step_of(saved[0]) if saved else 0
        older = [folder for folder in self._saved() if _step_of(folder) <= first]
        for folder in older[:-1]:
            shutil.rmtree(folder)

    def load(self, policy: PreTrainedModel, step: int) -> None:
        """Take the reference that a resumed run had after the step that it resumes from."""
        if not self._algorithm.has_reference or self._adapters is not None:
            self.freeze(policy)
            return
        before = [folder for folder in self._saved() if _step_of(folder) <= step]
        if not before:
            raise ConfigError(
                f"{self._root} has no reference model of step {step} or before: the run began "
                "without one, so loss.kl_coef must be 0"
            )
        try:
            manifest.check(before[-1])
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}: a run cannot be resumed without its reference model; begin one from the "
                "weights, with another output_dir"
            ) from None
        config = self._config
        model = load_model(str(before[-1]), config.dtype, device_of(policy), config.lm_head_dtype)
        self._model = model.requires_grad_(False).eval()

    @property
    def _root(self) -> Path:
        return Path(self._config.output_dir) / "reference"

    def _saved(self) -> list[Path]:
        """Oldest first."""
        return sorted(self._root.glob("step-*"), key=_step_of)


def _step_name(step: int) -> str:
    return f"step-{step:06d}"


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
