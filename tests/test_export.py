"""Exports: the Hub's own parsers read them back, values and notes are those of the results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from helpers.runs import make_prompts, make_run
from test_tables import VALUES, fingerprinted, geneval_run

from mmalign import cli
from mmalign.types import Deviation


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One model on two suites, trained on the scorer of one."""
    geneval_run(tmp_path, "mine", VALUES, rewards=["geneval"])
    fingerprinted(make_run(tmp_path, make_prompts(12), model="mine", suite="shapes"), "mine")
    return tmp_path


def exported(capsys, folder: Path, *arguments: str) -> str:
    assert cli.main(["report", "--export", *arguments, "--results", str(folder)]) == 0
    return capsys.readouterr().out


def test_model_index_is_read_by_the_hubs_library(capsys, folder: Path) -> None:
    from huggingface_hub.repocard_data import model_index_to_eval_results

    content = yaml.safe_load(exported(capsys, folder, "model-index"))
    name, found = model_index_to_eval_results(content["model-index"])
    assert name == "mine"
    values = {(one.dataset_type, one.metric_type): one.metric_value for one in found}
    assert values["geneval", "overall"] == 0.842 and ("shapes", "overall") in values
    args = next(one.dataset_args for one in found if one.dataset_type == "geneval")
    assert "trained on the reward geneval" in args["notes"] and "protocol official" in args["notes"]


def test_eval_results_are_read_by_the_hubs_library(capsys, folder: Path) -> None:
    from huggingface_hub import parse_eval_result_entries

    text = exported(capsys, folder, "eval-results", "--dataset", "geneval=org/geneval:overall", "--dataset", "shapes=org/shapes")
    entries = {entry.dataset_id: entry for entry in parse_eval_result_entries(yaml.safe_load(text))}
    assert entries["org/geneval"].value == 0.842 and entries["org/geneval"].task_id == "overall"
    assert entries["org/shapes"].task_id == "default" and entries["org/shapes"].date == "2026-02-03"
    assert "95% interval 0.832 to 0.852" in str(entries["org/geneval"].notes)


def test_eval_results_never_invent_a_dataset(capsys, folder: Path) -> None:
    assert cli.main(["report", "--export", "eval-results", "--results", str(folder)]) == 2
    assert "Say --dataset geneval=ORG/NAME" in capsys.readouterr().err


def test_lm_eval_has_its_keys_and_our_values(capsys, folder: Path) -> None:
    content = json.loads(exported(capsys, folder, "lm-eval"))
    assert content["results"]["geneval"]["overall,none"] == 0.842
    stderr = content["results"]["shapes"]["overall_stderr,none"]
    assert isinstance(stderr, float) and stderr > 0
    assert content["higher_is_better"]["geneval"]["overall"] is True
    assert content["n-samples"]["shapes"] == {"original": 12, "effective": 12}
    assert set(content["versions"]) == set(content["configs"]) == {"geneval", "shapes"}


def test_what_deviates_leaves_the_house_only_on_demand_and_says_so(capsys, tmp_path: Path) -> None:
    geneval_run(tmp_path, "mine", VALUES, deviations=[Deviation("limit", "553 prompts", "12", "")])
    assert cli.main(["report", "--export", "lm-eval", "--results", str(tmp_path)]) == 2
    assert "No complete, undeviating result fits; --all takes others. Models: mine." in capsys.readouterr().err
    content = json.loads(exported(capsys, tmp_path, "lm-eval", "--all"))
    assert "not by the protocol: limit=12 (card: 553 prompts)" in content["configs"]["geneval"]["metadata"]["notes"]


def test_of_two_models_one_must_be_named(capsys, folder: Path) -> None:
    geneval_run(folder, "other", VALUES)
    assert cli.main(["report", "--export", "lm-eval", "--results", str(folder)]) == 2
    assert "name one with --model. Models: mine, other." in capsys.readouterr().err
    assert json.loads(exported(capsys, folder, "lm-eval", "--model", "other"))["model_name"] == "other"
