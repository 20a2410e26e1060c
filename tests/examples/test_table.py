"""The table of algorithms, its examples and the README agree."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.configs import EXAMPLES
from warpo.engine import algorithms_table
from warpo.engine.algorithms import ADVANTAGES, ALGORITHMS
from warpo.engine.cli import tree_of
from warpo.engine.config_file import read_tree

NAMES = sorted(path.stem for path in EXAMPLES.glob("*.yaml"))


def test_each_row_has_its_example():
    assert sorted(ALGORITHMS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_example_is_a_config_of_its_row(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (EXAMPLES / f"{name}.yaml").read_text()
    for model in re.findall(r"runs/arithmetic/(?:model|\w+/checkpoints/step-\d+)", text):
        Path(model).mkdir(parents=True, exist_ok=True)
    assert re.search(rf"^algorithm: {name}\b", text, re.MULTILINE)
    assert ALGORITHMS[name].url in text
    assert len(text.splitlines()) <= 55
    config = read_tree(tree_of(ALGORITHMS[name].family), EXAMPLES / f"{name}.yaml", [])
    assert config.algorithm == name and config.output_dir.startswith("runs/")
    assert config.output_dir.endswith(f"/{name}")


def test_every_row_names_a_paper_models_and_what_it_estimates():
    for row in ALGORITHMS.values():
        assert row.title and row.url.startswith("https://") and row.models
        assert row.loss or row.advantages in ADVANTAGES


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


def test_the_readme_has_the_table():
    readme = (EXAMPLES.parent / "README.md").read_text()
    assert algorithms_table.markdown() in readme, "paste `warpo algorithms --markdown`"
