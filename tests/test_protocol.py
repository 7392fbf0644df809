"""What a suite's protocol says beside its card: its model's and scorers' settings, free options, the headline, the worth of a refusal."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fakes.suite import Evaluator, card, make_job, make_weights, model_recipe, set_faults
from helpers.replay import said, serving

from mmalign import evaluate, jobs, judge, reach, results
from mmalign.evaluate import Job
from mmalign.executors import Inline
from mmalign.types import MmalignError, Result, Row, Sample, Value


@dataclass(frozen=True)
class Choosing(Evaluator):
    """A suite whose options choose what is quoted."""

    quoted: str = "brightness"
    free: ClassVar[tuple[str, ...]] = ("quoted", "count")
    sampling_options: ClassVar[dict[str, Any]] = {"steps": 9, "unheard_of": 1}

    @property
    def headline(self) -> str:
        return self.quoted


@dataclass(frozen=True)
class Forgiving(Evaluator):
    """A suite in which a refusal is worth something."""

    refused: ClassVar[dict[str, Value]] = {"brightness": Value(0.0, {"bright": 0.0})}


def run(folder: Path, job: Job, **changes: Any) -> Result:
    return evaluate.evaluate(replace(job, **changes), Inline(), folder / "results")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_job(make_weights(tmp_path / "w"))


def test_an_option_that_chooses_what_is_measured_deviates_in_nothing_and_may_name_the_headline(tmp_path: Path, job: Job) -> None:
    result = run(tmp_path, job, evaluator=Choosing(quoted="even"))
    assert result.headline == "even" and result.status == "complete" and results.is_complete(result)
    assert "dots_suite.quoted" not in {one.field for one in result.deviations}
    weighed = run(tmp_path, job, evaluator=Choosing(weight=2.0))
    assert weighed.headline == "brightness" and {one.field for one in weighed.deviations} == {"dots_suite.weight", "sampling.steps"}


def test_a_protocols_sampling_settings_are_no_deviation_and_what_is_typed_over_them_is(tmp_path: Path, job: Job) -> None:
    evaluator = Choosing()
    model = jobs.with_protocol(job.model, evaluator)
    result = run(tmp_path, job, evaluator=evaluator, model=model)
    assert result.sampling["settings"]["steps"] == 9 and not result.deviations, "an option that the family lacks is left aside"
    typed = jobs.with_protocol(model_recipe(tmp_path / "w", steps="4"), evaluator)
    (told,) = run(tmp_path, job, evaluator=evaluator, model=typed).deviations
    assert (told.field, told.official, told.used) == ("sampling.steps", "9", "4")
    assert jobs.with_protocol(job.model, Evaluator()) is job.model


def test_a_card_that_fixes_no_number_of_prompts_is_deviated_from_by_none(tmp_path: Path, job: Job) -> None:
    assert [one.field for one in run(tmp_path, job, card=card(prompts=7)).deviations] == ["prompts"]
    assert not run(tmp_path, job, card=card(prompts=0)).deviations


def test_a_refusal_is_a_hole_unless_the_protocol_says_what_it_is_worth(tmp_path: Path, job: Job) -> None:
    set_faults(tmp_path / "w", {"p001": "refuse", "p002": "raise"})
    plain, worth = run(tmp_path, job), run(tmp_path, job, evaluator=Forgiving())
    assert plain.counts.failed == {"generate/refusal": 2, "generate/error": 2}
    assert worth.counts.failed == {"generate/error": 2} and worth.counts.scored == 10
    folder = evaluate.run_directory(tmp_path / "results", job)
    rows = {row.request.id: row for row in results.read_rows(results.rows_path(results.json_path(folder, worth.run)))}
    refused: Row = rows["p001/0"]
    assert isinstance(refused.sample, Sample) and refused.sample.image_sha is None
    assert refused.value("brightness").x == 0.0 and refused.value("brightness").detail == "The model declined: the model refused"
    assert rows["p002/0"].failure is not None and rows["p002/0"].failure.kind == "error"


# A judge that cannot be asked.


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address at which nothing answers, and no memory of it."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    reach._asked.cache_clear()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
    yield address
    reach._asked.cache_clear()


def test_an_absent_judge_is_a_sentence_with_its_remedy(nobody: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no .env
    assert judge.absence("gpt-4o", "", "OPENAI_API_KEY").startswith("The judge gpt-4o at OpenAI needs a key. Export OPENAI_API_KEY")
    told = judge.absence("tiny", nobody, "OPENAI_API_KEY")
    assert told.startswith("The judge tiny cannot be asked: http://127.0.0.1:") and told.endswith("or name another with base_url.")
    with serving(lambda body, number: said("fine")) as server:
        assert judge.absence("tiny", server.url, "OPENAI_API_KEY") == "" and not server.requests


@pytest.mark.parametrize(
    ("model", "base_url", "moves"),
    [
        ("gpt-4o", "", True),
        ("gpt-4.1", "", True),
        ("gpt-4o-2024-05-13", "", False),
        ("gpt-4-0613", "", False),
        ("gpt-4o", "http://127.0.0.1:8000/v1", False),
    ],
)
def test_a_name_without_a_date_may_mean_another_model_tomorrow(model: str, base_url: str, moves: bool) -> None:
    assert judge.is_alias(model, base_url) == moves


ASKING = '''"""Asks a judge."""
from dataclasses import dataclass
from mmalign.judge import Endpoint, Judge, Question, Reply
from mmalign.types import Value

@dataclass(frozen=True)
class Config:
    base_url: str = ""

class Asking:
    name, range, fingerprint = "brightness", (0.0, 1.0), "asking"
    def __init__(self, url):
        self.judge = Judge(Endpoint("tiny", url))
    def score(self, samples):
        assert all(isinstance(reply, Reply) for reply in self.judge.ask([Question("how?")] * len(samples)))
        return [Value(1.0, {"bright": 1.0}) for _ in samples]

def load(config, device="cpu"):
    return Asking(config.base_url)
'''


def test_nothing_is_drawn_for_a_judge_that_cannot_be_asked_and_what_is_judged_needs_none(nobody: str, tmp_path: Path, job: Job) -> None:
    from mmalign import registry
    from mmalign.worker import Recipe

    (tmp_path / "asking.py").write_text(ASKING)
    entry = registry.find("scorers", "asking", [tmp_path / "asking.py"])

    def judged(url: str) -> dict[str, Recipe]:
        return {"brightness": Recipe(entry, {"base_url": url})}

    with pytest.raises(MmalignError, match="The scorer 'brightness' has nobody to ask. The judge tiny cannot be asked"):
        run(tmp_path, job, scorers=judged(nobody))
    assert not (tmp_path / "w" / "calls.log").exists()
    with serving(lambda body, number: said("fine")) as server:
        assert run(tmp_path, job, scorers=judged(server.url)).status == "complete"
    assert run(tmp_path, job, scorers=judged(nobody)).status == "complete", "every value is in the store"
