"""Other builds of the module `warpo.kernels._cpu`, and the tests of the kernels on them."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Fails where another warpo.kernels comes first: that of an installed warpo, say.
PYTEST = """
import sys
import torch
import pytest
from warpo.kernels import _cpu
assert _cpu.__file__ == sys.argv[1], _cpu.__file__
sys.exit(pytest.main(sys.argv[2:]))
"""


def module(folder: Path) -> Path:
    """Where a folder for PYTHONPATH holds the module, beside the Python files of this tree."""
    package = folder / "warpo" / "kernels"
    package.mkdir(parents=True, exist_ok=True)
    for source in (ROOT / "kernels").glob("*.py"):
        link = package / source.name
        if not link.is_symlink():
            link.symlink_to(source)
    return package / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"


def run(command: list[str | Path], **options) -> subprocess.CompletedProcess:
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-8000:]
    return result


def run_tests(folder: Path, tests: list[str], select: str, **environment: str) -> str:
    """What pytest prints for tests of the tree on the module of a folder; all must pass."""
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    # -s: pytest would keep the last words of a process that a sanitizer ends
    options = ["-k", select, "-q", "-s", "-p", "no:cacheprovider"]
    return run(
        [sys.executable, "-c", PYTEST, module(folder), *tests, *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **environment},
    ).stdout
