"""The table of algorithms, its examples and docs/choosing.md agree."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.configs import EXAMPLES, config_of
from warpo.engine.commands import tree_of
from warpo.engine.config import table
from warpo.engine.config.algorithms import ALGORITHMS
from warpo.engine.config.estimators import ESTIMATORS
from warpo.engine.config.file import read_tree

FILES = sorted(path.stem for path in EXAMPLES.glob("*.yaml"))


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    """Directories of the names that the examples give to their models."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "sft/checkpoints/step-000300", "bradley_terry/checkpoints/step-000150"):
        Path("runs/arithmetic", name).mkdir(parents=True)


def test_the_table_knows_the_files():
    assert sorted(table.EXAMPLES) == FILES


@pytest.mark.parametrize("name", FILES)
def test_the_file_names_its_algorithm_and_paper(name):
    text = (EXAMPLES / f"{name}.yaml").read_text()
    assert re.search(rf"^algorithm: {name}\b", text, re.MULTILINE)
    assert ALGORITHMS[name].url in text
    assert len(text.splitlines()) <= 55


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_example_is_a_config_of_its_row(name):
    config = read_tree(tree_of(ALGORITHMS[name].family), *config_of(name))
    assert config.algorithm == name and config.output_dir.startswith("runs/")
    assert config.output_dir.endswith(f"/{name}")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_row_begins_with_the_file_that_the_table_names(name):
    file, _, line = table.example_of(ALGORITHMS[name]).partition(", with ")
    overrides = ["--algorithm", line.removeprefix("algorithm: ")] if line else []
    config = read_tree(tree_of(ALGORITHMS[name].family), EXAMPLES.parent / file, overrides)
    assert config.algorithm == name


def test_the_commands_of_the_page_are_configs():
    page = (EXAMPLES.parent / "docs/choosing.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^warpo train (examples/.*)$", page, re.MULTILINE)
    assert len(commands) >= 7
    for command in commands:
        file, *overrides = shlex.split(command, comments=True)
        name = overrides[overrides.index("--algorithm") + 1]
        config = read_tree(tree_of(ALGORITHMS[name].family), EXAMPLES.parent / file, overrides)
        assert config.algorithm == name


def test_every_row_names_a_paper_models_and_what_it_estimates():
    for row in ALGORITHMS.values():
        assert row.title and row.url.startswith("https://") and row.models
        assert row.loss or row.advantages in ESTIMATORS


def test_warpo_algorithms_prints_every_row():
    command = [sys.executable, "-m", "warpo.engine.cli", "algorithms"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for row in ALGORITHMS.values():
        assert f" algorithm: {row.name} " in printed
        assert row.url in printed
    one = subprocess.run([*command, "dapo"], capture_output=True, text=True, check=True).stdout
    assert re.search(r"loss\.clip_range +0\.2 0\.28\n", one)
    assert re.search(r"rollout\.max_draws +10\n", one)
    cautious = subprocess.run([*command, "grpo_process"], capture_output=True, text=True).stdout
    assert "  caution     as in the paper" in cautious
    wrong = subprocess.run([*command, "dappo"], capture_output=True, text=True)
    assert wrong.returncode == 1 and "did you mean 'dapo'?" in wrong.stderr
