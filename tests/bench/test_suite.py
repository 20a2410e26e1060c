import dataclasses

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from warpo.bench.correctness import TOLERANCE, exact_of
from warpo.bench.limits import bound, limits
from warpo.bench.operation import MODES, Provider, Work
from warpo.bench.operations import OPERATIONS
from warpo.bench.suite import Plan, Point, rows_of
from warpo.bench.timing import measure

SMALL = {
    "tokens": 8,
    "vocabulary": 300,
    "hidden": 16,
    "sequences": 5,
    "steps": 12,
    "prompts": 6,
    "group": 4,
    "pairs": 70,
    "rows": 70,
    "columns": 3,
    "tensors": 5,
    "parameters": 3000,
}
RATES = {
    "read_64MiB": 1e10,
    "copy_64MiB": 1e10,
    "exp": 1e9,
    "matrix_float32": 1e11,
    "matrix_bfloat16": 1e11,
}


def sizes_of(operation):
    return {name: SMALL[name] for name in operation.sizes}


def plan(**changes):
    return dataclasses.replace(
        Plan(
            device="cpu", limits=RATES, budget_s=0.002, cold=False, wanted=lambda point, name: True
        ),
        **changes,
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_ours_and_plain_pytorch_agree_with_float64_in_each_mode(name):
    operation = OPERATIONS[name]
    torch.manual_seed(0)
    for dtype in operation.dtypes:
        inputs = operation.make("cpu", dtype, sizes_of(operation))
        for mode in operation.modes:
            functions = [lambda inputs: operation.ours(inputs, "cpu")]
            functions += [operation.eager] if operation.eager else []
            exact = exact_of(operation, operation.part(inputs), mode)
            for function in functions:
                assert exact.error_of(function) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_mode_of_an_operation_has_work(name):
    operation = OPERATIONS[name]
    for mode in operation.modes:
        for dtype in operation.dtypes:
            work = operation.work(sizes_of(operation), dtype.itemsize, mode)
            name, least = bound(work, str(dtype).removeprefix("torch."), RATES)
            assert least > 0 and work.read > 0, (mode, name)
    assert operation.modes in (MODES, ("fwd",))


def test_the_limit_that_binds_is_the_one_that_takes_longest():
    assert bound(Work(read=1000), "float32", RATES) == ("read", pytest.approx(1e-4))
    assert bound(Work(read=10, written=10, exps=100), "float32", RATES)[0] == "exp"
    assert bound(Work(read=10, flops=10**9), "bfloat16", RATES)[0] == "matrix_bfloat16"
    assert bound(Work(read=500, written=500), "float32", RATES) == ("copy", pytest.approx(1e-4))


def test_bytes_that_fit_into_the_caches_are_held_to_the_caches():
    rates = {"read_1MiB": 5e10, "read_16MiB": 8e10, "read_128MiB": 2e10}
    rates |= {"exp": 1e9, "matrix_float32": 1e11}
    for size, rate in (
        (1, 8e10),
        (1 << 20, 8e10),
        (1 << 24, 8e10),
        (1 << 26, 8e10),
        (1 << 27, 2e10),
    ):
        assert bound(Work(read=size), "float32", rates)[1] == pytest.approx(1e3 * size / rate), size


def point(mode="fwd+bwd", **others):
    operation = dataclasses.replace(OPERATIONS["policy_loss"], others=others, compiles=False)
    return Point(operation=operation, sizes=sizes_of(operation), dtype=torch.float32, mode=mode)


def test_a_row_holds_time_spread_limit_memory_and_error():
    rows = {row["provider"]: row for row in rows_of(point(), plan())}
    assert set(rows) == {"cpu", "eager"}
    row = rows["cpu"]
    assert row["p20_ms"] <= row["ms"] <= row["p80_ms"] and row["runs"] >= 5
    assert row["share_of_limit"] == pytest.approx(row["limit_ms"] / row["ms"])
    assert row["limit"] == "copy" and row["cache"] == "warm"
    assert row["peak_bytes"] > 0 and row["host_us"] > 0 and row["error"] < 1e-5
    assert row["sizes"] == {"sequences": 5, "steps": 12} and row["mode"] == "fwd+bwd"


def test_a_wrong_a_failing_and_a_missing_provider_are_rows_without_a_time():
    def fails(inputs):
        raise NotImplementedError("no such\nshape")

    def missing():
        raise ImportError("not here")

    eager = OPERATIONS["policy_loss"].eager
    others = {
        "wrong": Provider(load=lambda: lambda inputs: eager(inputs) * 1.1),
        "fails": Provider(load=lambda: fails),
        "missing": Provider(load=missing),
    }
    rows = {row["provider"]: row for row in rows_of(point(**others), plan())}
    assert "ms" in rows["cpu"]
    assert all("ms" not in rows[name] for name in others)
    assert rows["wrong"]["problem"].startswith("wrong: 1.0e-01")
    assert rows["fails"]["problem"] == "NotImplementedError: no such shape"
    assert rows["missing"]["problem"] == "ImportError: not here"


def test_what_writes_to_its_inputs_gets_its_own():
    operation = OPERATIONS["logprobs"]
    inputs = {}

    def make(*arguments):
        inputs.update(operation.make(*arguments))
        inputs["before"] = inputs["logits"].clone()
        return {name: inputs[name] for name in ("logits", "targets")}

    alone = dataclasses.replace(operation, make=make, compiles=False)
    sizes = sizes_of(operation)
    rows = list(
        rows_of(
            Point(operation=alone, sizes=sizes, dtype=torch.float32, mode="fwd+bwd"),
            plan(wanted=lambda point, name: name in ("cpu", "warpo, in place")),
        )
    )
    assert all("ms" in row for row in rows) and len(rows) == 2
    if inputs["logits"].shape == (sizes["tokens"], sizes["vocabulary"]):
        assert torch.equal(inputs["logits"], inputs["before"])


def test_turns_are_of_equal_time():
    times = measure("cpu", {"a": lambda: None, "b": lambda: sum(range(20000))}, 0.01)
    assert len(times["a"]) > len(times["b"]) >= 5


@pytest.mark.slow
def test_limits_of_this_machine_are_of_a_computer_of_this_century():
    found = limits("cpu", 0.05)
    traffic = [name for name in found if name.startswith(("read_", "copy_"))]
    assert len(traffic) >= 4 and set(found) - set(traffic) == set(RATES) - {
        "read_64MiB",
        "copy_64MiB",
    }
    assert min(found.values()) > 1e8 and max(found.values()) < 1e15
    assert {name for name in limits("cpu", 0.02, cold=True) if "MiB" in name} == set(traffic[-2:])


@pytest.mark.slow
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=3)
def test_torch_compile_compiles_at_each_of_many_sizes():
    for steps in range(8, 14):
        sizes = {"sequences": 5, "steps": steps}
        one = Point(operation=OPERATIONS["aggregate"], sizes=sizes, dtype=torch.float32, mode="fwd")
        wanted = plan(wanted=lambda point, name: name == "compile")
        (row,) = rows_of(one, wanted)
        assert "problem" not in row and "host_us" not in row and row["ms"] > 0


class Factories(TorchFunctionMode):
    """Devices of the tensors that a call is given or makes."""

    def __init__(self):
        super().__init__()
        self.devices = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, result)):
            if isinstance(x, torch.Tensor):
                self.devices.add(x.device.type)
        return result


@pytest.mark.parametrize("dtype", OPERATIONS["adamw_publish"].dtypes)
def test_the_step_of_torch_has_all_of_its_state_on_the_device(dtype):
    operation = OPERATIONS["adamw_publish"]
    inputs = operation.make("meta", dtype, sizes_of(operation))
    with Factories() as seen:
        operation.eager(inputs)
    assert seen.devices == {"meta"}
