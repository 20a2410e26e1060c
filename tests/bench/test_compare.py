import json
from pathlib import Path

import pytest

from warpo.bench.cli import main

COMMON = {
    "machine": "a",
    "threads": 2,
    "date": "2026-01-01",
    "commit": "abc",
    "limits": {"copy": 1e10},
}


def run(folder, *times, provider="cpu", **changes):
    """A run of one operation at as many sizes as there are times."""
    folder.mkdir()
    with (folder / "bench.jsonl").open("w") as file:
        for number, ms in enumerate(times):
            row = {
                "operation": "gae",
                "sizes": {"sequences": number + 1},
                "dtype": "float32",
                "mode": "fwd",
                "provider": provider,
            }
            if isinstance(ms, str):
                row["problem"] = ms
            else:
                row |= {"ms": ms, "p20_ms": 0.99 * ms, "p80_ms": 1.01 * ms}
            file.write(json.dumps(row | COMMON | changes) + "\n")
    return str(folder)


def test_the_noise_is_no_change(tmp_path, capsys):
    before, after = run(tmp_path / "a", 1.0, 2.0), run(tmp_path / "b", 1.04, 1.95)
    assert main(["compare", before, after]) == 0
    assert "2 cases, 0 changed" in capsys.readouterr().out


def test_slower_is_a_regression_and_faster_is_not(tmp_path, capsys):
    before, after = run(tmp_path / "a", 1.0, 2.0), run(tmp_path / "b", 1.5, 1.0)
    assert main(["compare", before, after]) == 1
    text = capsys.readouterr().out
    assert "1.50 times as long" in text and "2.00 times as fast" in text
    assert main(["compare", before, run(tmp_path / "c", 1.0, 1.0)]) == 0


def test_a_time_that_is_gone_is_a_regression(tmp_path, capsys):
    before, after = run(tmp_path / "a", 1.0), run(tmp_path / "b", "wrong: 1e-2 off float64")
    assert main(["compare", before, after]) == 1
    assert "no time any more" in capsys.readouterr().out


def both(folder, ours, others):
    """A run of warpo and of another provider."""
    run(folder, *ours)
    more = run(folder.with_name(f"{folder.name}-others"), *others, provider="eager")
    lines = [Path(f"{path}/bench.jsonl").read_text() for path in (folder, more)]
    (folder / "bench.jsonl").write_text("".join(lines))
    return str(folder)


def test_what_the_machine_did_to_all_is_no_change(tmp_path, capsys):
    before = both(tmp_path / "a", [1.0, 1.0, 1.0], [2.0, 2.0, 2.0])
    after = both(tmp_path / "b", [1.5, 1.5, 2.3], [3.0, 3.0, 2.0])
    assert main(["compare", before, after]) == 1
    text = capsys.readouterr().out
    assert "9 of 10 times of other providers changed by less than 1.50 times" in text
    assert "6 cases, 1 changed" in text and "2.30 times as long" in text
    assert main(["compare", before, both(tmp_path / "c", [1.4] * 3, [3.0, 2.0, 2.0])]) == 0


def test_others_of_another_version_are_compared_and_may_get_slower(tmp_path, capsys):
    before = run(tmp_path / "a", 1.0, provider="trl", versions={"trl": "1"})
    after = run(tmp_path / "b", 9.0, provider="trl", versions={"trl": "2"})
    assert main(["compare", before, after]) == 0
    text = capsys.readouterr().out
    assert "9.00 times as long" in text and "no other providers of the same versions" in text


def test_another_machine_is_said(tmp_path, capsys):
    main(["compare", run(tmp_path / "a", 1.0), run(tmp_path / "b", 1.0, machine="b")])
    assert "not the same machine: a, then b" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", '{"operation": "gae"}'])
def test_what_is_no_run_is_refused(tmp_path, text, capsys):
    file = tmp_path / "bench.jsonl"
    file.write_text(text)
    with pytest.raises(SystemExit) as caught:
        main(["compare", str(file), run(tmp_path / "b", 1.0)])
    assert caught.value.code == 2 and "bench.jsonl" in capsys.readouterr().err


def test_nothing_in_common_is_refused(tmp_path, capsys):
    one = run(tmp_path / "a", 1.0)
    with pytest.raises(SystemExit):
        main(["compare", one, run(tmp_path / "b", 1.0, provider="eager")])
    assert "no case in common" in capsys.readouterr().err
