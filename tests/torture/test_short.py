"""A few of the attacks of `make torture`."""

from pathlib import Path

import pytest

from tests.torture import kills


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [0, 3])
def test_a_killed_run_ends_as_one_that_nothing_disturbed(seed: int, tmp_path: Path) -> None:
    assert kills.attack(seed, tmp_path) is None
