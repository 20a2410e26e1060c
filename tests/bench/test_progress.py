import sys

import pytest

from warpo.bench.progress import Progress, shown


def test_the_time_left_goes_by_the_parts_that_are_done():
    progress = Progress([10.0, 30.0, 60.0])
    progress.begin()
    assert progress.left_s() == pytest.approx(100, abs=1)
    progress.start -= 5.0  # the first part took half of what was expected
    progress.begin()
    assert progress.left_s() == pytest.approx(45, abs=1)
    assert str(progress).startswith("2/3, about 0:4")
    assert progress.share_done() == pytest.approx(0.1)


def test_without_a_terminal_each_part_is_a_line(capsys):
    with shown(Progress([1.0, 1.0])) as tell:
        tell("first")
        tell("second")
    assert [line.split("] ")[1] for line in capsys.readouterr().err.splitlines()] == [
        "first",
        "second",
    ]


def test_a_terminal_shows_a_bar_that_goes_when_it_is_done(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with shown(Progress([1.0])) as tell:
        tell("logprobs")
    assert "logprobs" not in capsys.readouterr().out
