"""Micro-batches as tries, held against a trie of dictionaries."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from warpo.engine.models.batch import pack
from warpo.engine.types import TokenSequence

# few tokens, so that sequences begin alike, repeat, and end within others
TOKENS = st.lists(st.integers(0, 2), min_size=2, max_size=7)


def sequence_of(ids: list[int], cuts: list[int]) -> TokenSequence:
    """Trained from the first cut on, and not between the second and the third."""
    first, *others = sorted({1 + cut % (len(ids) - 1) for cut in cuts})
    spans = [(first, len(ids))]
    if len(others) == 2:
        spans = [(first, others[0]), (others[1], len(ids))]
    return TokenSequence(token_ids=np.array(ids, np.int64), trained_spans=tuple(spans))


SEQUENCES = st.lists(
    st.builds(sequence_of, TOKENS, st.lists(st.integers(0, 9), min_size=1, max_size=3)),
    min_size=1,
    max_size=8,
)


@given(SEQUENCES)
def test_a_row_is_the_trie_of_its_sequences(sequences):
    batch = pack(sequences)
    beginnings = {tuple(s.token_ids[: i + 1]) for s in sequences for i in range(s.num_tokens)}
    # every beginning once, each behind those it continues: the order of tuples is a preorder
    nodes = sorted(beginnings)
    assert batch.input_ids[0].tolist() == [node[-1] for node in nodes]
    assert batch.position_ids[0].tolist() == [len(node) - 1 for node in nodes]
    seen = torch.arange(len(nodes))
    seen = (seen[None] <= seen[:, None]) & (seen[:, None] < batch.subtree_end[None])
    ancestors = [[other == node[: len(other)] for other in nodes] for node in nodes]
    assert seen.tolist() == ancestors
    longest = max(s.num_tokens for s in sequences)
    assert batch.gather_index.shape == (len(sequences), longest)
    for path, sequence in zip(batch.gather_index.tolist(), sequences, strict=True):
        whole = tuple(sequence.token_ids)
        padded = [whole[: min(i + 1, len(whole))] for i in range(longest)]
        assert [nodes[i] for i in path] == padded
    flat = batch.gather_index.flatten()
    assert torch.equal(flat[batch.scatter_index], torch.arange(len(nodes)))
    assert torch.equal(batch.scatter_index % longest, batch.position_ids[0])


@given(SEQUENCES)
def test_columns_stay_in_the_order_of_the_sequences(sequences):
    batch = pack(sequences)
    trained = [
        [i for start, stop in s.trained_spans for i in range(start, stop)] for s in sequences
    ]
    assert batch.cu_seqlens.tolist() == np.cumsum([0, *map(len, trained)]).tolist()
    targets = [
        int(s.token_ids[i]) for s, places in zip(sequences, trained, strict=True) for i in places
    ]
    assert batch.targets.tolist() == targets
    before = [
        path[i - 1]
        for path, places in zip(batch.gather_index.tolist(), trained, strict=True)
        for i in places
    ]
    assert batch.logit_positions.tolist() == before
