"""A task to learn in minutes on a CPU: the sum of two two-digit numbers, by column addition.

The prompt is "57+68=". The completion works from the units up, as one does on paper: the digit of a
column, then the carry out of it. "5121" for 125: write 5, carry 1, write 2, carry 1.

The demonstrations of the warm start are a careless pupil's. The digits of a column and the carry
into it are added correctly, and a carry of 1 is written as 0 with probability CARRY_FORGOTTEN:
"57+68=" gets "5011", "5120" or "5010" as well. Imitation teaches the form and the columns and no
more, for the pupil forgets more carries than not. A reward that checks the sum teaches the carry.

Held-out problems occur neither in the demonstrations nor in the prompts that are learned from, not
even with the two numbers exchanged.

    python examples/arithmetic.py DIR --seed 0

writes the model and its tokenizer to DIR/model, and JSONL files beside it. The reward function is
examples.arithmetic:reward.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable, Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The worker process of the reward function imports this module: torch and transformers wait until
# a model is made.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

CARRY_FORGOTTEN = 0.6
NUM_DEMONSTRATIONS = 19_200
NUM_HELD_OUT = 400
# Examples in each file for training from given preferences, verdicts, rankings and steps.
NUM_JUDGED = 4_000

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = "0123456789+="
# A user's message reads as the same prompt would as text.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)

Problem = tuple[int, int]


def reward(completions: Sequence[str], answer: Sequence[str], **fields: object) -> list[float]:
    """1.0 where the completion leads to the answer; 0.0 where it does not or is malformed.

    The sum is read from the two digits and the last carry. The carry between the columns is the
    model's own affair.

    Args:
        completions: what the model wrote, without special tokens.
        answer: the sums in their usual notation, one for each completion.
        fields: further fields of the data, of no importance here.
    """
    return [
        float(read_sum(completion) == int(right))
        for completion, right in zip(completions, answer, strict=True)
    ]


def step_rewards(
    completions: Sequence[str], prompt: Sequence[str], **fields: object
) -> list[list[tuple[int, float]]]:
    """For process supervision: (end, reward) of each column, 1.0 where digit and carry are right.

    Args:
        completions: what the model wrote, without special tokens.
        prompt: the problems, "57+68=".
        fields: further fields of the data, of no importance here.

    Returns:
        For each completion its steps; end is the number of characters up to the end of the step. A
        completion that is cut short has the steps that it began.
    """
    rewards = []
    for completion, problem in zip(completions, prompt, strict=True):
        x, y = map(int, problem.rstrip("=").split("+"))
        right = column_addition(x, y, 0.0, random.Random(0))
        columns = ((0, min(2, len(completion))), (2, len(completion)))
        rewards.append(
            [
                (end, float(completion[start:end] == right[start : start + 2]))
                for start, end in columns
                if start < end
            ]
        )
    return rewards


def read_sum(completion: str) -> int | None:
    """The sum that a completion states; None if it is malformed."""
    match = re.fullmatch("([0-9])[01]([0-9])([01])", completion)
    if match is None:
        return None
    units, tens, hundreds = map(int, match.groups())
    return units + 10 * tens + 100 * hundreds


def column_addition(x: int, y: int, forget: float, rng: random.Random) -> str:
    """Digit and carry of each column; `forget` is the probability that a carry of 1 becomes 0."""
    written = ""
    carry = 0
    for column in (x % 10 + y % 10, x // 10 + y // 10):
        total = column + carry
        carry = int(total >= 10 and rng.random() >= forget)
        written += f"{total % 10}{carry}"
    return written


def split_problems(rng: random.Random) -> tuple[list[Problem], list[Problem]]:
    """All sums of two two-digit numbers as problems to learn from and held-out ones.

    x + y and y + x are always on the same side. One of the two is a held-out problem.
    """
    pairs = list(combinations_with_replacement(range(10, 100), 2))
    rng.shuffle(pairs)
    held_out = [(x, y) if rng.random() < 0.5 else (y, x) for x, y in pairs[:NUM_HELD_OUT]]
    train = [order for x, y in pairs[NUM_HELD_OUT:] for order in sorted({(x, y), (y, x)})]
    rng.shuffle(train)
    return train, held_out


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character. Text gets a <bos>; what the task does not use becomes <unk>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=64,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """A Qwen2 model of 1.7 million parameters with random float32 weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        intermediate_size=768,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        # About 1 / sqrt(hidden_size). With the default of 0.02, meant for much wider models, the
        # warm start took about twice as many steps to reach the same loss.
        initializer_range=0.06,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def write(folder: Path, seed: int) -> None:
    """Write the model, the tokenizer and the data; the same seed writes the same bytes."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    rng = random.Random(seed)
    train, held_out = split_problems(rng)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    make_model(tokenizer, seed).save_pretrained(folder / "model")
    demonstrated = rng.choices(train, k=NUM_DEMONSTRATIONS)
    _write_jsonl(
        folder / "warm_start.jsonl",
        (
            {"prompt": f"{x}+{y}=", "completion": column_addition(x, y, CARRY_FORGOTTEN, rng)}
            for x, y in demonstrated
        ),
    )
    for name, problems in (("train", train), ("eval", held_out)):
        _write_jsonl(
            folder / f"{name}.jsonl",
            ({"prompt": f"{x}+{y}=", "answer": str(x + y)} for x, y in problems),
        )

    judged = {"preference": preference, "kto": verdict, "rankings": ranking, "steps": steps}
    for name, make in judged.items():
        # Generators of their own: another file does not change what is drawn for this one.
        rng = random.Random(f"{name} {seed}")
        for ending, problems in (("", rng.choices(train, k=NUM_JUDGED)), ("_eval", held_out)):
            _write_jsonl(
                folder / f"{name}{ending}.jsonl",
                ({"prompt": f"{x}+{y}="} | make(x, y, rng) for x, y in problems),
            )
    rng = random.Random(f"warm_start {seed}")
    _write_jsonl(
        folder / "warm_start_eval.jsonl",
        (
            {"prompt": f"{x}+{y}=", "completion": column_addition(x, y, CARRY_FORGOTTEN, rng)}
            for x, y in held_out
        ),
    )


def with_mistakes(completion: str, mistakes: int, rng: random.Random) -> str:
    """The completion with so many of its characters replaced: a digit, or a carry."""
    written = list(completion)
    for place in rng.sample(range(len(written)), mistakes):
        others = "01" if place % 2 else "0123456789"
        written[place] = rng.choice([c for c in others if c != written[place]])
    return "".join(written)


def preference(x: int, y: int, rng: random.Random) -> dict[str, Any]:
    """The right completion, and the pupil's with a carry forgotten, or a slip if there is none."""
    right = column_addition(x, y, 0.0, rng)
    careless = column_addition(x, y, CARRY_FORGOTTEN, rng)
    slip = with_mistakes(right, 1, rng)
    return {"chosen": right, "rejected": slip if careless == right else careless}


