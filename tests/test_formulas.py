"""docs/algorithms.md: every name in its tables is one of warpo's."""

import dataclasses
import re
from pathlib import Path

import pytest

from warpo.engine.config.algorithms import ALGORITHMS
from warpo.engine.config.control import ControlConfig
from warpo.engine.config.file import keys
from warpo.engine.config.offline import OfflineConfig
from warpo.engine.config.policy import Config
from warpo.engine.config.resolve import find
from warpo.kernels import ops
from warpo.kernels.objectives import Objective

PAGE = Path(__file__).parent.parent / "docs/algorithms.md"
SETTINGS = {name for tree in (Config, OfflineConfig, ControlConfig) for name in keys(tree)}


def formulas():
    """The formula and the last cell of each row of a table."""
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("| \n"))]
        if line.startswith("|") and len(cells) == 3 and cells[2] not in ("in warpo", "---"):
            yield cells


def names():
    return sorted({name for *_, cell in formulas() for name in re.findall(r"`([^`]+)`", cell)})


def test_every_formula_has_a_source_and_a_place():
    found = list(formulas())
    assert len(found) > 45
    for formula, source, place in found:
        assert formula and source, (formula, source)
        assert re.search(r"`[^`]+`", place), formula


@pytest.mark.parametrize("name", names())
def test_the_place_of_a_formula_exists(name):
    key, _, value = name.partition(": ")
    if key == "algorithm":
        find(value)
    elif key.startswith("ops."):
        assert callable(getattr(ops, key.removeprefix("ops.")))
    elif key.startswith("Objective."):
        fields = {field.name for field in dataclasses.fields(Objective)}
        assert key.removeprefix("Objective.") in fields
    else:
        assert key in SETTINGS
        if value:
            _takes(key, value)


def _takes(key, value):
    """A setting takes a value, with some row."""
    described = [keys(tree)[key].wanted for tree in (Config, OfflineConfig) if key in keys(tree)]
    number = re.fullmatch(r"[\d. ]+", value)
    assert number or any(re.search(rf"\b{value}\b", wanted) for wanted in described), described


def test_every_row_of_the_policy_family_is_told():
    page = PAGE.read_text()
    missing = [row for row in ALGORITHMS if f"`{row}`" not in page and f": {row}`" not in page]
    assert not missing, missing
