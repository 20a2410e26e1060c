"""The traits of the tree: sizes, parameters, wording, imports, and the way of a training step.

    python -m tests.traits [--step] [ROOT ...]

A column for each checkout of warpo, by default this one. --step runs two steps of a tiny model with
the code of the checkout, whose CPU kernels must be built in place.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests import source
from tests.source import Files, Function, python_files, walk
from tests.test_layout import MAX_POSITIONAL, ROOMS

OWN = Path(__file__).parent.parent
FOLDERS = ("kernels", "engine", "bench")
MAX_PARAMETERS = 20
# of a docstring that says what a thing is by a clause, where a verb or a noun would do
OPENINGS = ("What", "Whether", "Of", "Where", "How", "When", "That", "Which", "Who")
DIRECTIVES = ("# fmt: ", "# noqa", "# type: ")

Trees = dict[str, Files]
Rows = Iterator[tuple[str, str]]


def percentile(values: list[int], percent: int) -> int:
    """The smallest value that this percentage of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def spread(values: Iterable[int], *percents: int) -> str:
    """The percentiles and the largest."""
    found = list(values) or [0]
    return " / ".join(str(percentile(found, percent)) for percent in (*percents, 100))


def share(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.1f} % ({part} of {whole})"


def file_rows(root: Path) -> Rows:
    def lines(*folders: str, files: Callable[[Path], Iterable[Path]] = python_files) -> str:
        paths = [path for folder in folders for path in files(root / folder) if path.is_file()]
        return spread((len(path.read_text().splitlines()) for path in paths), 50, 90)

    yield "lines of a file, p50 / p90 / max: kernels, engine", lines("kernels", "engine")
    yield "csrc", lines("csrc", files=lambda folder: folder.rglob("*"))
    yield "bench", lines("bench")
    yield "files at the root of engine", str(len(list((root / "engine").glob("*.py"))))


def function_rows(trees: Trees) -> Rows:
    found: dict[str, list[Function]] = {"Triton kernels": []}
    for folder in FOLDERS:
        found[folder] = []
        for tree in trees[folder].values():
            for node, _, in_kernel in walk(tree):
                if isinstance(node, Function):
                    found["Triton kernels" if in_kernel else folder].append(node)
    label = "lines of a function, p50 / p90 / max: "
    for folder in ("kernels", "engine"):
        functions = found[folder] + (found["Triton kernels"] if folder == "kernels" else [])
        lengths = [function.end_lineno - function.lineno + 1 for function in functions]
        yield label + folder, spread(lengths, 50, 90)
        label = ""
    label = f"parameters, p99 / max / by position > {MAX_POSITIONAL} / > {MAX_PARAMETERS}: "
    for name in (*FOLDERS, "Triton kernels"):
        counts = [source.parameters(function) for function in found[name]]
        by_position = sum(positional > MAX_POSITIONAL for positional, _ in counts)
        many = sum(all_of_them > MAX_PARAMETERS for _, all_of_them in counts)
        yield label + name, f"{spread((n for _, n in counts), 99)} / {by_position} / {many}"
        label = ""


def call_rows(trees: Trees) -> Rows:
    counts: dict[str, list[int]] = {name: [] for name in (*FOLDERS, "in Triton kernels")}
    fillers = []
    for folder in FOLDERS:
        for tree in trees[folder].values():
            for node, _, in_kernel in walk(tree):
                if isinstance(node, ast.Call):
                    name = "in Triton kernels" if in_kernel else folder
                    counts[name].append(source.positional_arguments(node))
                fillers.append(source.nones(node))
    label = f"arguments by position, max / calls with > {MAX_POSITIONAL}: "
    for name, arguments in counts.items():
        yield label + name, f"{spread(arguments)} / {sum(n > MAX_POSITIONAL for n in arguments)}"
        label = ""
    yield f"(None,) * N, N > {MAX_POSITIONAL}", str(sum(n > MAX_POSITIONAL for n in fillers))


