"""The named tuples of `_arguments` against the structs of csrc/arguments, and how backends are
called: with one of them.
"""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import pytest
from torch import Tensor

from warpo.kernels import objectives
from warpo.kernels._arguments import backend as backends
from warpo.kernels._arguments.aggregate import MIN_PARTS
from warpo.kernels._arguments.objective import ObjectiveArguments
from warpo.kernels._arguments.policy_loss import MIN_PARTIALS
from warpo.kernels._arguments.preference_loss import COMPLETION_SLICES
from warpo.kernels._arguments.reward_model_loss import PAIRS_PER_BLOCK
from warpo.kernels._arguments.value_loss import MIN_VALUE_PARTIALS
from warpo.kernels._policy_metrics import METRICS

ROOT = Path(__file__).parents[2]
HEADERS = {path.stem: path for path in sorted((ROOT / "csrc/arguments").glob("*.h"))}
KINDS = {
    "int64_t": int,
    "int": int,
    "float": float,
    "bool": bool,
    "View": Tensor,
    "Matrix": Tensor,
    "Matrices": list[Tensor],
}


def read_structs(header: str) -> dict[str, list[tuple[str, str]]]:
    """Name and type of every field of every struct; a pointer is a View."""
    structs = {}
    for name, bases, body in re.findall(r"struct (\w+)(?: : (.*?))? \{\n(.*?)\n\};", header, re.S):
        fields = [(re.sub(r"\B[A-Z]", r"_\g<0>", x).lower(), x) for x in re.findall(r"\w+", bases)]
        for statement in re.sub(r"//.*", "", body).split(";")[:-1]:
            kind, names = re.fullmatch(r"(?:const )?(\w+)(\W.*)", statement.strip(), re.S).groups()
            for field in names.split(","):
                fields.append((field.strip(" *\n"), "View" if "*" in field else kind))
        structs[name] = fields
    return structs


def tuple_class(module: str, struct: str) -> Any:
    return getattr(
        importlib.import_module(f"warpo.kernels._arguments.{module}"), f"{struct}Arguments"
    )


def differences(found: Any, fields: list[tuple[str, str]]) -> list[str]:
    """What of a named tuple is not as the fields of the struct are."""
    annotations = inspect.get_annotations(found)
    if list(annotations) != [name for name, _ in fields]:
        return [f"{list(annotations)} != {[name for name, _ in fields]}"]
    return [
        f"{name}: {annotations[name]} is not {kind}"
        for name, kind in fields
        if not is_of_kind(annotations[name], kind)
    ]


def is_of_kind(annotation: Any, kind: str) -> bool:
    if isinstance(annotation, UnionType):
        return kind == "View" and set(get_args(annotation)) == {Tensor, NoneType}
    wanted = KINDS.get(kind)
    if wanted:
        return annotation == wanted
    if get_origin(annotation) is list:
        (item,) = get_args(annotation)
        return f"{item.__name__}s" == kind.replace("Tensors", "TensorArgumentss")
    return annotation.__name__ == f"{kind}Arguments"


def structs() -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    for module, path in HEADERS.items():
        for struct, fields in read_structs(path.read_text()).items():
            yield module, struct, fields


@pytest.mark.parametrize("module, struct, fields", structs())
def test_a_tuple_has_the_fields_of_its_struct(module, struct, fields):
    assert differences(tuple_class(module, struct), fields) == []


def test_every_tuple_has_a_struct():
    for module in HEADERS:
        source = (ROOT / "kernels/_arguments" / f"{module}.py").read_text()
        known = read_structs(HEADERS[module].read_text())
        assert re.findall(r"class (\w+)Arguments", source) == list(known)


def test_two_fields_of_one_type_that_are_exchanged_are_seen():
    header = HEADERS["objective"].read_text()
    exchanged = header.replace("float ratio_low, ratio_high;", "float ratio_high, ratio_low;")
    assert header != exchanged
    (problem,) = differences(ObjectiveArguments, read_structs(exchanged)["Objective"])
    assert "'ratio_high', 'ratio_low'" in problem
    ordered = objectives.OBJECTIVES["dapo"].arguments
    assert (ordered.ratio_low, ordered.ratio_high) == (0.8, 1.28)


def operations() -> dict[str, str]:
    """Operation and struct, as csrc/kernels.h lists them."""
    return dict(re.findall(r"X\((\w+), (\w+)\)", (ROOT / "csrc/kernels.h").read_text()))


