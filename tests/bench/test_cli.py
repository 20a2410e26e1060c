import json

import pytest
import torch

from warpo.bench import cli, shapes
from warpo.bench.operations import OPERATIONS
from warpo.engine.cli import main

RATES = {
    "read_64MiB": 1e10,
    "copy_64MiB": 1e10,
    "exp": 1e9,
    "matrix_float32": 1e11,
    "matrix_bfloat16": 1e11,
}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Limits take seconds to measure, and have their own test."""
    monkeypatch.setattr(cli, "limits", lambda device, budget_s, cold: RATES)
    monkeypatch.setitem(cli.BUDGET_S, "quick", 0.002)


def small(tmp_path):
    file = tmp_path / "shapes.yaml"
    file.write_text(
        "sequences x steps: [{sequences: 3, steps: 8}, {sequences: 6, steps: 8}]\n"
        "pairs x steps: [{pairs: 16, steps: 5}]\n"
    )
    return str(file)


def test_every_operation_has_a_size_in_every_preset():
    for preset in shapes.PRESETS.values():
        for operation in OPERATIONS.values():
            for sizes in shapes.of(operation, preset):
                assert tuple(sizes) == operation.sizes
            assert shapes.of(operation, preset), operation.name


def test_a_run_leaves_rows_plots_and_a_page(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["bench", "gae", "preference_loss", "--shapes", small(tmp_path), "--quick"]
    assert main([*words, "--providers", "cpu", "eager", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "bench.jsonl").read_text().splitlines()]
    assert {row["operation"] for row in rows} == {"gae", "preference_loss"}
    for row in rows:
        assert row["command"].startswith("warpo bench gae preference_loss --shapes")
        assert row["machine"] and row["date"] and row["versions"]["torch"] == torch.__version__
        assert row["limits"] == RATES
    text = capsys.readouterr().out
    assert "x eager" in text and "gae" in text and "index.html" in text
    page = (out / "index.html").read_text()
    assert "data:image/png;base64" in page and rows[0]["command"] in page
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert (out / "overview.png").exists() and (out / "gae-float32-fwd.png").exists()


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    real, calls = cli.rows_of, []

    def interrupted(point, plan):
        calls.append(point)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(point, plan)

    monkeypatch.setattr(cli, "rows_of", interrupted)
    words = ["gae", "--shapes", small(tmp_path), "--providers", "cpu", "--out", str(tmp_path)]
    assert cli.main(words) == 130
    assert len((tmp_path / "bench.jsonl").read_text().splitlines()) == 1
    assert "interrupted" in capsys.readouterr().err and (tmp_path / "index.html").exists()


def test_what_leaves_nothing_to_time_is_refused(tmp_path, capsys):
    words = ["gae", "whiten", "--mode", "bwd", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 2 and not (tmp_path / "out").exists()
    assert "leave nothing to time of gae, whiten: see warpo bench --list" in capsys.readouterr().err


def test_a_provider_that_does_not_exist_is_refused_with_those_that_do(tmp_path, capsys):
    words = ["gae", "--providers", "cpu", "nunba", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 2 and not (tmp_path / "out").exists()
    message = (
        "--providers nunba: of these operations on cpu there are cpu, eager, 'numba, one core'"
    )
    assert message in capsys.readouterr().err


def compiled_at(words, monkeypatch, tmp_path):
    """Dtype and mode at which torch.compile is timed."""
    found = set()

    def recorded(point, plan):
        if plan.wanted(point, "compile"):
            found.add((point.dtype_name, point.mode))
        return []

    monkeypatch.setattr(cli, "rows_of", recorded)
    assert cli.main(["kept_set_logprobs", *words, "--out", str(tmp_path)]) == 0
    return found


def test_torch_compile_is_timed_where_it_is_asked_for(monkeypatch, tmp_path):
    every = {(d, m) for d in ("float32", "bfloat16") for m in ("fwd", "fwd+bwd")}
    last = {("bfloat16", "fwd+bwd")}
    for words, wanted in (
        ([], set()),
        (["--compile"], last),
        (["--compile", "--shapes", "laptop"], every),
        (["--compile", "--shapes", "laptop", "--quick"], last),
        (["--providers", "cpu", "compile"], every),
        (["--providers", "cpu"], set()),
    ):
        assert compiled_at(words, monkeypatch, tmp_path) == wanted, words


def test_the_list_names_operations_sizes_and_providers(capsys):
    assert cli.main(["--list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in OPERATIONS) and "torchrl" in text and "tokens x" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gea"], "no operation gea; there are logprobs"),
        (["--shapes", "big"], "--shapes big: neither quick, laptop, h200 nor a file"),
        (["--out", __file__], "test_cli.py: a file; pass a folder"),
        (["--mode", "sideways"], "invalid choice: 'sideways'"),
    ],
)
def test_wrong_usage_is_refused_with_what_there_is(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("logprob: [{tokens: 1, vocabulary: 2}]", "'logprob' is none of tokens x vocabulary"),
        ("gae: [{sequences: 1}]", "an entry of gae must give sequences, steps as whole numbers"),
        ("gae: [{sequences: 1, steps: 0}]", "numbers above 0, got {'sequences': 1, 'steps': 0}"),
        ("- gae", "wanted operations or sizes"),
    ],
)
def test_a_wrong_file_of_shapes_is_refused_by_entry(tmp_path, text, message, capsys):
    file = tmp_path / "shapes.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match="shapes.yaml") as caught:
        shapes.read(file, OPERATIONS)
    assert message in str(caught.value)
    assert cli.main(["--shapes", str(file)]) == 2 and message in capsys.readouterr().err
