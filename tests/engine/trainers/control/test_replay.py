import numpy as np
import pytest
import torch

from warpo.engine.errors import CheckpointError
from warpo.engine.trainers.control.replay import ReplayBuffer


def steps_from(start, count):
    """Steps whose numbers tell which they are."""
    ids = np.arange(start, start + count, dtype=np.float32)
    observations = np.stack([ids, ids + 0.25], 1)
    return observations, -ids[:, None], observations + 1, 2 * ids, ids % 3 == 0


@pytest.mark.parametrize("chunks", [[3], [7], [3, 4], [5, 5], [4, 4, 4, 4, 4], [2, 7, 6]])
def test_the_newest_steps_are_kept_whole(chunks):
    buffer, start = ReplayBuffer(7, 2, 1, torch.device("cpu")), 0
    for count in chunks:
        buffer.add(*steps_from(start, count))
        start += count
    assert len(buffer) == min(start, 7)
    torch.manual_seed(0)
    drawn = buffer.draw(400)
    ids = drawn.observations[:, 0]
    assert sorted(set(ids.tolist())) == list(range(max(0, start - 7), start))
    wanted = (ids[:, None] + torch.tensor([0, 0.25]), -ids[:, None])
    torch.testing.assert_close(drawn.observations, wanted[0])
    torch.testing.assert_close(drawn.actions, wanted[1])
    torch.testing.assert_close(drawn.next_observations, wanted[0] + 1)
    torch.testing.assert_close(drawn.rewards, 2 * ids)
    assert drawn.terminated.tolist() == (ids % 3 == 0).tolist()


def test_a_restored_buffer_draws_and_forgets_the_same():
    whole, restored = (ReplayBuffer(7, 2, 1, torch.device("cpu")) for _ in range(2))
    whole.add(*steps_from(0, 7))
    whole.add(*steps_from(7, 3))
    restored.load_state_dict(whole.state_dict())
    for buffer in (whole, restored):
        buffer.add(*steps_from(10, 2))
    torch.manual_seed(1)
    expected = whole.draw(50)
    torch.manual_seed(1)
    for mine, other in zip(expected, restored.draw(50), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_a_buffer_of_another_size_is_refused():
    state = ReplayBuffer(7, 2, 1, torch.device("cpu"))
    state.add(*steps_from(0, 7))
    for other in (
        ReplayBuffer(5, 2, 1, torch.device("cpu")),
        ReplayBuffer(7, 3, 1, torch.device("cpu")),
    ):
        with pytest.raises(CheckpointError, match="set sac.buffer_size and environment as they"):
            other.load_state_dict(state.state_dict())
