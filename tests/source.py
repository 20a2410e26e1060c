"""The tree as its syntax shows it: files, imports, functions and calls."""

from __future__ import annotations

import ast
import re
from collections import deque
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

Files = Mapping[str, ast.AST]
Graph = Mapping[str, set[str]]
Function = ast.FunctionDef | ast.AsyncFunctionDef
_GENERATED = ("build", "runs")


def python_files(folder: Path) -> list[Path]:
    """Every Python file below, without what is generated or installed."""
    return sorted(
        path
        for path in folder.rglob("*.py")
        if not any(
            part.startswith(".") or part in _GENERATED for part in path.relative_to(folder).parts
        )
    )


@cache
def parse(folder: Path) -> dict[str, ast.AST]:
    """The modules below a folder by their name in it: errors, rewards.model."""
    return {
        ".".join(path.relative_to(folder).with_suffix("").parts): ast.parse(path.read_text())
        for path in python_files(folder)
    }


class Found(NamedTuple):
    node: ast.AST
    late: bool
    """In a function or under `if TYPE_CHECKING`: importing the file does not run it."""
    in_kernel: bool
    """Of a Triton kernel or in one."""


def walk(tree: ast.AST) -> Iterator[Found]:
    """Every node below."""
    todo = deque([Found(tree, late=False, in_kernel=False)])
    while todo:
        parent, late, in_kernel = todo.popleft()
        late |= isinstance(parent, Function) or (
            isinstance(parent, ast.If) and "TYPE_CHECKING" in ast.unparse(parent.test)
        )
        for node in ast.iter_child_nodes(parent):
            kernel = in_kernel or (isinstance(node, Function) and is_kernel(node))
            todo.append(Found(node, late, kernel))
            yield todo[-1]


def is_kernel(function: Function) -> bool:
    """True if Triton compiles it."""
    decorators = {ast.unparse(decorator).partition("(")[0] for decorator in function.decorator_list}
    return bool(decorators & {"kernel", "triton.jit"})


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Each name that is imported, a.b.c for `from a.b import c`, and whether that is late."""
    for node, late, _ in walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", late) for alias in node.names)


def import_graph(files: Files, package: str, late: bool = False) -> dict[str, set[str]]:
    """Return the imports of each module of a package; with `late`, in functions and types too."""
    graph: dict[str, set[str]] = {module: set() for module in files}
    for module, tree in files.items():
        for name, is_late in imports(tree):
            other = name.removeprefix(f"{package}.")
            other = other if other in files else other.rpartition(".")[0]
            if name.startswith(f"{package}.") and other in files and is_late <= late:
                graph[module].add(other)
        graph[module].discard(module)
    return graph


def room(module: str) -> str:
    """The folder of a module right below its package; a file there is a room of its own."""
    return module.partition(".")[0]


def room_graph(graph: Graph) -> dict[str, set[str]]:
    rooms: dict[str, set[str]] = {room(module): set() for module in graph}
    for module, others in graph.items():
        rooms[room(module)] |= {room(other) for other in others} - {room(module)}
    return rooms


def arrows_back(rooms: Graph, order: tuple[str, ...]) -> list[str]:
    """Imports of a higher room by a lower one; `order` names the rooms from the lowest."""
    floor = {name: i for i, name in enumerate(order)}
    return sorted(
        f"{lower} imports {higher}"
        for lower, others in rooms.items()
        for higher in others
        if lower in floor and higher in floor and floor[lower] < floor[higher]
    )


def circles(graph: Graph) -> list[list[str]]:
    """Groups of more than one whose members all reach one another."""
    reached = {name: _reached(graph, name) for name in graph}
    groups = {
        tuple(sorted(other for other in reached[name] if name in reached[other])) for name in graph
    }
    return sorted(list(group) for group in groups if len(group) > 1)


def _reached(graph: Graph, start: str) -> set[str]:
    found, todo = set(), [start]
    while todo:
        new = graph[todo.pop()] - found
        found |= new
        todo += new
    return found


def floors(graph: Graph) -> int:
    """Length of the longest chain of imports; a circle is one floor."""
    group = {name: name for name in graph}
    for circle in circles(graph):
        group |= dict.fromkeys(circle, circle[0])
    below = {name: set() for name in group.values()}
    for name, others in graph.items():
        below[group[name]] |= {group[other] for other in others} - {group[name]}
    heights: dict[str, int] = {}

    def height(name: str) -> int:
        if name not in heights:
            heights[name] = 1 + max(map(height, below[name]), default=0)
        return heights[name]

    return max(map(height, below), default=0)


def parameters(function: Function) -> tuple[int, int]:
    """Count the parameters by position, and all of them, without self and cls."""
    given = function.args
    positional = [argument.arg for argument in given.posonlyargs + given.args]
    count = len(positional) - (positional[:1] in (["self"], ["cls"]))
    stars = (given.vararg is not None) + (given.kwarg is not None)
    return count, count + len(given.kwonlyargs) + stars


def positional_arguments(call: ast.Call) -> int:
    """Count a call's positional arguments; a starred variable counts as one."""
    return sum(map(_width, call.args))


def _width(node: ast.expr) -> int:
    if not isinstance(node, ast.Starred):
        return 1
    if isinstance(node.value, ast.Tuple | ast.List):
        return sum(map(_width, node.value.elts))
    return max(1, nones(node.value))


def nones(node: ast.AST) -> int:
    """N of an expression `(None,) * N`, else 0."""
    match node:
        case ast.BinOp(
            ast.Tuple([ast.Constant(None)]) | ast.List([ast.Constant(None)]),
            ast.Mult(),
            ast.Constant(int(count)),
        ):
            return count
    return 0


def formatter_skips(text: str) -> int:
    """Count the comments that tell the formatter to leave a place as it is."""
    return len(re.findall(r"# fmt: (?:skip|off)\b", text))
