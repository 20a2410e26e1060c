import errno
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from warpo.engine import cli, commands
from warpo.engine.config.file import keys
from warpo.engine.config.policy import Config, load_config
from warpo.engine.errors import DataError
from warpo.engine.run.terminal import describe


@pytest.fixture
def config_path(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m\noutput_dir: o\nsteps: 3\nsampler: transformers\n"
        "data: {train: t.jsonl}\nreward: {sources: 'a:b'}\n"
    )
    return str(path)


@pytest.fixture
def stub_run(monkeypatch):
    """Put a function in the place of the training loop; gives the configs it was called with."""

    def install(run=lambda config: None):
        called = []

        def record(config):
            called.append(config)
            run(config)

        module = types.SimpleNamespace(run=record)
        monkeypatch.setitem(sys.modules, "warpo.engine.trainers.policy.train", module)
        return called

    return install


def raise_(error):
    raise error


def test_help_comes_fast_and_imports_no_torch():
    code = (
        "import sys; from warpo.engine.cli import main; main(['train', '--help']);"
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # 0.2 s alone on this kind of machine; the rest is for a busy one.
    assert time.perf_counter() - start < 1.5
    assert "usage: warpo train CONFIG.yaml" in result.stdout


def test_help_shows_every_key_with_its_text_and_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = commands.train_help()
    flat = " ".join(text.split())
    for key in keys(Config).values():
        assert f"--{key.name} {key.wanted}" in flat
        assert key.text in flat
    assert "--update.lr  a number > 0  (default: 1e-06)" in text
    assert "--model  text  (required)" in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_the_example_of_the_help_is_a_config_that_loads(tmp_path):
    path = tmp_path / "example.yaml"
    path.write_text(commands.EXAMPLE_YAML)
    assert load_config(path, ["--sampler", "transformers"]).reward.sources == ("my_rewards:exact",)


def test_train_hands_the_config_to_run(config_path, stub_run):
    called = stub_run()
    assert cli.main(["train", config_path, "--steps", "9"]) == 0
    assert [config.steps for config in called] == [9]


def test_a_curable_error_is_one_message_without_traceback(config_path, stub_run, capsys):
    stub_run(lambda config: raise_(DataError("t.jsonl:3: not JSON")))
    assert cli.main(["train", config_path]) == 1
    assert capsys.readouterr().err == "warpo: t.jsonl:3: not JSON\n"


def test_a_bad_setting_fails_before_run(config_path, stub_run, capsys):
    called = stub_run()
    assert cli.main(["train", config_path, "--stepz", "9"]) == 1
    assert "unknown key stepz: did you mean steps?" in capsys.readouterr().err
    assert called == []


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ZeroDivisionError("bug\nand more"), "ZeroDivisionError: bug (engine/commands.py:"),
        (ZeroDivisionError(), "ZeroDivisionError: no message ("),
        (FileNotFoundError(2, "No such file", "x.bin"), "x.bin: No such file ("),
        (MemoryError("1 GiB"), "out of memory in engine/commands.py:"),
        (ValueError("at http://me:hunter-2@h"), "ValueError: at http://***@h ("),
        (
            OSError(errno.ENOSPC, "No space left on device", "/tmp/x/y"),
            "/tmp/x/y: No space left on",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_unforeseen_error_is_a_line_and_its_traceback_a_file(
    config_path, stub_run, capsys, tmp_path, error, line
):
    stub_run(lambda config: raise_(error))
    (tmp_path / "out").mkdir()
    assert cli.main(["train", config_path, "--output_dir", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    kept = tmp_path / "out" / "traceback.txt"
    assert told.startswith(f"warpo: {line}") and told.count("\n") == 1
    assert told.endswith(f"; traceback in {kept}\n")
    assert "in raise_" in kept.read_text() and "hunter-2" not in kept.read_text()


def test_a_traceback_without_an_output_dir_is_kept_elsewhere(config_path, stub_run, capsys):
    stub_run(lambda config: raise_(ZeroDivisionError("bug")))
    assert cli.main(["train", config_path, "--output_dir", "/dev/null/x"]) == 1
    kept = Path(capsys.readouterr().err.rpartition(" in ")[2].strip())
    assert "in raise_" in kept.read_text()
    kept.unlink()


def test_a_full_disk_is_named_with_what_is_free():
    error = OSError(errno.ENOSPC, "No space left on device", "/dev/shm/absent/model.safetensors")
    assert re.fullmatch(
        r"/dev/shm/absent/model.safetensors: No space left on device, "
        r"[\d.]+ MiB are free on the disk of /dev/shm",
        describe(error),
    )


def test_a_reader_that_leaves_is_no_error():
    for command in (["train", "--help"], ["algorithms"]):
        code = f"import sys; from warpo.engine.cli import main; sys.exit(main({command}))"
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 0


def test_ctrl_c_exits_130(config_path, stub_run, capsys):
    stub_run(lambda config: raise_(KeyboardInterrupt))
    assert cli.main(["train", config_path]) == 130
    assert capsys.readouterr().err == "warpo: interrupted\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "there is no command 'trian'"),
        (["train"], "the first argument is the YAML file"),
        (["train", "--steps", "3"], "the first argument is the YAML file"),
    ],
)
def test_wrong_usage_exits_2(args, message, capsys):
    assert cli.main(args) == 2
    assert message in capsys.readouterr().err


def test_bare_help(capsys):
    assert cli.main(["--help"]) == 0
    assert "warpo train --help" in capsys.readouterr().out
    assert cli.main([]) == 2
