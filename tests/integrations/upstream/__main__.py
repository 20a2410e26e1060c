"""Runs a library's own tests as they are, without and with warpo's patch, and fails if one passes
without it alone.

    python -m tests.integrations.upstream verl           # or: make test-upstream
    python -m tests.integrations.upstream trl --source CHECKOUT     # of the installed version

OpenRLHF's tests are in its wheel and verl's in its source distribution, which pip fetches. Those of
TRL and torchrl are in their repositories alone.
"""

import argparse
import collections
import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from warpo.kernels.integrations.doctor import LIBRARIES

HERE = Path(__file__).parent
# What concerns the functions that are replaced, and needs neither a GPU nor a model hub.
SELECTED = {
    "verl": ["tests/trainer", "tests/plugin", "tests/test_protocol_on_cpu.py"],
    "openrlhf": ["tests"],
    "trl": [
        "tests/test_utils.py",
        "tests/test_grpo_trainer.py",
        "tests/test_rloo_trainer.py",
        "tests/test_dpo_trainer.py",
    ],
    "torchrl": ["test/objectives/test_values.py"],
}
PASSED, SECONDS = "passed", 300


def fetch(library: str, peers: Path) -> Path:
    """A folder with the tests of the installed version.

    Raises:
        SystemExit: they are in no package.
    """
    folder = peers / library
    if library == "openrlhf":
        return folder / "site-packages"
    if library != "verl":
        sys.exit(f"{library} has its tests in its repository alone: pass --source CHECKOUT")
    requirement = next(
        line
        for line in Path(f"bench/requirements/{library}.txt").read_text().splitlines()
        if line.startswith(f"{library}==")
    )
    source = folder / "source"
    if not source.exists():
        options = f"-m pip download --quiet --no-deps --no-binary {library} --no-build-isolation"
        command = [sys.executable, *options.split(), "--dest", folder, requirement]
        subprocess.run(command, check=True)
        with tarfile.open(next(folder.glob(f"{library}-*.tar.gz"))) as archive:
            # the tests alone, so that they import the library that is installed
            tests = [m for m in archive.getmembers() if m.name.split("/")[1:2] == ["tests"]]
            archive.extractall(source, tests, filter="data")
    return next(source.iterdir())


def outcomes(library: str, source: Path, overlay: Path, patched: bool) -> dict[str, str]:
    """Outcome of each test, by its name."""
    path = [
        HERE,
        HERE.parents[2] / "bench/stand_ins",
        overlay,
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
    variables = {
        "PYTHONPATH": os.pathsep.join(str(Path(p).absolute()) for p in path),
        "WARPO_PATCH": library if patched else "",
        "HF_HUB_OFFLINE": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        options = f"-q -p no:cacheprovider -p patch_plugin -o addopts= --timeout={SECONDS}"
        places = ["--junitxml", report, "--rootdir", source, "--continue-on-collection-errors"]
        command = [sys.executable, "-m", "pytest", *options.split(), *places, *SELECTED[library]]
        with Path(folder, "log").open("w") as log:
            subprocess.run(
                command, cwd=source, env=os.environ | variables, stdout=log, stderr=log, check=False
            )
        if not report.exists():
            sys.exit(f"pytest wrote no report:\n{Path(folder, 'log').read_text()[-3000:]}")
        return {
            f"{case.get('classname')}::{case.get('name')}": _outcome(case)
            for case in ElementTree.parse(report).iter("testcase")
        }


def _outcome(case: ElementTree.Element) -> str:
    return next((e.tag for e in case if e.tag in ("failure", "error", "skipped")), PASSED)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", choices=[name for name in LIBRARIES if name in SELECTED])
    parser.add_argument("--source", type=Path, metavar="CHECKOUT")
    parser.add_argument("--peers", type=Path, default=Path(".peers"), metavar="DIR")
    args = parser.parse_args()
    source = (args.source or fetch(args.library, args.peers)).absolute()
    overlay = args.peers / args.library / "site-packages"
    plain = outcomes(args.library, source, overlay, patched=False)
    patched = outcomes(args.library, source, overlay, patched=True)
    lost = sorted(t for t, o in plain.items() if o == PASSED and patched.get(t) != PASSED)
    for name, found in (("without", plain), ("with", patched)):
        counts = collections.Counter(found.values())
        text = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
        print(f"{args.library} {name} the patch: {text}")
    print(*(f"passes without the patch alone: {test}" for test in lost), sep="\n")
    return 1 if lost or not any(o == PASSED for o in patched.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
