"""Times the functions of one library as they are and as warpo replaces them, in turns; a process of
its own, since the libraries need other versions of the same packages.

    python -m warpo.bench.dropin.side LIBRARY ROWS.jsonl [--only TEXT]
"""

import argparse
import importlib
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from warpo.bench.dropin.case import DropIn
from warpo.bench.progress import Progress, shown
from warpo.bench.timing import measure, peak_bytes, spread
from warpo.engine.run.process import keep_freed_memory
from warpo.kernels.integrations.patching import Library, wrap

BUDGET_S, TURNS = 0.25, 3


def load(name: str) -> tuple[list[DropIn], Callable[[str], tuple[Callable, Callable]], str | None]:
    """The cases of a library, its function of a name and ours, its version. `arrays` is none: its
    cases bring the loops.
    """
    module = importlib.import_module(f"warpo.bench.dropin.{name}")
    if hasattr(module, "SIDES"):
        return module.cases(), module.SIDES.__getitem__, None
    library: Library = importlib.import_module(f"warpo.kernels.integrations.{name}").library
    problem = library.problem()
    if problem:
        sys.exit(problem)

    def sides(function: str) -> tuple[Callable, Callable]:
        replacement = library.replacements[function]
        original = replacement.current()
        return original, wrap(replacement, original)

    return module.cases(), sides, library.version()


def row_of(case: DropIn, original: Callable, ours: Callable) -> dict[str, Any]:
    """Milliseconds and peak bytes of both. What fails has its error in place of a time."""
    row: dict[str, Any] = {"function": case.function, "size": case.size, "mode": case.mode}
    try:
        call = case.make()
        calls = {"library": lambda: call(original), "warpo": lambda: call(ours)}
        times = measure("cpu", calls, BUDGET_S, turns=TURNS)
        for name, found in times.items():
            both = spread(found)
            row |= {f"{name}_{part}": both[part] for part in ("ms", "p20_ms", "p80_ms")}
            row[f"{name}_peak_bytes"] = peak_bytes("cpu", calls[name])
    except (RuntimeError, ValueError, TypeError) as error:
        return row | {"problem": f"{type(error).__name__}: {error}"}
    return row | {"runs": len(found), "times_as_fast": row["library_ms"] / row["warpo_ms"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("library")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    keep_freed_memory()
    cases, sides, version = load(args.library)
    cases = [case for case in cases if args.only in case.function]
    with (
        args.rows.open("a", encoding="utf-8") as file,
        shown(Progress([1.0] * len(cases))) as tell,
    ):
        for case in cases:
            tell(f"{args.library}: {case.function} {case.size} {case.mode}")
            row = row_of(case, *sides(case.function))
            described = {"library": args.library, "version": version}
            file.write(json.dumps(described | row) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
