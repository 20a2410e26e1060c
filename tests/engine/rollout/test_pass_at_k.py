from itertools import combinations

import pytest

from warpo.engine.rollout.pass_at_k import pass_at_k, powers_of_two


@pytest.mark.parametrize("samples", [1, 2, 5, 6])
def test_the_estimate_is_the_share_of_subsets_with_a_correct_completion(samples):
    """Equation 1 counts the subsets of k completions; here they are enumerated."""
    for k in range(1, samples + 1):
        for correct in range(samples + 1):
            results = [i < correct for i in range(samples)]
            subsets = [any(subset) for subset in combinations(results, k)]
            wanted = sum(subsets) / len(subsets)
            assert pass_at_k([correct], samples, k) == pytest.approx(wanted, abs=1e-15)


def test_prompts_are_averaged_and_large_samples_stay_finite():
    assert pass_at_k([0, 1, 4], 4, 2) == pytest.approx((0 + 0.5 + 1) / 3)
    assert pass_at_k([3], 4096, 1) == pytest.approx(3 / 4096)
    assert pass_at_k([1], 4096, 2048) == pytest.approx(0.5)


def test_which_k():
    assert [powers_of_two(n) for n in (1, 2, 4, 6)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 6]]
