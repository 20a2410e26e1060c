"""On a real library that everybody has, and that imports its functions by name: packaging."""

import importlib
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import packaging.utils
import packaging.version
import pytest
import torch

from warpo.kernels.integrations import doctor
from warpo.kernels.integrations.patching import (
    IntegrationError,
    Library,
    Registry,
    is_ours,
    wrap,
)
from warpo.kernels.integrations.serving import PassOn, as_flags, require_served

HERE = __name__
REGISTRY = {"parse": packaging.version.parse}
VERSION = Library("packaging", ()).version()


def make(tested=(VERSION,)):
    library = Library("packaging", tested, [Registry(HERE, "REGISTRY")])

    @library.replaces("packaging.version", "parse", "logprobs")
    def parse(original, version):
        return "ours" if version == "1" else original(version)

    @library.replaces("packaging.version", "Version.__str__", "logprobs")
    def __str__(original, self):
        return "v" + original(self)

    return library


@pytest.fixture
def library():
    library = make()
    yield library
    library.unpatch()


def holders():
    """Who had imported `parse` by name."""
    held = types.ModuleType("held_by_name")
    held.parse = packaging.version.parse
    sys.modules["held_by_name"] = held
    return held


def test_functions_are_replaced_wherever_they_are_held_and_put_back(library):
    held, original = holders(), packaging.version.parse
    library.patch()
    assert packaging.version.parse("1") == held.parse("1") == REGISTRY["parse"]("1") == "ours"
    assert str(packaging.version.Version("1.2")) == "v1.2"
    assert library.patched() == library.names() == ("parse", "Version.__str__")
    late = types.ModuleType("imported_later")
    late.parse = packaging.version.parse
    sys.modules["imported_later"] = late
    library.unpatch()
    assert packaging.version.parse is held.parse is late.parse is REGISTRY["parse"] is original
    assert str(packaging.version.Version("1.2")) == "1.2"
    assert library.patched() == ()


def test_what_is_not_ours_is_passed_on_unchanged(library):
    with library.patch():
        assert packaging.version.parse("1.2") == packaging.version.Version("1.2")
        with pytest.raises(packaging.version.InvalidVersion):
            packaging.version.parse("?")


def test_a_replacement_looks_like_the_original(library):
    original = packaging.version.parse
    with library.patch():
        ours = packaging.version.parse
        assert is_ours(ours) and not is_ours(original)
        assert ours.__name__ == "parse" and ours.__doc__ == original.__doc__
        assert ours.__module__ == "packaging.version"


def test_a_handle_takes_back_what_it_did_and_no_more(library):
    with library.patch(only=["parse"]):
        with library.patch():
            assert library.patched() == ("parse", "Version.__str__")
        assert library.patched() == ("parse",)
    assert library.patched() == ()
    with pytest.raises(KeyError), library.patch():
        raise KeyError
    assert library.patched() == ()


def test_names_that_do_not_exist_are_refused(library):
    with pytest.raises(ValueError, match="no replacement for 'pars'; there are parse"):
        library.patch(only=["parse", "pars"])
    with pytest.raises(ValueError, match=r"a list of names, got the string 'parse'"):
        library.patch(only="parse")
    assert library.patched() == ()


def test_a_version_that_was_not_tested_is_refused_with_the_fix():
    library = make(tested=("0.1", "0.2"))
    message = f"packaging {VERSION} is installed.* 0.1, 0.2: pip install packaging==0.2"
    with pytest.raises(IntegrationError, match=message):
        library.patch()
    assert library.patched() == () and "0.1, 0.2" in library.problem()


def test_a_library_that_is_not_installed_is_refused_with_the_fix():
    with pytest.raises(IntegrationError, match="no-such-trainer is not installed in .*pip install"):
        Library("no-such-trainer", ["1.0"]).patch()


def test_a_library_that_lacks_a_package_is_refused_with_its_name(library):
    @library.replaces("packaging.no_such_module", "scan", "logprobs")
    def scan(original, version):
        return original(version)

    message = f"packaging {VERSION} is installed but cannot be imported in .*packaging.no_such_mod"
    with pytest.raises(IntegrationError, match=message):
        library.patch()
    assert "no_such_module" in library.problem()


def test_another_signature_is_refused_and_nothing_is_half_patched(library):
    @library.replaces("packaging.utils", "canonicalize_name", "logprobs")
    def canonicalize_name(original, name, *, validate=True):
        return name

    message = r"canonicalize_name\(name.*tested with \(name, validate=True\)"
    with pytest.raises(IntegrationError, match=message):
        library.patch()
    assert library.patched() == ()
    assert library.patch(only=["parse"]) and library.patched() == ("parse",)


