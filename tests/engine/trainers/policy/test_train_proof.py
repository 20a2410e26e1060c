"""Faults that other systems shipped, planted: each is caught in the step in which it happens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.random_models import new_learner
from tests.engine.runs import train
from warpo.engine.errors import WeightMismatch
from warpo.engine.rollout.sampler.hf_sampler import TransformersSampler
from warpo.engine.rollout.sampler.vllm_sampler import VllmSampler
from warpo.engine.weights.resync import Resync

SAMPLERS = {"vllm": VllmSampler, "transformers": TransformersSampler}


@pytest.fixture
def run_with_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Train until step 2, before which or in which `fault(sampler)` happens: after `method` of it
    was called, when it held that version of the weights.
    """

    def run(
        kind: str,
        mode: str,
        method: str,
        fault: Callable[[Any], None],
        *settings: str,
        version: int = 2,
    ) -> None:
        original = getattr(SAMPLERS[kind], method)

        def faulty(self: Any, *args: Any, **options: Any) -> Any:
            result = original(self, *args, **options)
            if self.weight_version == version:
                fault(self)
            return result

        monkeypatch.setattr(SAMPLERS[kind], method, faulty)
        try:
            train(folder, "--sampler", kind, "--resync", mode, *settings)
        finally:
            rows = (folder / "out/metrics.jsonl").read_text().splitlines()
            assert json.loads(rows[-1])["step"] == 2

    return run


@pytest.mark.parametrize("resumed", [False, True])
def test_a_publish_that_does_not_arrive(
    folder: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool
) -> None:
    """The publish after step 2; and the first of a run that resumes after it, with a learner that
    has moved away from the model that the sampler has loaded.
    """
    settings = ["--sampler", "transformers", "--resync", "copy"]
    if resumed:
        train(folder, *settings, "--steps", "2")
        settings.append("--resume")
    copy, copies = Resync._copy, iter(range(-1, 9))

    def lose(self: Resync) -> int:
        # The first one, -1, gives the sampler the learner's values when both are made.
        return 0 if next(copies) == (0 if resumed else 2) else copy(self)

    monkeypatch.setattr(Resync, "_copy", lose)
    with pytest.raises(WeightMismatch, match="does not hold the weights that were published"):
        train(folder, *settings)
    # The learner's update of the step is kept.
    saved = sorted(path.name for path in (folder / "out/checkpoints").iterdir())
    assert saved[-1] == "step-000002"


@pytest.mark.parametrize("mode", ["alias", "copy"])
def test_weights_restored_from_the_checkpoint_after_sleep(
    run_with_fault: Callable[..., None],
    folder: Path,
    kind: str,
    mode: str,
) -> None:
    def restore(sampler: Any) -> None:
        with torch.no_grad():
            sampler.load_weights(new_learner("qwen2").named_parameters())

    with pytest.raises(WeightMismatch, match="does not hold the weights that were published"):
        run_with_fault(kind, mode, "resume_kv", restore)
    # With one memory for both the learner's weights are lost too, and must not be saved.
    saved = sorted(path.name for path in (folder / "out/checkpoints").iterdir())
    assert saved[-1] == ("step-000000" if mode == "alias" else "step-000002")


def test_one_stale_tied_head(run_with_fault: Callable[..., None], kind: str) -> None:
    """The head gets memory of its own, and stays behind when the embedding is written."""

    def untie(sampler: Any) -> None:
        head = sampler.module.get_submodule("lm_head")
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)

    with pytest.raises(WeightMismatch, match="these parameters of the sampler .*: lm_head.weight"):
        run_with_fault(kind, "auto", "weights_changed", untie)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param([], id="evaluated"),
        pytest.param(["--evaluation.every_steps", "0"], id="scored"),
        pytest.param(
            [
                *("--evaluation.every_steps", "0"),
                *("--update.epochs", "1", "--update.minibatches", "1"),
            ],
            id="scored by the update",
        ),
    ],
)
def test_a_head_that_computes_with_a_stale_copy(
    run_with_fault: Callable[..., None], folder: Path, kind: str, settings: list[str]
) -> None:
    """All bits are right, and a packed copy of them is not: only the logprobs can tell, before the
    evaluation of the step, and where there is none those of what is drawn next, by a forward pass
    for them or by that of the step's only update.
    """

    def pack(sampler: Any) -> None:
        head = sampler.module.get_submodule("lm_head")
        packed = 1.1 * head.weight.detach()

        def scaled(*args: Any, **options: Any) -> Any:
            hidden = args[-1] if args[-1] is not None and args[-1].dim() > 1 else args[1]
            return nn.functional.linear(hidden, packed)

        if kind == "transformers":
            head.forward = scaled
        else:
            head.quant_method.apply = lambda layer, hidden, bias=None: scaled(hidden)

    refusal = r"the sampler does not compute what the learner does \(version 2 "
    with pytest.raises(WeightMismatch, match=refusal):
        run_with_fault(kind, "auto", "weights_changed", pack, *settings)
    # A step that failed its probe is not the newest good one.
    saved = [path.name for path in (folder / "out/checkpoints").iterdir()]
    assert saved == ["step-000000"]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_one_bucket_not_sent(
    run_with_fault: Callable[..., None], monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str
) -> None:
    buckets: list[Any] = []
    copy = Resync._copy

    def lose(self: Resync) -> int:
        if self._buckets and buckets:
            self._buckets = [b for b in self._buckets if b[0][0].data_ptr() != buckets[-1]]
        return copy(self)

    def ask_for_loss(sampler: Any) -> None:
        buckets.append(sampler.module.get_submodule("model.norm").weight.data_ptr())

    monkeypatch.setitem(Resync.__init__.__kwdefaults__, "bucket_bytes", 1)
    monkeypatch.setattr(Resync, "_copy", lose)
    with pytest.raises(WeightMismatch, match=r"published: model.norm.weight \(1 of 26 differ\)"):
        run_with_fault(kind, "copy", "release_kv", ask_for_loss, "--dtype", dtype, version=1)


def test_a_stale_prefix_cache(
    run_with_fault: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep_cache(sampler: Any) -> None:
        sampler._llm.reset_prefix_cache = lambda: True
        # Releasing the KV cache forgets prefixes as well.
        sampler._can_release_kv = False

    with pytest.raises(WeightMismatch, match=r"vLLM keeps \d+ blocks in its prefix cache"):
        run_with_fault(
            "vllm", "auto", "resume_kv", keep_cache, "--rollout.max_new_tokens", "48", version=1
        )
