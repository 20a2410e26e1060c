"""Trace two steps of a training run; a script of `tests.traits`, which says how it is started.

The checkout's modules and tests come from PYTHONPATH, its packages from FOLDER/warpo. Prints, as
JSON, the functions of the engine from `main` to the optimizer's step, and the files whose functions
run in the second training step.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType

SETTINGS = ("--sampler", "transformers", "--steps", "2", "--evaluation.every_steps", "0")


class Tracer:
    """Follows the calls of Python functions in the files below a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = os.path.join(folder, "")
        self.chain: list[str] = []
        """The shortest found."""
        self.steps: list[set[str]] = []
        self._files: set[str] = set()
        self._learned = False

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(self.folder):
            return
        name = code.co_qualname
        if event == "call":
            if name == "AdamW.step":
                chain = self._callers(frame)
                self.chain = min(self.chain or chain, chain, key=len)
                self._learned = True
            elif name.endswith(".start_step"):
                self._files, self._learned = set(), False
            if code.co_name != "<module>":
                self._files.add(code.co_filename.removeprefix(self.folder))
        elif event == "return" and name == "RunLog.write" and self._learned:
            self.steps.append(self._files)
            self._files, self._learned = set(), False

    def _callers(self, frame: FrameType | None) -> list[str]:
        """From `main` down; lambdas and comprehensions are part of the function they stand in."""
        names = []
        while frame is not None:
            code = frame.f_code
            if code.co_filename.startswith(self.folder) and not code.co_name.startswith("<"):
                names.append(code.co_qualname)
            frame = frame.f_back
        return names[::-1]


def main() -> None:
    folder = sys.argv[1]
    # an editable install would add the modules of another checkout
    sys.meta_path[:] = [
        one for one in sys.meta_path if "Editable" not in getattr(one, "__name__", "")
    ]
    sys.path[:] = [entry for entry in sys.path if not entry.startswith("__editable__")]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    from tests.engine.runs import make_folder
    from warpo.engine import cli

    tracer = Tracer(os.path.join(folder, "warpo"))
    with (
        tempfile.TemporaryDirectory() as run,
        contextlib.chdir(make_folder(Path(run))),
        contextlib.redirect_stdout(sys.stderr),
    ):
        threading.setprofile(tracer)
        sys.setprofile(tracer)
        status = cli.main(["train", "config.yaml", *SETTINGS])
        sys.setprofile(None)
        threading.setprofile(None)
    if status or len(tracer.steps) != 2:
        sys.exit(f"the run ended with status {status} after {len(tracer.steps)} steps")
    print(json.dumps({"chain": tracer.chain, "files": sorted(tracer.steps[1])}))


if __name__ == "__main__":
    main()
