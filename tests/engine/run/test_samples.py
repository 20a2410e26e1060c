"""Completions on a terminal: whatever a model writes, a few lines of its width."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from warpo.engine.run.samples import COMPLETION_LINES, PROMPT_LINES, describe, printable


def test_the_end_of_a_prompt_and_both_ends_of_a_completion_are_shown() -> None:
    prompt = "".join(f"p{i} " for i in range(100)) + "What is 3+4?"
    completion = "Let me think. " + "blah " * 100 + "The answer is 7.<|im_end|>"
    lines = describe("step 20:", prompt, [(1.0, completion), (0.0, "12")], 60, "utf-8")
    assert lines[0] == "step 20:"
    assert lines[1].startswith("  prompt    ... ") and lines[2].endswith("What is 3+4?")
    assert lines[3].startswith("  reward 1  Let me think. blah")
    assert " ... " in "".join(lines[4:7]) and lines[6].endswith("The answer is 7.<|im_end|>")
    assert lines[7] == "  reward 0  12"
    assert len(lines) == 1 + PROMPT_LINES + COMPLETION_LINES + 1


def test_nothing_moves_the_cursor_or_hides() -> None:
    assert printable("a\nb\t\x1b[31m\u202e\x00é\U000e0041") == (
        r"a\nb\t\x1b[31m\u202e\x00é\U000e0041"
    )
    assert printable("é漢", "ascii") == r"\xe9\u6f22"
    assert printable("\ud83d") == r"\ud83d"
    assert describe("t", "", [(0.5, "")], 80, "utf-8") == ["t", "  prompt      ", "  reward 0.5  "]


@settings(max_examples=30)
@given(
    st.text(max_size=600),
    st.text(alphabet=st.sampled_from("漢a\u0301🙂\n "), max_size=600),
    st.integers(40, 130),
)
def test_whatever_is_written_fits(prompt: str, completion: str, width: int) -> None:
    lines = describe("title", prompt, [(0.25, completion)], width, "utf-8")
    assert len(lines) <= 1 + PROMPT_LINES + COMPLETION_LINES + 2
    assert all(cell_len(line) <= width for line in lines)
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for line in lines for c in line)


@pytest.mark.parametrize("width", [1, 10, 24])
def test_a_terminal_too_narrow_is_written_past_its_edge(width: int) -> None:
    lines = describe("title", "p" * 200, [(1.0, "c" * 200)], width, "utf-8")
    assert max(map(len, lines)) == 2 + len("reward 1") + 2 + 20
