from tests.torture.data import attack


def test_damaged_data_is_loaded_or_refused_in_a_line(tmp_path):
    found = [attack(seed, tmp_path) for seed in range(300)]
    assert [problem for problem in found if problem] == []
