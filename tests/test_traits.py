"""The traits and the rules of the layout, on sources made on the spot."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

from tests import step_trace, traits
from tests.source import (
    arrows_back,
    circles,
    floors,
    import_graph,
    nones,
    parameters,
    parse,
    positional_arguments,
    room_graph,
    walk,
)


def write(folder: Path, **files: str) -> Path:
    """Files with `_` for `/` in their names."""
    for name, text in files.items():
        path = folder / f"{name.replace('_', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def function(text: str) -> ast.FunctionDef:
    [found] = ast.parse(text).body
    assert isinstance(found, ast.FunctionDef)
    return found


def call(text: str) -> ast.Call:
    found = ast.parse(text, mode="eval").body
    assert isinstance(found, ast.Call)
    return found


def test_parameters_by_position_and_in_all():
    assert parameters(function("def f(a, b, c, d, e, f, g, h, i): ...")) == (9, 9)
    assert parameters(function("def f(self, a, /, b, *rest, c, d=1, **more): ...")) == (2, 6)
    assert parameters(function("def f(): ...")) == (0, 0)


def test_arguments_by_position():
    assert positional_arguments(call("f(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, k=11)")) == 10
    assert positional_arguments(call("f(x, *rest, *(1, 2), *(None,) * 28)")) == 32
    assert positional_arguments(call("f(k=1, **more)")) == 0
    assert nones(call("f((None,) * 9)").args[0]) == 9
    assert nones(call("f((0,) * 9)").args[0]) == 0


def test_triton_kernels_are_told_from_the_other_functions():
    source = "@kernel('a_ptr')\ndef k(): f()\n@triton.jit\ndef j(): f()\n@cache\ndef g(): f()"
    calls = [found for found in walk(ast.parse(source)) if isinstance(found.node, ast.Call)]
    in_kernel = [found.in_kernel for found in calls if ast.unparse(found.node) == "f()"]
    assert in_kernel == [True, True, False]


def test_imports_in_a_circle_are_one_floor(tmp_path: Path):
    folder = write(
        tmp_path,
        top="from p.low import a, b\nimport json",
        low_a="from p.low.b import f",
        low_b="import p.low.a\nfrom p import base",
        base="if TYPE_CHECKING:\n    import p.top\ndef f():\n    from p.low import b",
    )
    graph = import_graph(parse(folder), "p")
    assert graph == {
        "top": {"low.a", "low.b"},
        "low.a": {"low.b"},
        "low.b": {"low.a", "base"},
        "base": set(),
    }
    assert circles(graph) == [["low.a", "low.b"]] and floors(graph) == 3
    late = import_graph(parse(folder), "p", late=True)
    assert late == graph | {"base": {"top", "low.b"}}
    assert circles(late) == [["base", "low.a", "low.b", "top"]] and floors(late) == 1


def test_a_room_that_imports_a_higher_one_is_found(tmp_path: Path):
    folder = write(
        tmp_path,
        errors="",
        config_file="from p.errors import E",
        learner_step="from p.config.file import load\nfrom p.learner import loss",
        learner_loss="from p import cli",
        cli="from p.learner import step",
    )
    rooms = room_graph(import_graph(parse(folder), "p"))
    assert rooms.pop("errors") == set()
    assert rooms == {"config": {"errors"}, "learner": {"config", "cli"}, "cli": {"learner"}}
    order = ("errors", "config", "learner", "cli")
    assert arrows_back(rooms, order) == ["learner imports cli"]
    back = ["cli imports learner", "config imports errors", "learner imports config"]
    assert arrows_back(rooms, order[::-1]) == back
    # of a room without a place in the order nothing is said
    assert arrows_back(rooms, order[:3]) == []


def test_a_module_beside_the_library_of_its_name_is_found(tmp_path: Path):
    write(tmp_path, engine_http="import math", engine_math="", engine_other_json="import rich")
    write(tmp_path, kernels_json="", kernels_other="from json import loads")
    assert traits.shadows(tmp_path) == ["engine/math.py", "kernels/json.py"]


def test_percentiles_and_public_names():
    assert traits.spread(range(1, 101), 50, 90) == "50 / 90 / 100"
    assert traits.spread([7], 99) == "7 / 7" and traits.spread([]) == "0"
    body = ast.parse("class A:\n    def f(self): ...\n    def _g(self): ...\ndef _h(): ...").body
    assert [node.name for node in traits.public(body)] == ["A", "f"]


def test_wording(tmp_path: Path):
    source = '"""Whether it is."""\n# why\nx = [1,2]  %s\ndef f():\n    """Do."""\n'
    source %= "# fmt" + ": skip"
    for folder in traits.FOLDERS:
        write(tmp_path, **{f"{folder}_a": source})
    rows = dict(traits.wording_rows(tmp_path, {f: parse(tmp_path / f) for f in traits.FOLDERS}))
    values = list(rows.values())
    assert values == ["20.0 / 40.0", "100.0 % (3 of 3)", "50.0 % (3 of 6)", "Whether 3", "3"]


RUN = """
class AdamW:
    def step(self): ...
class RunLog:
    def start_step(self): ...
    def write(self): ...
def update(optimizer):
    optimizer.step()
def train(log, optimizer):
    log.start_step()  # of the evaluation before the first step
    log.write()
    for _ in range(2):
        log.start_step()
        [update(optimizer) for _ in range(2)]
        log.write()
def main():
    optimizer = AdamW()
    call(lambda: update(optimizer))
    call(lambda: train(RunLog(), optimizer))
"""


def test_a_run_is_traced(tmp_path: Path):
    write(tmp_path, other="def call(function): function()", main=RUN)
    call = runpy.run_path(str(tmp_path / "other.py"))["call"]
    main = runpy.run_path(str(tmp_path / "main.py"), {"call": call})["main"]
    tracer = step_trace.Tracer(str(tmp_path))
    sys.setprofile(tracer)
    main()
    sys.setprofile(None)
    assert tracer.chain == ["main", "call", "update", "AdamW.step"]
    assert tracer.steps == [{"main.py"}] * 2