def public(body: list[ast.stmt]) -> Iterator[Function | ast.ClassDef]:
    """Functions, classes and methods whose names have no underscore in front."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body)


def comments_of(text: str) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


def wording_rows(root: Path, trees: Trees) -> Rows:
    texts = [path.read_text() for folder in FOLDERS for path in python_files(root / folder)]
    lines = sum(len(text.splitlines()) for text in texts)
    comments = [comment for text in texts for comment in comments_of(text)]
    reasons = [c for c in comments if not c.startswith(DIRECTIVES)]
    yield (
        "comments per 100 lines, all three / with directives",
        f"{100 * len(reasons) / lines:.1f} / {100 * len(comments) / lines:.1f}",
    )
    modules = [module for folder in FOLDERS for module in trees[folder].values()]
    named = [node for module in modules for node in public(module.body)]
    documented = sum(ast.get_docstring(node) is not None for node in named)
    yield "public functions and classes with a docstring", share(documented, len(named))
    holders = Function | ast.ClassDef | ast.Module
    docs = [
        ast.get_docstring(node)
        for module in modules
        for node in ast.walk(module)
        if isinstance(node, holders) and ast.get_docstring(node)
    ]
    words = Counter(doc.split(None, 1)[0] for doc in docs)
    used = {word: words[word] for word in OPENINGS if words[word]}
    yield "docstrings that open with What, Whether, ...", share(sum(used.values()), len(docs))
    yield "", ", ".join(f"{word} {count}" for word, count in used.items())
    skips = sum(source.formatter_skips(path.read_text()) for path in python_files(root))
    yield "comments that overrule the formatter, in all Python", str(skips)


def import_rows(root: Path, trees: Trees) -> Rows:
    def arrows(graph: dict[str, set[str]]) -> int:
        return sum(map(len, graph.values()))

    def named(groups: list[list[str]]) -> str:
        return "; ".join(" - ".join(group) for group in groups) or "none"

    files = trees["engine"]
    graph = source.import_graph(files, "warpo.engine")
    every = source.import_graph(files, "warpo.engine", late=True)
    yield (
        "imports in engine: files / arrows / floors",
        f"{len(graph)} / {arrows(graph)} / {source.floors(graph)}",
    )
    yield "circles", named(source.circles(graph))
    more = arrows(every) - arrows(graph)
    yield "arrows only in functions or under TYPE_CHECKING", str(more)
    yield "circles with them", named(source.circles(every))
    rooms = source.room_graph(every)
    possible = len(rooms) * (len(rooms) - 1) // 2
    yield (
        "rooms in engine: rooms / arrows of possible / floors",
        f"{len(rooms)} / {arrows(rooms)} of {possible} / {source.floors(rooms)}",
    )
    back, strangers = source.arrows_back(rooms, ROOMS), len(rooms.keys() - set(ROOMS))
    yield (
        "arrows back against ROOMS of test_layout.py",
        f"{len(back)}; {strangers} rooms are not in it",
    )
    yield "circles of rooms", named(source.circles(rooms))
    yield "modules named as a library that is imported beside them", ", ".join(shadows(root)) or "0"


def shadows(root: Path) -> list[str]:
    """Files and folders that bear the name of a library which a file of the same folder imports."""
    found = []
    folders = {path.parent for name in ("kernels", "engine") for path in python_files(root / name)}
    for folder in sorted(folders):
        trees = [ast.parse(path.read_text()) for path in folder.glob("*.py")]
        libraries = {name.partition(".")[0] for tree in trees for name, _ in source.imports(tree)}
        for path in sorted(folder.iterdir()):
            if path.stem in libraries and (path.is_dir() or path.suffix == ".py"):
                found.append(str(path.relative_to(root)))
    return found


def step_rows(root: Path) -> Rows:
    """Trace two real steps, in a process that has the modules of the checkout."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "warpo").mkdir()
        for name in FOLDERS:
            (Path(folder) / "warpo" / name).symlink_to(root.resolve() / name)
        # -P: tests/kernels must not be found as the library of that name
        command = [sys.executable, "-P", str(OWN / "tests/step_trace.py"), folder]
        path = os.pathsep.join([folder, str(root.resolve())])
        output = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, check=True
        ).stdout
    trace = json.loads(output)
    yield "hops from main to AdamW.step", str(len(trace["chain"]) - 1)
    yield "", ", ".join(trace["chain"])
    for package in ("engine", "kernels"):
        count = sum(file.startswith(package) for file in trace["files"])
        yield f"files of {package} that a step runs through", str(count)


def measure(root: Path, step: bool) -> list[tuple[str, str]]:
    trees: Trees = {folder: source.parse(root / folder) for folder in FOLDERS}
    rows = [*file_rows(root), *function_rows(trees), *call_rows(trees)]
    rows += [*wording_rows(root, trees), *import_rows(root, trees)]
    return rows + [*step_rows(root)] if step else rows


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m tests.traits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("roots", nargs="*", type=Path, default=[OWN], metavar="ROOT")
    parser.add_argument("--step", action="store_true", help="also run and trace a training step")
    args = parser.parse_args()
    measured = [measure(root, args.step) for root in args.roots]
    table = Table("trait", *(root.resolve().name for root in args.roots), box=None)
    for rows in zip(*measured, strict=True):
        table.add_row(rows[0][0], *(value for _, value in rows))
    Console(width=None if sys.stdout.isatty() else 200, markup=False).print(table)


if __name__ == "__main__":
    main()
