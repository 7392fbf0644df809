"""Evaluation as a whole: the denominator, failures, keys, cached work, deviations, the artefacts and what they quote."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from fakes.suite import Evaluator, calls, card, make_job, make_weights, scorer_recipe, set_faults

from mmalign import results as artefacts
from mmalign.evaluate import Job, Progress, evaluate, plan, run_directory
from mmalign.executors import Inline, Processes
from mmalign.provenance import without_secrets
from mmalign.results import continue_line, is_complete, paste_line, read, read_rows, reward_overlap, rows_digest, rows_path
from mmalign.store import Store, image_path
from mmalign.types import Failure, MmalignError, Prompt, Result, Row, Sample, UsageError


@dataclass
class Setting:
    """A job with its own weights, scorer faults and results folder, run inline."""

    folder: Path
    job: Job

    def run(self, **changes: Any) -> Result:
        own = {"batch", "retry_failed", "wait", "command", "report", "executor"} & set(changes)
        options = {name: changes.pop(name) for name in own}
        return evaluate(replace(self.job, **changes), options.pop("executor", Inline()), self.results, **{"batch": 4, **options})

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def directory(self) -> Path:
        return run_directory(self.results, self.job)

    def rows(self, result: Result) -> list[Row]:
        return read_rows(rows_path(artefacts.json_path(self.directory, result.run)))

    def generated(self) -> list[str]:
        return calls(self.folder / "w")

    def scored(self) -> list[str]:
        return calls(self.folder / "s")

    def fail(self, model: dict[str, Any] | None = None, scorer: dict[str, Any] | None = None) -> None:
        set_faults(self.folder / "w", model or {})
        set_faults(self.folder / "s", scorer or {})


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    set_faults(tmp_path / "s", {})
    return Setting(tmp_path, make_job(make_weights(tmp_path / "w"), scorer_recipe(tmp_path / "s")))


def test_a_complete_run(setting: Setting) -> None:
    seen: list[Progress] = []
    result = setting.run(command="mmalign eval --model dots --suite dots_suite", report=seen.append)
    assert result.status == "complete" and is_complete(result) and continue_line(result) is None
    assert (result.counts.expected, result.counts.generated, result.counts.scored, result.counts.failed) == (12, 12, 12, {})
    metric = result.metrics["overall"]
    rows = setting.rows(result)
    assert metric.value == Evaluator(6).aggregate(rows)["overall"] and metric.bounds is None and (metric.n, metric.prompts) == (12, 6)
    assert [one.stage for one in seen if one.done == one.total and one.total] == ["generate", "score"]
    scorer = result.deviations
    assert [one.field for one in scorer] == ["brightness.faults"]  # the one option that the test itself sets
    assert json.loads(artefacts.json_path(setting.directory, result.run).read_text())["metrics"]["overall"]["value"] == metric.value


def test_the_artefacts_read_back_as_they_were_written(setting: Setting) -> None:
    setting.fail(model={"p001": "raise"}, scorer={"p002": "nan"})
    result = setting.run(size=(4, 6), command="mmalign eval")
    path = artefacts.json_path(setting.directory, result.run)
    again = read(path)
    assert again.metrics == result.metrics and again.counts == result.counts and again.deviations == result.deviations
    assert artefacts.find(setting.results) == [path]
    rows = setting.rows(result)
    assert rows_digest(rows) == result.rows_digest and len(rows) == 12
    whole = rows[0]
    assert isinstance(whole.sample, Sample) and whole.request.size == (4, 6) and whole.request.prompt.meta == {"n": 0}
    assert image_path(setting.directory, whole.sample.image_sha or "").is_file()
    assert whole.value("brightness").detail.startswith("saw")
    failures = {row.request.prompt.id: row.failure for row in rows if row.failure is not None}
    assert {name: (failure.stage, failure.kind) for name, failure in failures.items()} == {
        "p001": ("generate", "error"),
        "p002": ("score", "nonfinite"),
    }


def test_results_that_are_none_are_refused_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(MmalignError, match="There is no result at"):
        read(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"schema": 1,')
    with pytest.raises(MmalignError, match="holds no valid JSON"):
        read(tmp_path / "half.json")
    (tmp_path / "other.json").write_text('{"schema": 2}')
    with pytest.raises(MmalignError, match="not a result of format 1"):
        read(tmp_path / "other.json")


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_the_digest_depends_on_no_batch_size(setting: Setting, tmp_path: Path, batch: int) -> None:
    other = replace(setting, folder=tmp_path / f"other {batch}")
    assert setting.run(batch=5).rows_digest == evaluate(setting.job, Inline(), other.folder, batch=batch).rows_digest


def test_the_digest_depends_on_no_number_of_workers(setting: Setting, tmp_path: Path) -> None:
    setting.fail(scorer={"p003": "raise"})
    inline = setting.run().rows_digest
    for workers in (1, 2):
        assert evaluate(setting.job, Processes(workers), tmp_path / f"{workers} workers", batch=2).rows_digest == inline


def test_the_same_call_does_nothing_twice(setting: Setting) -> None:
    first = setting.run()
    again = setting.run(executor=Inline())
    assert again.rows_digest == first.rows_digest and again.run == first.run and again.provenance["cached"] == 12
    assert len(setting.generated()) == len(set(setting.generated())) == 12 == len(setting.scored())
    assert again.counts.retried == 0


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 7},
        {"size": (4, 4)},
        {"model": "weights"},
        {"model": "sampling"},
        {"evaluator": Evaluator(ids=tuple(f"q{n}" for n in range(6)))},
        {"split": "val"},
    ],
    ids=str,
)
def test_what_changes_a_sample_makes_it_anew(setting: Setting, change: dict[str, Any]) -> None:
    first = setting.run()
    if change.get("model") == "weights":
        make_weights(setting.folder / "w", "trained weights")
        change = {}
    elif change.get("model") == "sampling":
        change = {"model": replace(setting.job.model, overrides={"brightness": "0.5"})}
    second = setting.run(**change)
    assert second.run != first.run
    assert len(setting.generated()) == 24 and len(setting.scored()) == 24


@pytest.mark.parametrize("option", [{"version": 2}, {"judge": "other eye"}])
def test_another_scorer_scores_anew_and_never_regenerates(setting: Setting, option: dict[str, Any]) -> None:
    first = setting.run()
    second = setting.run(scorers={"brightness": scorer_recipe(setting.folder / "s", **option)})
    assert second.run != first.run and second.rows_digest == first.rows_digest
    assert len(setting.generated()) == 12 and len(setting.scored()) == 24


def test_a_changed_prompt_meta_scores_anew_and_never_regenerates(setting: Setting) -> None:
    setting.run()
    with_facts = replace_prompts(lambda prompt: replace(prompt, meta={"n": -1}))
    setting.run(evaluator=with_facts)
    assert len(setting.generated()) == 12 and len(setting.scored()) == 24


def replace_prompts(change: Any) -> Evaluator:
    @dataclass(frozen=True)
    class Changed(Evaluator):
        def prompts(self, split: str = "test") -> list[Prompt]:
            return [change(prompt) for prompt in super().prompts(split)]

    return Changed()


def test_failures_are_counted_bounded_and_never_numbers(setting: Setting) -> None:
    setting.fail(model={"p000": "refuse"}, scorer={"p001": "raise", "p003": "nan"})
    result = setting.run(command="mmalign eval --model dots --suite dots_suite")
    assert result.status == "incomplete" and not is_complete(result)
    assert result.counts.failed == {"generate/refusal": 2, "score/error": 2, "score/nonfinite": 2}
    assert (result.counts.expected, result.counts.generated, result.counts.scored) == (12, 10, 6)
    metric = result.metrics["overall"]
    assert metric.n == 6 and metric.bounds is not None and metric.value is not None
    low, high = metric.bounds
    assert low <= metric.value <= high
    assert high - low == pytest.approx(0.5 * (2 / 6) + 0.5 * (4 / 6))  # one even prompt of three, two odd prompts of three
    assert "6 failed, bounds " in paste_line(result) and paste_line(result).endswith(" INCOMPLETE")
    assert continue_line(result) == "mmalign eval --model dots --suite dots_suite --retry-failed"


def test_only_failures_are_retried_and_only_when_asked(setting: Setting) -> None:
    clean = setting.run(executor=Inline())
    other = replace(setting, folder=setting.folder / "second")
    other.job = make_job(make_weights(other.folder / "w"), scorer_recipe(other.folder / "s"))
    other.fail(model={"p000": "raise"}, scorer={"p001": "raise"})
    other.run()
    other.fail()
    before = (len(other.generated()), len(other.scored()))
    assert other.run().counts.failed == {"generate/error": 2, "score/error": 2}
    assert (len(other.generated()), len(other.scored())) == before
    result = other.run(retry_failed=True)
    assert result.status == "complete" and result.rows_digest == clean.rows_digest and result.counts.retried == 4
    assert other.generated()[before[0] :] == ["p000/0", "p000/1"]
    assert sorted(other.scored()[before[1] :]) == ["p000/0", "p000/1", "p001/0", "p001/1"]


def test_a_run_where_everything_failed_still_ends_with_a_result(setting: Setting) -> None:
    setting.fail(model={f"p{n:03d}": "raise" for n in range(6)})
    result = setting.run()
    assert result.counts.failed == {"generate/error": 12} and result.metrics["overall"].value is None
    assert paste_line(result).startswith("Dots undefined (6x2, 12 failed, protocol: official")


def test_a_damaged_image_is_made_again_and_its_score_kept(setting: Setting) -> None:
    first = setting.run()
    sample = setting.rows(first)[3].sample
    assert isinstance(sample, Sample)
    image_path(setting.directory, sample.image_sha or "").write_bytes(b"half a file")
    again = setting.run()
    assert again.rows_digest == first.rows_digest
    assert setting.generated()[12:] == [sample.request.id] and len(setting.scored()) == 12 and again.counts.retried == 1


def test_duplicate_prompt_ids_and_empty_suites_are_errors(setting: Setting) -> None:
    with pytest.raises(MmalignError, match="lists the prompt id 'a' more than once"):
        setting.run(evaluator=Evaluator(ids=("a", "b", "a")))
    with pytest.raises(MmalignError, match="has no prompts in the split 'test'"):
        setting.run(evaluator=Evaluator(count=0))


def test_deviations_are_recorded_and_gate_the_line(setting: Setting) -> None:
    changed = {
        "limit": 4,
        "images_per_prompt": 1,
        "size": (4, 4),
        "seed": 1,
        "model": replace(setting.job.model, overrides={"steps": "9"}),
        "scorers": {"brightness": scorer_recipe(judge="other")},
        "evaluator": Evaluator(weight=2.0),
    }
    result = setting.run(**changed)
    assert {one.field: (one.official, one.used) for one in result.deviations} == {
        "limit": ("6 prompts", "4"),
        "images_per_prompt": ("2", "1"),
        "size": ("8x8", "4x4"),
        "seed": ("42", "1"),
        "sampling.steps": ("4", "9"),
        "brightness.judge": ("eye", "other"),
        "dots_suite.weight": ("1.0", "2.0"),
    }
    assert result.status == "partial" and result.counts.expected == 4
    assert "protocol: official except limit=4 (card: 6 prompts)" in paste_line(result) and paste_line(result).endswith(" PARTIAL")


def test_what_equals_the_card_is_no_deviation(setting: Setting) -> None:
    result = setting.run(scorers={"brightness": scorer_recipe()}, images_per_prompt=2, seed=42, size=(8, 8), limit=6, split="test")
    assert result.deviations == () and result.status == "complete"
    assert paste_line(result).endswith("(6x2, 0 failed, protocol: official)")


def test_a_suite_that_differs_from_its_card_says_so(setting: Setting) -> None:
    result = setting.run(card=card(prompts=553), scorers={"brightness": scorer_recipe()})
    assert [(one.field, one.official, one.used) for one in result.deviations] == [("prompts", "553", "6")]


def test_a_limit_takes_the_tags_in_turn_and_a_larger_one_extends_it(setting: Setting) -> None:
    ids = [[row.request.prompt.id for row in setting.rows(setting.run(limit=limit, images_per_prompt=1))] for limit in (2, 3)]
    assert ids == [["p000", "p001"], ["p000", "p001", "p002"]]
    assert len(setting.generated()) == 3


def test_a_plan_writes_nothing_and_says_what_is_there(setting: Setting) -> None:
    empty = plan(setting.job, Inline(), setting.results)
    assert (empty.expected, empty.cached_samples, empty.cached_scores, empty.failures) == (12, 0, 0, 0)
    assert not setting.results.exists()
    setting.fail(scorer={"p001": "raise"})
    result = setting.run()
    before = sorted(setting.results.rglob("*"))
    full = plan(setting.job, Inline(), setting.results)
    assert (full.run, full.cached_samples, full.cached_scores, full.failures) == (result.run, 12, 12, 2)
    assert sorted(setting.results.rglob("*")) == before


def test_missing_weights_of_a_scorer_surface_before_generation(setting: Setting) -> None:
    with pytest.raises(MmalignError, match="weights of the judge 'absent' are missing"):
        setting.run(scorers={"brightness": scorer_recipe(judge="absent")})
    assert setting.generated() == []


def test_a_run_directory_in_use_is_refused(setting: Setting) -> None:
    holder = r"is in use by process \d+ on .* \(mmalign eval --suite dots_suite\)"
    with Store.write(setting.directory, command="mmalign eval --suite dots_suite"), pytest.raises(UsageError, match=holder):
        setting.run()
    assert setting.run().status == "complete"


def test_names_cannot_leave_the_results_folder(setting: Setting) -> None:
    ids = ("../../x", "/etc/passwd", "<script>alert(1)</script>", "a\0b", "é" * 200)
    result = setting.run(model_name="../../../escape", suite="../up", evaluator=Evaluator(ids=ids))
    assert result.status == "complete"
    assert {path.parent.parent.parent for path in artefacts.find(setting.folder)} == {setting.results}
    outside = {path.name for path in setting.folder.iterdir()} - {"results", "w", "s"}
    assert outside == set()


def test_no_secret_reaches_an_artefact(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = "canary-3f9c1e77d0"
    monkeypatch.setenv("CANARY_KEY", canary)
    setting.fail(model={"p000": "raise"}, scorer={"p001": "raise"})  # both exceptions quote the secret
    typed = f"mmalign eval --set wise.api_key={canary} --set judge.token=sk-typed-by-hand --set wise.api_key=OPENAI_API_KEY"
    result = setting.run(command=typed)
    assert any(isinstance(row.failure, Failure) and "key ***" in row.failure.message for row in setting.rows(result))
    content = b"".join(path.read_bytes() for path in setting.results.rglob("*") if path.is_file())
    assert canary.encode() not in content and b"sk-typed-by-hand" not in content
    assert result.provenance["command"] == (
        "mmalign eval --set wise.api_key=*** --set judge.token=*** --set wise.api_key=OPENAI_API_KEY"
    )


def test_words_that_only_look_secret_stay() -> None:
    command = "mmalign eval --set sampling.max_tokens=8 --model /data/key/model"
    assert without_secrets(command) == command


def test_a_metric_that_was_a_training_reward_says_so(setting: Setting) -> None:
    result = setting.run(model_facts={"source": "trained", "trained_on_rewards": ["brightness", "other"]})
    assert reward_overlap(result) == ("brightness",)
    assert "trained on the reward brightness" in paste_line(result)
    assert any("was trained on 'brightness'" in warning for warning in result.provenance["warnings"])


def test_values_that_are_all_alike_are_a_warning(setting: Setting) -> None:
    dark = replace(setting.job.model, overrides={"brightness": "0"})
    warnings = setting.run(model=dark).provenance["warnings"]
    assert warnings == ["All 12 values of the scorer 'brightness' are 0; look at its rows before you quote a number."]


def test_an_aggregate_that_is_not_finite_is_undefined(setting: Setting) -> None:
    @dataclass(frozen=True)
    class Broken(Evaluator):
        def aggregate(self, rows: Any) -> dict[str, float | None]:
            return {"overall": math.nan, "brightness": 0.5}

    result = setting.run(evaluator=Broken())
    assert result.metrics["overall"].value is None and result.status == "incomplete" and not is_complete(result)


def test_the_paste_line() -> None:
    from mmalign.types import Counts, Metric

    metric = Metric(0.8421, 0.0094, (0.82, 0.86), 2212, 553)
    suite = {"title": "GenEval", "prompts": 553, "images_per_prompt": 4}
    made = Result("r", {}, suite, {}, {}, Counts(2212, 2212, 2212), {"overall": metric}, "overall", "complete")
    assert paste_line(made) == "GenEval 0.842 +/- 0.009 (553x4, 0 failed, protocol: official)"
