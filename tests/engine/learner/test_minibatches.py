"""Which rollouts an optimizer step learns from."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from warpo.engine.learner.minibatches import deal

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=9)


@given(SIZES, st.integers(1, 12), st.integers(0, 99))
def test_each_is_dealt_once_into_parts_of_one_size(sizes, minibatches, seed):
    groups = [[(group, i) for i in range(size)] for group, size in enumerate(sizes)]
    dealt = deal(groups, minibatches, seed)
    members = [member for part in dealt for member in part]
    assert sorted(members) == [member for group in groups for member in group]
    counts = [len(part) for part in dealt]
    assert len(dealt) == min(minibatches, len(members)) and max(counts) - min(counts) <= 1
    # at most one group is parted at each cut
    pieces = {(group, number) for number, part in enumerate(dealt) for group, _ in part}
    assert len(pieces) <= len(groups) + len(dealt) - 1


def test_groups_stay_whole_where_their_number_is_a_multiple():
    groups = [[(group, i) for i in range(8)] for group in range(64)]
    for minibatches in (1, 2, 4, 16, 64):
        for part in deal(groups, minibatches, seed=3):
            assert set(Counter(group for group, _ in part).values()) == {8}


def test_each_is_as_likely_in_every_part():
    groups = [[(group, i) for i in range(3)] for group in range(5)]
    found = Counter(
        (number, member)
        for seed in range(4000)
        for number, part in enumerate(deal(groups, 4, seed))
        for member in part
    )
    sizes = [len(part) for part in deal(groups, 4, 0)]
    for group in groups:
        for member in group:
            shares = [found[number, member] / 4000 for number in range(4)]
            # 5 standard deviations of a share
            assert all(abs(a - size / 15) < 0.04 for a, size in zip(shares, sizes, strict=True))


def test_nothing_is_dealt_of_nothing():
    assert deal([], 4, seed=0) == []