def test_a_hook_of_the_library_comes_before_the_dictionary(library, monkeypatch):
    calls = []

    def register(key):
        return lambda function: calls.append(key) or REGISTRY.__setitem__(key, function)

    monkeypatch.setattr(sys.modules[HERE], "register", register, raising=False)
    library.registries = (Registry(HERE, "REGISTRY", register="register"),)
    with library.patch():
        assert calls == ["parse"] and REGISTRY["parse"]("1") == "ours"
    assert calls == ["parse", "parse"] and not is_ours(REGISTRY["parse"])


def test_tensors_that_the_kernels_take():
    x = torch.zeros(2)
    require_served(x, None, x.bfloat16(), torch.nn.Parameter(x))
    for tensors, reason in (
        ([x.double()], "a tensor of float64"),
        ([x, torch.zeros(2, dtype=torch.int64)], "a tensor of int64"),
        ([x.to("meta")], "tensors on meta"),
        ([x, x.to("meta")], "tensors on two devices"),
        ([x.as_subclass(type("Sharded", (torch.Tensor,), {}))], "a Sharded, not a plain tensor"),
    ):
        with pytest.raises(PassOn, match=reason):
            require_served(*tensors)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int32,
        torch.int64,
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float64,
    ],
)
def test_masks_are_flags_or_passed_on(dtype):
    mask = torch.tensor([[0, 1, 1], [1, 0, 0]]).to(dtype)
    for layout in (mask, mask.t(), mask[:, ::2], mask[:, :0]):
        flags = as_flags(layout)
        assert flags.dtype == torch.bool and torch.equal(flags, layout != 0)
    assert as_flags(None) is None
    weights = {torch.bool: [], torch.uint8: [2, 255]}.get(dtype, [2, -1])
    if dtype.is_floating_point:
        weights += [0.5, 1.0 + torch.finfo(dtype).eps, torch.nan, torch.inf]
    for weight in weights:
        with pytest.raises(PassOn, match="a mask of weights"):
            as_flags(torch.where(mask == 1, torch.tensor(weight, dtype=dtype), mask))


def test_calls_are_counted_with_the_reasons_of_those_passed_on(library):
    @library.replaces("packaging.utils", "canonicalize_name", "logprobs", rounds=True)
    def canonicalize_name(original, name, *, validate=False):
        if not isinstance(name, torch.Tensor) and len(name) > 3:
            raise PassOn("a long name")
        if not validate:
            raise PassOn("no validation", ("Another_Name",))
        return name

    with library.patch():
        canonical = packaging.utils.canonicalize_name
        assert canonical("a_b", validate=True) == "a_b"
        assert canonical("a_b_c") == "a-b-c" and canonical("a_b_d") == "a-b-d"
        assert canonical("a_b") == "another-name"
        with pytest.raises(AttributeError) as error:
            canonical([1, 2, 3, 4])
        assert error.value.__context__ is None
        calls = library.replacements["canonicalize_name"].calls
        assert calls.served == 1
        assert calls.passed_on == {"a long name": 3, "no validation": 1}
        text = library.report()
    assert "1 calls served, 4 passed on; 3: a long name; 1: no validation" in text
    assert "canonicalize_name" not in library.report()
    with library.patch():
        assert calls.served == 0 and not calls.passed_on


def test_the_rounding_of_the_library_is_an_option():
    library = make()

    @library.replaces("packaging.utils", "canonicalize_name", "logprobs", rounds=True)
    def canonicalize_name(original, name, *, validate=False):
        return "ours"

    function = wrap(library.replacements["canonicalize_name"], lambda name: "theirs", True)
    x = torch.zeros(2)
    assert [function(name=y) for y in (x, x.bfloat16(), x.half())] == ["ours", "theirs", "theirs"]
    function = wrap(library.replacements["parse"], lambda version: "theirs", True)
    assert function("1") == "ours"


def test_importing_warpo_imports_no_other_trainer():
    code = (
        "import sys; from warpo.kernels import ops\n"
        "from warpo.kernels.integrations import trl, verl, openrlhf, torchrl, stable_baselines3\n"
        "from warpo.kernels.integrations import arrays, doctor\n"
        "names = {'trl', 'verl', 'openrlhf', 'torchrl', 'stable_baselines3', 'transformers'}\n"
        "print(sorted(names & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_installed_for_the_tests_is_what_is_promised():
    """The tested version of each library is the one that `make peers` and the extra install."""
    root = Path(__file__).parents[2]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    for name in doctor.LIBRARIES:
        library = importlib.import_module(f"warpo.kernels.integrations.{name}").library
        pinned = (root / f"bench/requirements/{name}.txt").read_text().splitlines()
        wanted = library.requirement().replace("_", "-")
        assert wanted in pinned and extras["optional-dependencies"][name] == [wanted]


def test_the_doctor_names_backends_and_what_is_missing():
    text = doctor.report()
    assert "cpu     built" in text and f"torch {torch.__version__}" in text
    for name in doctor.LIBRARIES:
        assert f"  {name}" in text
    with pytest.raises(ValueError, match="no integration 'tlr'; there are trl"):
        doctor.report(["tlr"])
