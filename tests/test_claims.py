"""Claims and verdicts: the interval algebra, the verdicts on the published figures, and what is kept of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mmalign.leaderboards import published, verdict_report, verdicts
from mmalign.leaderboards.verdicts import Claim, Comparison

from mmalign import cli
from mmalign.types import MmalignError, UsageError

ROOT = Path(__file__).parent.parent
CLAIMS = verdicts.load()
VERDICTS = {name: verdicts.judge(claim) for name, claim in CLAIMS.items() if claim.tests}


def judged(**test: object) -> verdicts.Verdict:
    return verdicts.judge(Claim(0, "made-up", "across", "", (test,)))


# -- what the figures say -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("lambda-order", "agrees"),
        ("shap-above-sparse", "not resolved"),  # 0.50 and 0.49 may be one number, rounded apart
        ("grad-cam-most-efficient", "opposite"),
        ("genevalpp-gain", "not resolved"),  # 0.404 disagrees with its columns
        ("steady-on-three-benchmarks", "opposite"),
        ("best-preference-almost-everywhere", "agrees"),
        ("both-text-filters-help", "not resolved"),
        ("totals-follow-from-columns", "opposite"),
        ("baselines-agree-between-papers", "opposite"),
        ("above-reca-above-sft", "agrees"),
    ],
)
def test_known_verdicts(name: str, answer: str) -> None:
    assert VERDICTS[name].answer == answer


def test_every_paper_has_claims_and_every_verdict_its_reason() -> None:
    assert all(claim.tests or claim.experiment for claim in CLAIMS.values())
    assert {claim.paper for claim in CLAIMS.values()} == {*published.papers(), "across"}
    for name, verdict in VERDICTS.items():
        assert verdict.comparisons and verdict.decided_by in verdict.comparisons, name
        if verdict.answer == "opposite":
            assert verdict.decided_by.high < 0, name
        if verdict.answer == "agrees":
            assert verdict.decided_by.low > 0, name


def test_claims_that_cannot_hold_together_do_not() -> None:
    rows = ["T2I-R1-Dense-HPS-SHAP", "Janus-Pro-7B"]
    test = {"table": "dense-reward/2", "columns": ["overall"]}
    assert judged(order=rows, **test).answer == "agrees"
    assert judged(order=rows[::-1], **test).answer == "opposite"


# -- the algebra --------------------------------------------------------------------------------------------------------------------------


def test_an_interval_is_what_rounding_allows() -> None:
    (one,) = judged(order=["Harmon-0.5B / SFT", "Harmon-0.5B / w/o SFT"], table="segros/1", columns=["dpg"]).comparisons
    assert (one.low, one.high) == pytest.approx((82.5 - 80.12 - 0.055, 82.5 - 80.12 + 0.055))


def test_a_disagreeing_number_counts_with_both_values() -> None:
    (one,) = judged(order=["GvU", "X-Omni"], table="gvu/3", columns=["overall"]).comparisons
    assert one.low == pytest.approx(0.404 - 0.282 - 0.001) and one.high == pytest.approx(3.025 / 7 - 0.282 + 0.001)


def test_lower_is_better_where_the_column_says_so() -> None:
    order = ["T2I-R1-Dense-RAHF", "T2I-R1-Dense-HPS-SHAP"]
    assert judged(order=order, table="dense-reward/9", columns=["hours"]).answer == "agrees"


@pytest.mark.parametrize(("claimed", "answer"), [(0.13, "agrees"), (0.11, "opposite"), (0.15, "opposite")])
def test_an_amount_must_be_possible(claimed: float, answer: str) -> None:
    test = {"from": "X-Omni", "to": "GvU", "table": "gvu/1", "columns": ["overall"]}
    assert judged(amount={"overall": claimed}, **test).answer == answer


@pytest.mark.parametrize(("margin", "answer"), [(0.17, "agrees"), (0.15, "not resolved"), (0.13, "opposite")])
def test_a_spread_is_compared_with_its_margin(margin: float, answer: str) -> None:
    """FLUX.1-dev prints 0.67 and 0.82: the two may lie 0.14 to 0.16 apart."""
    assert judged(agree=margin, rows=[["gvu/1", "FLUX.1-dev", "overall"], ["htgrpo/1", "FLUX.1-dev", "overall"]]).answer == answer


def test_at_least_n_of_many() -> None:
    holds, fails, open_ = Comparison("a", 1, 2), Comparison("b", -2, -1), Comparison("c", -1, 1)
    assert [one.answer for one in (holds, fails, open_)] == ["agrees", "opposite", "not resolved"]
    assert verdicts._combined([holds, holds, fails], 2)[0] == "agrees"
    assert verdicts._combined([holds, open_, fails], 2)[0] == "not resolved"
    assert verdicts._combined([holds, fails, fails], 2)[0] == "opposite"
    assert verdicts._combined([holds, open_], 2)[0] == "not resolved"


def test_a_claim_on_a_row_that_does_not_exist_names_it() -> None:
    with pytest.raises(MmalignError, match="'made-up' cannot be tested: Table gvu/1 has no number in the row 'Nobody'"):
        judged(order=["Nobody", "GvU"], table="gvu/1", columns=["overall"])
    with pytest.raises(MmalignError, match="a test needs one of order, best"):
        judged(table="gvu/1")


# -- names, files, report -----------------------------------------------------------------------------------------------------------------


def test_claims_are_chosen_by_name_number_and_paper() -> None:
    assert [claim.name for claim in verdicts.choose(["5"])] == ["lambda-order"]
    assert {claim.paper for claim in verdicts.choose(["segros"])} == {"segros"}
    assert len(verdicts.choose([])) == len(CLAIMS)
    with pytest.raises(UsageError, match="Unknown claim 'lambda-oder'. Did you mean 'lambda-order'"):
        verdicts.choose(["lambda-oder"])


def test_the_verb_runs_keeps_and_reports(tmp_path: Path, capsys) -> None:
    folder = str(tmp_path / "claims")
    assert cli.main(["claims", "report", "--out", folder]) == 1
    assert "Make them with `mmalign claims run`" in capsys.readouterr().err
    assert cli.main(["claims", "run", "grad-cam-most-efficient", "5", "--out", folder]) == 0
    assert cli.main(["claims", "run", "1", "--out", folder]) == 0
    capsys.readouterr()
    assert cli.main(["claims", "report", "--out", folder]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["grad-cam-most-efficient", "shap-above-sparse", "lambda-order"], "unfavourable first"
    assert lines[-1] == "3 claims: 1 agree, 1 are not resolved, 1 are opposite."
    assert cli.main(["claims", "list", "htgrpo", "--json"]) == 0
    assert {claim["paper"] for claim in json.loads(capsys.readouterr().out)} == {"htgrpo"}


def test_a_broken_verdict_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"schema": 1}')
    with pytest.raises(MmalignError, match="x.json is not a verdict of format 1"):
        verdict_report.read(tmp_path)


def test_the_kept_verdicts_are_up_to_date(tmp_path: Path) -> None:
    """`mmalign claims run` writes what is committed."""
    committed = ROOT / "results" / "claims"
    for path in verdict_report.write(tmp_path, VERDICTS.values()):
        assert path.read_text() == (committed / path.name).read_text(), f"{path.name} is old: run `mmalign claims run`"


def test_the_report_names_every_claim_once() -> None:
    kept = [verdict_report.content(verdict) for verdict in VERDICTS.values()]
    text = verdict_report.markdown(kept)
    assert all(text.count(f"**{name}**") == 1 for name in VERDICTS)
    assert text.index("## Opposite") < text.index("## Not resolved") < text.index("## Agrees")
