"""The reward: weights, clipping, masks, counts and the stop; parts are the scorers' own values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign.reward import Reward, load_reward, load_scorer, parse_weights
from mmalign.testbed import world
from mmalign.types import Failure, MmalignError, Prompt, Request, Sample, Score, UsageError, Value


@dataclass
class Fixed:
    """A scorer that reads its answer from the prompt's meta."""

    name: str
    fingerprint: str = "fixed"
    range: tuple[float, float] = (-math.inf, math.inf)

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        answers = [sample.request.prompt.meta[self.name] for sample in samples]
        return [answer if isinstance(answer, Failure) else Value(answer) for answer in answers]


def sample(**meta: object) -> Sample:
    return Sample(Request(Prompt("p", "text", meta=meta), 0, 1), image=np.zeros((2, 2, 3), np.uint8))


DOWN = Failure("score", "timeout", "no answer")


def reward(**options: object) -> Reward:
    return Reward({"a": Fixed("a"), "b": Fixed("b")}, {"a": 1.0, "b": 0.5}, **options)


numbers = st.floats(-1e6, 1e6)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=9))
def test_total_is_the_weighted_sum_and_parts_are_untouched(pairs):
    batch = reward()([sample(a=a, b=b) for a, b in pairs])
    assert batch.total.dtype == np.float64 and batch.ok.all()
    assert batch.total.tolist() == [a + 0.5 * b for a, b in pairs]
    assert batch.parts["a"].tolist() == [a for a, _ in pairs]
    assert batch.parts["b"].tolist() == [b for _, b in pairs]


def test_a_failed_sample_is_masked_and_counted_and_never_a_zero():
    dead = Failure("generate", "oom", "no memory")
    batch = reward(max_failures=1)([sample(a=1, b=2), sample(a=DOWN, b=2), dead, sample(a=1, b=math.inf), sample(a=DOWN, b=DOWN)])
    assert batch.ok.tolist() == [True, False, False, False, False]
    assert batch.total[0] == 2 and np.isnan(batch.total[1:]).all()
    assert batch.failures == {"a/timeout": 2, "a/oom": 1, "b/nonfinite": 1}
    assert batch.parts["b"][1] == 2 and np.isnan(batch.parts["a"][1])
    assert batch.scores["a"][2] is dead


def test_clip_bounds_the_total_and_not_the_part():
    batch = reward(clip={"a": (-1.0, 1.0)})([sample(a=-3.0, b=0.0), sample(a=5.0, b=2.0)])
    assert batch.total.tolist() == [-1.0, 2.0] and batch.parts["a"].tolist() == [-3.0, 5.0]


def test_the_stop_is_strictly_above_the_share_and_says_why():
    half = [sample(a=DOWN, b=1), sample(a=1, b=1)]
    assert reward(max_failures=0.5)(half).failures == {"a/timeout": 1}
    with pytest.raises(MmalignError, match=r"1 of 2 samples have no reward \(1 a/timeout\); at most 49% may fail.*no answer"):
        reward(max_failures=0.49)(half)


def test_an_empty_batch_is_empty():
    assert reward()([]).total.shape == (0,)


def test_a_scorer_that_loses_samples_is_an_error():
    class Short(Fixed):
        def score(self, samples):
            return super().score(samples)[1:]

    with pytest.raises(MmalignError, match="'a' gave 1 scores for 2 samples"):
        Reward({"a": Short("a")}, {"a": 1.0})([sample(a=1), sample(a=2)])


@pytest.mark.parametrize("options", [{"clip": {"c": (0, 1)}}, {"max_failures": 1.5}])
def test_a_reward_that_means_nothing_is_refused(options):
    with pytest.raises(UsageError):
        reward(**options)


def test_weights_are_read_from_text():
    assert parse_weights("shapes=1, Clip-Score=.5,x") == {"shapes": 1.0, "clip_score": 0.5, "x": 1.0}
    for bad in ("", "a=", "a=x", "=1", "a=nan", "a=1,a=2"):
        with pytest.raises(UsageError):
            parse_weights(bad)


def test_a_loaded_reward_gives_the_scorers_own_values():
    scorer = load_scorer("shapes")
    assert load_scorer("shapes", {"form": "strict"}).config.form == "strict"
    samples = [Sample(Request(prompt, 0, 1), image=np.full((96, 96, 3), 255, np.uint8)) for prompt in world.prompts("test", per_kind=1)]
    samples += [Sample(samples[0].request)]
    batch = load_reward({"shapes": 2.0}, overrides={"shapes": {"form": "share"}})(samples)
    values = [score.x for score in scorer.score(samples[:-1])]
    assert batch.parts["shapes"][:-1].tolist() == values and batch.total[:-1].tolist() == [2 * value for value in values]
    assert batch.ok.tolist() == [True] * len(values) + [False] and batch.failures == {"shapes/missing": 1}
