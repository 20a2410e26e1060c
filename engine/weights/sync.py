"""The learner's weights in the sampler: published after every step, and proven to be there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from warpo.engine.config.policy import Config
from warpo.engine.errors import WeightMismatch
from warpo.engine.learner.learner import Learner
from warpo.engine.rollout.sampler.base import ColocatedSampler
from warpo.engine.run.loop import Run
from warpo.engine.types import Metrics
from warpo.engine.weights import mismatch
from warpo.engine.weights.probe import probe_weights
from warpo.engine.weights.resync import Resync


class WeightSync:
    """One learner's weights in one sampler: `publish`, then `verify`.

    Args:
        resync: transfer of the weights to the sampler.
    """

    def __init__(
        self, config: Config, run: Run, learner: Learner, sampler: ColocatedSampler, resync: Resync
    ) -> None:
        self.resync = resync
        self._config, self._run, self._learner, self._sampler = config, run, learner, sampler

    def __str__(self) -> str:
        if self.resync.mode == "alias":
            return (
                "resync: alias, learner and sampler share one copy of the weights; 0 bytes to copy"
            )
        why = f", as {self.resync.reason}" if self.resync.reason else ""
        return f"resync: copy, {self.resync.extra_bytes / 1e6:.1f} MB of weights twice{why}"

    def publish(self, step: int) -> Metrics:
        """Make the learner's weights the sampler's, as those after `step`."""
        log = self._run.log
        with log.phase("publish"):
            copied = self.resync.publish(self._learner.fingerprints)
            self._sampler.weights_changed(step)
        with log.phase("resume"):
            self._sampler.resume_kv()
        return {
            "publish/bytes": float(copied),
            "publish/extra_weight_bytes": float(self.resync.extra_bytes),
            "publish/version": float(self._sampler.weight_version),
        }

    def verify(self, sequences: Sequence[Sequence[int]], *, probe: bool = True) -> Metrics:
        """Prove that the sampler holds what was published, and computes with it.

        Args:
            sequences: token ids that both score, two or more each.
            probe: let them; without, what is sampled next has to prove it (`Drift.check`).

        Raises:
            WeightMismatch: it does not; the weights count as lost then.
        """
        with self._run.log.phase("verify"):
            # what overwrites the sampler's weights overwrites the learner's where they are one
            with self._lost_unless(self.resync.mode == "copy"):
                self.resync.verify()
                # with one memory for both, what the sampler holds was compared with the merge
                if self._learner.adapters is not None and self.resync.mode == "copy":
                    self._learner.adapters.check_merged()
            if probe and sequences:
                self._sampler.check_prefixes(max(sequences, key=len))
        config, learner = self._config, self._learner
        if not probe or not config.probe.num_sequences:
            return {}
        with self._run.log.phase("probe"), self._lost_unless(False):
            probed = probe_weights(
                learner.model,
                self._sampler,
                sequences,
                config.probe_tolerance,
                learner.tokenizer.decode,
            )
            metrics = mismatch.kernels(probed)
            return metrics | mismatch.composition(learner.model, sequences, probed)

    @contextmanager
    def _lost_unless(self, kept: bool) -> Iterator[None]:
        try:
            yield
        except WeightMismatch:
            self._learner.progress.whole = kept
            raise
