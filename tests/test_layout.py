"""The rules of the tree that no tool checks."""

import ast
import re
import subprocess
import sys
from pathlib import Path

from tests.source import (
    arrows_back,
    formatter_skips,
    import_graph,
    parse,
    positional_arguments,
    python_files,
    room,
    room_graph,
    walk,
)

ROOT = Path(__file__).parent.parent
# who may import whom; csrc and torch are below all of them
ALLOWED = {
    "kernels": {"kernels"},
    "engine": {"engine", "kernels"},
    "bench": {"bench", "engine", "kernels"},
}
# the folders of engine/ and the files at its root, each above all that it may import
ROOMS = (
    *("redact", "errors", "types", "ranks", "config", "data", "run", "models", "rollout"),
    *("learner", "weights", "plan", "trainers", "preflight", "commands", "doctor", "cli"),
)
MAX_POSITIONAL = 8
MAX_FORMATTER_SKIPS = 60


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module)
    return found


def test_imports_run_one_way():
    for folder, allowed in ALLOWED.items():
        for path in (ROOT / folder).rglob("*.py"):
            for name in imports(path):
                assert name.split(".")[0] not in ("examples", "tests"), f"{path} imports {name}"
                if name.split(".")[0] == "warpo":
                    other = (name.split(".") + [""])[1]
                    assert other in allowed or not other, f"{path} imports {name}"


def test_the_reference_stands_alone():
    for path in (ROOT / "kernels/reference").glob("*.py"):
        for name in imports(path):
            own = name.startswith("warpo.kernels.reference.")
            assert own or name in ("typing", "torch", "warpo.kernels.objectives"), f"{path}: {name}"


def test_csrc_knows_nothing_of_torch_or_python_but_in_the_bindings():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file() and path.name != "bindings.cpp":
            text = path.read_text()
            for header in ("torch/", "ATen/", "c10/", "pybind11/", "Python.h"):
                assert f"#include <{header}" not in text, path


def test_the_folders_do_not_shadow_packages_of_their_names():
    """transformers imports a package `kernels`; started in our root, Python must not find ours.

    A folder without __init__.py gives way to an installed package and lets transformers see that
    there is none.
    """
    for folder in ALLOWED:
        assert not (ROOT / folder / "__init__.py").exists()
    code = "import transformers; transformers.Qwen2ForCausalLM; transformers.LlamaForCausalLM"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_importing_the_kernels_loads_neither_engine_nor_transformers_nor_triton():
    code = (
        "import sys; from warpo.kernels import ops; "
        "loaded = {'transformers', 'vllm', 'triton', 'pydantic'} & set(sys.modules); "
        "print(sorted(loaded))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_files_can_be_read_in_one_sitting():
    for folder in ALLOWED:
        for path in (ROOT / folder).rglob("*.py"):
            lines = len(path.read_text().splitlines())
            assert lines <= 400, f"{path} has {lines} lines"
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            assert len(path.read_text().splitlines()) <= 400, path


def test_a_training_step_is_read_in_one_function():
    """Collect, update, publish, verify: in this order, in a loop that fits a screen."""
    path = ROOT / "engine/trainers/policy/train.py"
    (run,) = (f for f in ast.parse(path.read_text()).body if getattr(f, "name", "") == "run")
    loop = next(node for node in ast.walk(run) if isinstance(node, ast.While))
    calls = [ast.unparse(n.func) for n in ast.walk(loop) if isinstance(n, ast.Call)]
    step = ["rollouts.collect", "learner.update", "weights.publish", "weights.verify"]
    assert [name for name in calls if name in step] == step
    assert run.end_lineno - run.lineno < 50


def test_only_the_trainers_and_what_tries_a_run_build_one():
    for room_name in ("rollout", "learner", "weights"):
        for path in (ROOT / "engine" / room_name).rglob("*.py"):
            assert not any(".trainers." in name for name in imports(path)), path


def test_the_page_of_the_engine_names_every_file():
    text = (ROOT / "docs/engine.md").read_text()
    for path in python_files(ROOT / "engine"):
        assert re.search(rf"\b{path.stem}\b", text), path


def engine_imports() -> dict[str, set[str]]:
    return import_graph(parse(ROOT / "engine"), "warpo.engine", late=True)


def test_rooms_import_only_the_rooms_below_them():
    assert not arrows_back(room_graph(engine_imports()), ROOMS)


def test_every_file_of_the_engine_has_a_room():
    assert not {room(module) for module in engine_imports()} - set(ROOMS)


def calls_by_position(in_kernel: bool) -> list[str]:
    return [
        f"{folder}/{module}:{node.lineno} {ast.unparse(node.func)}"
        for folder in ALLOWED
        for module, tree in parse(ROOT / folder).items()
        for node, _, found_in_kernel in walk(tree)
        if isinstance(node, ast.Call) and found_in_kernel == in_kernel
        if positional_arguments(node) > MAX_POSITIONAL
    ]


def test_calls_give_most_arguments_by_name():
    """Launches of Triton kernels and operators of other projects have signatures that are given."""
    given = ("[", "save_for_backward", "compute_puff_advantage")
    found = calls_by_position(in_kernel=False)
    assert not [call for call in found if not any(name in call for name in given)]


def test_the_formatter_is_seldom_overruled():
    skips = sum(formatter_skips(path.read_text()) for path in python_files(ROOT))
    assert skips <= MAX_FORMATTER_SKIPS
