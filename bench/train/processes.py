"""Each run is a process of its own: with the trainer's own imports, threads, malloc and peak."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from warpo.bench.train import trl_side, warpo_side
from warpo.bench.train.job import Job
from warpo.engine.run.process import set_thread_waiting

# Prints the resident bytes of a process that has imported these modules and done nothing else.
_IMPORT = """
import importlib, sys, warnings
warnings.simplefilter("ignore")
for name in sys.argv[1:]: importlib.import_module(name)
from warpo.bench.train.job import memory_bytes
print(memory_bytes("VmRSS"))
"""


class Side(NamedTuple):
    """A trainer: the module that runs the job on it, with arguments, what that imports, and whether
    its process gets the settings of `warpo train`.
    """

    module: str
    imports: Sequence[str]
    arguments: Sequence[str] = ()
    tuned: bool = True


SIDES = {
    "warpo": Side("warpo.bench.train.warpo_side", warpo_side.IMPORTS),
    "trl": Side("warpo.bench.train.trl_side", trl_side.IMPORTS, ["--correction"], tuned=False),
    "trl tuned": Side("warpo.bench.train.trl_side", trl_side.IMPORTS),
}


def child(arguments: Sequence[str], peers: Path | None, log: Path, tuned: bool = True) -> str:
    """Standard output of a Python process, all of which goes to `log` as well.

    Raises:
        RuntimeError: it failed; with the end of its log.
    """
    settings = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    }
    path = [str(peers)] if peers else []
    path += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    variables = settings | os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    if tuned:
        # as `keep_freed_memory` does in the process
        variables |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
        set_thread_waiting(variables)
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, *arguments],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            check=False,
        )
        file.write(done.stdout)
    if done.returncode:
        end = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-12:])
        raise RuntimeError(
            f"{' '.join(map(str, arguments[:3]))} ended with status {done.returncode}; the end of "
            f"its output:\n{end}"
        )
    return done.stdout


@functools.cache
def imports_bytes(modules: tuple[str, ...], peers: Path | None) -> int:
    """Resident memory of a process that has imported these modules."""
    with tempfile.TemporaryDirectory() as folder:
        printed = child(["-c", _IMPORT, *modules], peers, Path(folder) / "log")
    return int(printed.split()[-1])


class Runs:
    """Reports of each side on one job, its steps joined over the rounds.

    Attributes:
        answers: of the sides that ran.
        problems: why the others have none.
    """

    def __init__(self, job: Job, peers: Path) -> None:
        self.job, self.peers = job, peers
        self.answers: dict[str, dict[str, Any]] = {}
        self.problems: dict[str, str] = {}

    def measure(self, sides: Sequence[str], rounds: int, started: Callable[[str], None]) -> None:
        """Run the sides in turns. One that fails is not tried again.

        Args:
            started: is told the name of each side before it runs.
        """
        job_path = Path(self.job.folder) / "job.json"
        self.job.write(job_path)
        for number in range(rounds):
            for name in sides:
                started(name)
                if name in self.problems:
                    continue
                try:
                    self._run(name, number, job_path)
                except RuntimeError as error:
                    hint = "" if name == "warpo" else "TRL is installed by `make peers`; "
                    self.problems[name] = f"{hint}{error}"

    def _run(self, name: str, number: int, job_path: Path) -> None:
        side, folder = SIDES[name], Path(self.job.folder)
        peers = None if name == "warpo" else self.peers
        result = folder / f"{name.replace(' ', '-')}-{number}.json"
        child(
            ["-m", side.module, str(job_path), str(result), *side.arguments],
            peers,
            result.with_suffix(".log"),
            side.tuned,
        )
        answer = json.loads(result.read_text())
        if name in self.answers:
            self.answers[name]["steps"] += answer["steps"]
            self.answers[name]["peaks"].append(answer["peak_bytes"])
            return
        imports = [*side.imports, *(["vllm.entrypoints.llm"] if self.job.sampler == "vllm" else [])]
        self.answers[name] = answer | {
            "peaks": [answer["peak_bytes"]],
            "imports_bytes": imports_bytes(tuple(imports), peers),
        }
