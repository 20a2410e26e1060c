"""The distributions: their files, and the wheel in an environment with nothing but torch."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git says which files there are"),
]

# Compiles nothing and links the module that is built already: `make` has compiled it a minute ago.
COMPILER = """#!/bin/sh
for word in "$@"; do [ "$word" = -shared ] && links=yes; done
while [ $# -gt 0 ]; do
    case "$1" in -o | -MF) if [ "$links" ]; then cp "{module}" "$2"; else : > "$2"; fi ;; esac
    shift
done
"""

CALLS = """
import sys, torch
from warpo.kernels import ops
logits = torch.randn(2, 16, 1000, requires_grad=True)
targets = torch.randint(0, 1000, (2, 16))
found, wanted = [], torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
logp, entropy = ops.logprobs_and_entropy(logits, targets)
torch.testing.assert_close(logp, wanted)
groups = ops.group_advantages(torch.tensor([1.0, 0.0]), group_size=2)
loss, metrics = ops.policy_loss(logp, logp.detach(), groups.advantages, "dapo")
loss.backward()
assert logits.grad.isfinite().all() and ops.policy_metrics(metrics)
assert not {"numpy", "transformers", "pydantic", "triton"} & set(sys.modules)
print(ops.__file__)
"""


def run(*command: object, **options: object) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def known() -> set[str]:
    """The files that git knows, and those that it would."""
    listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    return {name for name in listed if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributions")


@pytest.fixture(scope="module")
def sdist(folder):
    tree = folder / "tree"
    for name in known():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    return build(tree, "sdist", folder)


@pytest.fixture(scope="module")
def wheel(folder, sdist):
    """Of the unpacked sdist."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build(folder / sdist.name.removesuffix(".tar.gz"), "wheel", folder)


def build(tree: Path, kind: str, folder: Path) -> Path:
    compiler = folder / "compiler"
    (module,) = (ROOT / "kernels").glob("_cpu*.so")
    compiler.write_text(COMPILER.replace("{module}", str(module)))
    compiler.chmod(0o755)
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(folder)!r}))"
    environment = {**os.environ, "CXX": str(compiler), "WARPO_CUDA": "0"}
    return folder / run(sys.executable, "-c", code, cwd=tree, env=environment).splitlines()[-1]


@pytest.fixture(scope="module")
def python(folder, wheel):
    """Of a new environment that has the wheel, torch and what torch needs."""
    venv.create(folder / "venv", with_pip=False)
    (site,) = (folder / "venv/lib").glob("python*/site-packages")
    for name in closure("torch"):
        link(name, site)
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel)
    return folder / "venv/bin/python"


def closure(name: str) -> set[str]:
    """A distribution and all that it needs."""
    found, left = set(), [name]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            needed = map(Requirement, distribution(name).requires or [])
            left += [r.name for r in needed if not r.marker or r.marker.evaluate({"extra": ""})]
    return found


def link(name: str, site: Path) -> None:
    """The installed distribution into another environment."""
    tops = {path.parts[0] for path in distribution(name).files if ".." not in path.parts}
    for top in tops - {"__pycache__"}:
        source = Path(distribution(name).locate_file(top))
        if source.exists() and not (site / top).exists():
            (site / top).symlink_to(source)


def test_the_source_distribution_has_what_builds_and_tests_it(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    left_out = known() - names
    assert not {n for n in left_out if not n.startswith((".git", "bench/results/"))}
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_the_wheel_has_every_file_of_the_packages_and_no_other(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (path,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        text = archive.read(path).decode()
    suffixes = (".py", ".pyi", ".html", "py.typed")
    folders = ("kernels/", "engine/", "bench/")
    mine = {f"warpo/{n}" for n in known() if n.startswith(folders) and n.endswith(suffixes)}
    (module,) = (ROOT / "kernels").glob("_cpu*.so")
    assert names == mine | {f"warpo/kernels/{module.name}"}
    assert "License-Expression: Apache-2.0" in text
    needed = [line for line in text.splitlines() if line.startswith("Requires-Dist")]
    assert [line for line in needed if "extra ==" not in line] == ["Requires-Dist: torch>=2.11"]


def test_the_kernels_run_with_torch_only(python, folder):
    place = run(python, "-c", CALLS, cwd=folder)
    assert str(folder) in place


def test_the_command_line_with_torch_only(python, folder):
    warpo = (python, "-m", "warpo.engine.cli")
    assert run(*warpo, "--version", cwd=folder).startswith("warpo ")
    report = run(*warpo, "doctor", cwd=folder)
    assert "pip install '.[engine]'" in report and report.endswith("nothing is wrong\n")
    refused = subprocess.run([*warpo, "algorithms"], cwd=folder, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "\nwarpo: `warpo algorithms` needs packages" in f"\n{refused.stderr}"


def test_every_operation_of_the_wheel_agrees_with_the_reference(python, folder):
    tools = folder / "tools"
    tools.mkdir()
    for name in closure("pytest"):
        link(name, tools)
    command = [python, "-m", "tests.kernels.smoke", "--device", "cpu", "--out", folder]
    environment = {**os.environ, "PYTHONPATH": str(tools)}
    assert run(*command, cwd=ROOT, env=environment).endswith("smoke: 0 failures\n")
    rows = (folder / "rows.jsonl").read_text().splitlines()
    assert len(rows) > 50
