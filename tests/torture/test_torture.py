import pytest

from tests.torture.campaigns import CAMPAIGNS, run


@pytest.mark.slow(minutes=1)
@pytest.mark.parametrize("name", CAMPAIGNS)
def test_the_first_attacks_of_a_campaign_are_survived(name):
    assert run(name, range(CAMPAIGNS[name].short), 1, lambda: None) == {}
