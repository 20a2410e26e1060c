"""Micro-batches of a token budget: what is read, what stays together."""

import random
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.models.test_batch import SEQUENCES
from tests.engine.random_models import random_completion, rollouts_of
from warpo.engine.config.sections import UpdateSettings
from warpo.engine.learner.minibatches import make_minibatches
from warpo.engine.models.batch import pack
from warpo.engine.models.micro_batches import TokenCount, split_by_tokens, split_rows, tokens_read


@given(SEQUENCES, st.randoms(use_true_random=False))
def test_tokens_are_counted_as_they_are_packed(sequences, rng):
    count = TokenCount()
    for size in range(1, len(sequences) + 1):
        count = count.with_items([sequences[size - 1]])
        batch = pack(sequences[:size])
        assert (count.read, count.trained) == (batch.input_ids.numel(), batch.num_trained)
    together = TokenCount().with_items(rng.sample(sequences, len(sequences)))
    assert (together.read, together.trained) == (count.read, count.trained)
    # by a model that reads every sequence in a row of its own
    alone = TokenCount(shared=False).with_items(sequences)
    assert alone.read == batch.sequence_tokens == sum(s.num_tokens for s in sequences)


@given(SEQUENCES, st.integers(7, 30))
def test_each_is_in_one_micro_batch_and_prompts_are_parted_only_where_they_must_be(
    sequences, budget
):
    parts = split_rows(sequences, budget)
    assert sorted(row for part in parts for row in part) == list(range(len(sequences)))
    packed = [pack([sequences[row] for row in part]) for part in parts]
    assert all(max(b.input_ids.numel(), b.num_trained) <= budget for b in packed)
    assert tokens_read(sequences, parts) == sum(b.input_ids.numel() for b in packed)
    prompts: dict[tuple[int, ...], list[int]] = {}
    for row, sequence in enumerate(sequences):
        prompts.setdefault(tuple(sequence.token_ids[: sequence.prompt_length]), []).append(row)
    for rows in prompts.values():
        whole = TokenCount().with_items(sequences[row] for row in rows)
        holding = [part for part in parts if not set(rows).isdisjoint(part)]
        assert len(holding) == 1 or not whole.fits(budget)
    alone = split_rows(sequences, budget, shared=False)
    for part in alone:
        tokens = sum(sequences[row].num_tokens for row in part)
        assert tokens <= budget
    assert sorted(row for part in alone for row in part) == list(range(len(sequences)))
    in_order = split_by_tokens(sequences, budget)
    assert [sequence for part in in_order for sequence in part] == sequences


def test_one_that_exceeds_the_budget_is_refused_with_the_setting():
    sequences = rollouts_of([[3]], [random_completion(random.Random(0), 4)]).sequences
    for split in (split_by_tokens, split_rows):
        with pytest.raises(ValueError, match="5 tokens .* raise update.token_budget or lower"):
            split(sequences, 4)


@pytest.mark.parametrize("prompt_tokens", [32, 300, 1024])
def test_a_step_reads_hardly_more_tokens_than_its_trie_has(prompt_tokens):
    """Goal: 1.02 of the tokens of one trie, for 64 x 8 rollouts at the default budget."""
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 60) for _ in range(prompt_tokens)] for _ in range(64)]
    completions = [random_completion(rng, rng.randint(16, 512)) for _ in range(64 * 8)]
    rollouts = rollouts_of(
        [prompt for prompt in prompts for _ in range(8)], completions, group_size=8
    )
    sequences, budget = rollouts.sequences, UpdateSettings().token_budget
    whole = TokenCount().with_items(sequences).read
    scored = split_rows(sequences, budget)
    assert tokens_read(sequences, scored) <= 1.02 * whole
    for minibatches in (1, 4, 16):
        dealt = chain.from_iterable(make_minibatches(rollouts, minibatches, budget, seed=0))
        assert tokens_read(sequences, dealt) <= 1.02 * whole