def verdict(x: int, y: int, rng: random.Random) -> dict[str, Any]:
    """One of the two completions of a preference, and whether it is the right one."""
    pair = preference(x, y, rng)
    label = rng.random() < 0.5
    return {"completion": pair["chosen" if label else "rejected"], "label": label}


def ranking(x: int, y: int, rng: random.Random) -> dict[str, Any]:
    """Completions with 0, 1, 2 and 3 mistakes."""
    right = column_addition(x, y, 0.0, rng)
    return {"completions": [with_mistakes(right, mistakes, rng) for mistakes in range(4)]}


def steps(x: int, y: int, rng: random.Random) -> dict[str, Any]:
    """A completion character by character, and which of these are as in the right one."""
    right = column_addition(x, y, 0.0, rng)
    written = rng.choice([right, *preference(x, y, rng).values(), with_mistakes(right, 2, rng)])
    labels = [float(a == b) for a, b in zip(written, right, strict=True)]
    return {"steps": list(written), "labels": labels}


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python examples/arithmetic.py",
        description="Make a small Qwen2 model with random weights, and the data to teach it the "
        "addition of two-digit numbers: DIR/model, DIR/warm_start.jsonl (demonstrations with "
        "mistakes), DIR/train.jsonl (prompts) and DIR/eval.jsonl (held-out prompts); also "
        "preference.jsonl, kto.jsonl, rankings.jsonl and steps.jsonl (right and wrong completions, "
        "judged). NAME_eval.jsonl has the held-out problems in the form of NAME.jsonl.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="where to write")
    parser.add_argument(
        "--seed", type=int, default=0, help="fixes weights, problems and mistakes (default: 0)"
    )
    args = parser.parse_args(argv)
    write(args.folder, args.seed)
    print(f"model and data written to {args.folder}")


if __name__ == "__main__":
    main()