def test_the_protocol_and_the_stubs_have_every_operation():
    for name, struct in operations().items():
        taken = inspect.get_annotations(getattr(backends.Backend, name))["arguments"]
        assert taken.__name__ == f"{struct}Arguments", name
    helpers = {"read_tensors", "call_in_place"}
    of_the_cpu = {"instruction_set", "first_and_last", "first_malformed", "first_malformed_end"}
    of_the_cpu |= {"plain_dtypes", "float32_product", "bfloat16_product"}
    for module, others in (("_cpu", helpers | of_the_cpu), ("_cuda", helpers | {"build"})):
        stubs = {}
        for node in ast.parse((ROOT / f"kernels/{module}.pyi").read_text()).body:
            if isinstance(node, ast.FunctionDef):
                stubs[node.name] = [ast.unparse(x.annotation) for x in node.args.posonlyargs]
        for name, struct in operations().items():
            stream = ["int", "int"] if module == "_cuda" else []
            assert stubs.pop(name) == [f"{struct}Arguments", *stream], name
        assert set(stubs) == others


def test_the_module_has_what_its_stub_says():
    module = importlib.import_module("warpo.kernels._cpu")
    functions = {name for name in vars(module) if not name.startswith("_")}
    stub = set(re.findall(r"def (\w+)\(", (ROOT / "kernels/_cpu.pyi").read_text()))
    # those of AVX-512
    assert stub - functions <= {"float32_product", "bfloat16_product"} and functions <= stub


def calls(path: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node


def test_backends_are_called_with_one_tuple():
    folders = ("kernels", "kernels/integrations", "tests/kernels/launches")
    paths = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    found = set()
    for path in paths:
        for call in calls(path):
            owner = ast.unparse(call.func.value)
            if owner in ("ops", "reference"):
                continue
            if call.func.attr in operations():
                found.add(call.func.attr)
                assert len(call.args) == 1 and not call.keywords, ast.unparse(call)
                assert not isinstance(call.args[0], ast.Starred), ast.unparse(call)
    assert found == set(operations())


WRONG = """
from warpo.kernels import dispatch
from warpo.kernels._arguments.fingerprint import FingerprintArguments
from warpo.kernels._arguments.whiten import WhitenArguments

def call(x: WhitenArguments) -> None:
    dispatch.load("triton").fingerprint(x)
    FingerprintArguments(row=1)
"""


@pytest.mark.slow
def test_mypy_sees_a_wrong_tuple_and_a_wrong_field(tmp_path):
    (tmp_path / "warpo").mkdir()
    (tmp_path / "warpo/kernels").symlink_to(ROOT / "kernels")
    (tmp_path / "wrong.py").write_text(WRONG)
    command = [sys.executable, "-m", "mypy", "--namespace-packages", "--explicit-package-bases"]
    checked = subprocess.run([*command, "wrong.py"], cwd=tmp_path, capture_output=True, text=True)
    assert 'incompatible type "WhitenArguments"; expected "FingerprintArguments"' in checked.stdout
    assert 'Unexpected keyword argument "row" for "FingerprintArguments"' in checked.stdout


@pytest.mark.parametrize(
    "enumeration, prefix, names",
    [
        ("RatioLevel", "k", objectives.RATIO_LEVELS),
        ("Surrogate", "k", objectives.SURROGATES),
        ("Metric", "k", METRICS),
    ],
)
def test_enumerations_have_as_many_members(enumeration, prefix, names):
    header = re.sub(r"//.*", "", HEADERS["policy_loss"].read_text())
    body = re.search(rf"enum {enumeration} : int \{{(.*?)\}}", header, re.S).group(1)
    members = [x for x in re.findall(r"k\w+", body) if not x.startswith("kNum")]
    assert len(members) == len(names)


def test_constants_are_those_of_csrc():
    for header, constant in (
        ("policy_loss", f"kMinPartials = {MIN_PARTIALS};"),
        ("aggregate", f"kMinAggregateParts = {MIN_PARTS};"),
        ("preference_loss", f"kCompletionSlices = {COMPLETION_SLICES};"),
        ("value_loss", f"kMinValuePartials = {MIN_VALUE_PARTIALS};"),
        ("reward_model_loss", f"kPairsPerBlock = {PAIRS_PER_BLOCK};"),
    ):
        assert constant in HEADERS[header].read_text()
