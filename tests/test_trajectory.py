"""What samplers and trainers exchange."""

import pytest
import torch

from mmalign.trajectory import Policy, Prompts, Trajectory
from mmalign.types import UsageError


@pytest.mark.parametrize(("settings", "message"), [({"temperature": 0.0}, "temperature"), ({"guidance": float("inf")}, "guidance")])
def test_a_policy_without_log_probs_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        Policy(**settings)


def test_rows_of_prompts_may_be_repeated():
    ids = torch.arange(6).view(2, 3)
    prompts = Prompts(("a", "b"), ids, ids > 0, ids + 10, ids > 1, {"pooled": torch.tensor([[0.0], [1.0]])})
    chosen = prompts.select([1, 0, 1])
    assert chosen.texts == ("b", "a", "b") and len(chosen) == 3
    assert chosen.ids.tolist() == ids[[1, 0, 1]].tolist() and chosen.uncond_ids[0].tolist() == [13, 14, 15]
    assert chosen.mask.dtype == torch.bool and chosen.embeds["pooled"].flatten().tolist() == [1, 0, 1]


def test_rows_of_a_trajectory_keep_their_seeds():
    drawn = Trajectory("ar", torch.arange(6).view(3, 2), torch.zeros(3, 2), Policy(), (7, 8, 9))
    chosen = drawn.select([2, 0])
    assert chosen.seeds == (9, 7) and chosen.actions.tolist() == [[4, 5], [0, 1]] and chosen.step_of is None and len(chosen) == 2
