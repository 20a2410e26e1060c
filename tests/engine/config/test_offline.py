"""Settings that would have no effect, or cannot run, are refused before anything is loaded."""

from __future__ import annotations

import pytest

from warpo.engine.config.file import keys, read_tree
from warpo.engine.config.offline import OfflineConfig, resolve_preference
from warpo.engine.errors import ConfigError

BASE = "model: m\noutput_dir: out\nsteps: 10\ndata: {train: t.jsonl}\n"


def read(tmp_path, *overrides: str) -> OfflineConfig:
    path = tmp_path / "config.yaml"
    path.write_text(BASE)
    return read_tree(OfflineConfig, path, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--algorithm", "ppo"], "'ppo' does not train from given data; those that do: sft"),
        (["--algorithm", "sft", "--loss.beta", "1"], "loss.beta .* reads no key of loss"),
        (["--algorithm", "ipo", "--loss.margin", "1"], "loss.margin = 1.0 has no effect"),
        (["--algorithm", "hinge", "--loss.label_smoothing", "0.1"], "reads loss.beta, loss.margin"),
        (["--algorithm", "dpo", "--loss.desirable_weight", "2"], "no effect in algorithm 'dpo'"),
        (["--algorithm", "dpo", "--loss.beta", "0"], "wanted a number > 0, or row"),
        (["--algorithm", "kto", "--loss.centering_coef", "1"], "no effect in algorithm 'kto'"),
        (["--algorithm", "sft", "--data.step_separator", ";"], "only process_reward has steps"),
        (["--algorithm", "sft", "--evaluation.every_steps", "2"], "needs data.eval"),
        (["--algorithm", "sft", "--update.warmup_steps", "10"], "below the 10 steps"),
        (["--algorithm", "sft", "--model", "./none"], "there is no directory ./none"),
        (["--algorithm", "sft", "--update.epochs", "2"], "unknown key update.epochs"),
    ],
)
def test_what_cannot_run_is_refused(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, *overrides)


def test_keys_of_loss_override_the_row(tmp_path):
    row = resolve_preference(read(tmp_path, "--algorithm", "simpo", "--loss.margin", "0.5"))
    assert (row.margin, row.beta, row.reference) == (0.5, 2.0, False)


def test_every_key_has_a_text_and_there_are_at_most_60():
    found = keys(OfflineConfig)
    assert len(found) <= 60
    assert all(key.text for key in found.values())
