"""Scoring a folder: prompts from files, the table, Parquet, holes; serve and doctor --scorers from the command line; row equals reward."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import tiny_questions as tiny

from mmalign import cli, registry, scoring
from mmalign.executors import Inline
from mmalign.images import encode_png
from mmalign.reward import load_reward, load_scorer
from mmalign.scorers import remote as client
from mmalign.types import Failure, UsageError, Value
from mmalign.worker import Recipe

FAKES = Path(__file__).parent / "fakes"
BRIGHTNESS = FAKES / "brightness.py"


@pytest.fixture
def folder(tmp_path) -> Path:
    images = tmp_path / "images"
    for number in (1, 2, 10):
        (images / f"{number}.png").parent.mkdir(exist_ok=True)
        (images / f"{number}.png").write_bytes(encode_png(tiny.picture(number)))
    return images


def recipes(*names: str) -> dict[str, Recipe]:
    return {name: Recipe(registry.find("scorers", name, [BRIGHTNESS])) for name in names}


def test_images_are_taken_in_natural_order_with_their_prompts(folder, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n\nten\n")
    pictures = list(scoring.read_folder(folder, file))
    assert [(picture.path.name, picture.sample.request.prompt.text) for picture in pictures] == [
        ("1.png", "one"),
        ("2.png", "two"),
        ("10.png", "ten"),
    ]
    file.write_text("all three\n")
    assert {picture.sample.request.prompt.text for picture in scoring.read_folder(folder, file)} == {"all three"}


def test_prompts_by_name_carry_metadata(folder, tmp_path):
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("\n".join(json.dumps({"image": f"{number}.png", "prompt": f"p{number}", "nouns": ["car"]}) for number in (10, 2, 1)))
    prompts = [picture.sample.request.prompt for picture in scoring.read_folder(folder, lines)]
    assert [prompt.text for prompt in prompts] == ["p1", "p2", "p10"] and prompts[0].meta == {"nouns": ["car"]}
    table = tmp_path / "prompts.json"
    table.write_text(json.dumps({"1.png": "a", "2.png": "b", "10.png": "c"}))
    assert [picture.sample.request.prompt.text for picture in scoring.read_folder(folder, table)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", "a\nb\n", "2 lines for 3 images"),
        ("p.txt", "", "0 lines for 3 images"),
        ("p.json", '{"1.png": "a"}', "no prompt for 2 of 3 images, first 2.png"),
        ("p.json", "[1]", "not of its form"),
        ("p.jsonl", '{"image": "1.png"}', "not of its form"),
        ("p.csv", "a,b", "expected a .txt, .json or .jsonl"),
    ],
)
def test_a_file_that_does_not_fit_is_a_sentence(folder, tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=re.escape(words)):
        list(scoring.read_folder(folder, tmp_path / name))


def test_absent_things_are_sentences(tmp_path, folder):
    with pytest.raises(UsageError, match="no such folder"):
        list(scoring.read_folder(tmp_path / "none", None))
    with pytest.raises(UsageError, match="no image in it"):
        list(scoring.read_folder(FAKES, None))
    with pytest.raises(UsageError, match="no such file"):
        list(scoring.read_folder(folder, tmp_path / "none.txt"))


def test_a_row_holds_the_value_that_is_the_reward_bit_for_bit(folder):
    scores = scoring.score_folder(folder, None, recipes("brightness", "jpeg_size"), Inline())
    samples = [tiny.sample("any", number, image=tiny.picture(number)) for number in (1, 2, 10)]
    for name in ("brightness", "jpeg_size"):
        reward = load_reward({name: 1.0}, plugs=[BRIGHTNESS])(samples)
        assert [row.scores[name].x for row in scores.rows] == reward.parts[name].tolist() == reward.total.tolist()


def test_a_damaged_image_is_a_hole_in_the_table_and_the_file(folder, tmp_path):
    (folder / "3.png").write_bytes(b"none")
    scores = scoring.score_folder(folder, None, recipes("brightness"), Inline())
    (line,) = scores.summary()
    assert line["images"] == 3 and line["failed"] == {"error": 1} and scores.failures == 1
    values = [row.scores["brightness"].x for row in scores.rows if isinstance(row.scores["brightness"], Value)]
    assert line["mean"] == sum(values) / 3 and (line["least"], line["greatest"]) == (min(values), max(values))
    scoring.write_parquet(scores, tmp_path / "deep" / "scores.parquet")
    table = pd.read_parquet(tmp_path / "deep" / "scores.parquet")
    assert table["value"].isna().tolist() == [False, False, True, False]
    assert table["value"].dropna().tolist() == values and table["failure_kind"].tolist()[2] == "error"
    assert json.loads(table["parts"][0]) == {"bright": float(values[0] > 0.5)}
    assert Path(table["image"][2]).name == "3.png" and table["fingerprint"].nunique() == 1


def test_attribution_draws_a_map_for_each_image(tmp_path, capsys):
    from mmalign.images import decode_image
    from mmalign.testbed import world
    from mmalign.testbed.render import render

    images, prompts = tmp_path / "boards", tmp_path / "prompts.txt"
    images.mkdir()
    drawn = [item for _, item in zip(range(2), world.sample_prompts("test", ("color_attr",), 3), strict=False)]
    for number, picture in enumerate(render([scene for _, _, scene in drawn])):
        (images / f"{number}.png").write_bytes(encode_png(picture))
    prompts.write_text("".join(world.text_of(clauses) + "\n" for _, clauses, _ in drawn))
    words = ["score", "--images", str(images), "--prompts", str(prompts), "--scorers", "clipscore", "--executor", "inline"]
    assert cli.main([*words, "--device", "cpu", "--set", "clipscore.model=tiny-clip", "--attribution", "gradcam"]) == 0
    assert "2 maps" in capsys.readouterr().out
    drawn_maps = sorted((images / "scores.report" / "maps").iterdir())
    assert [path.name for path in drawn_maps] == ["0.png.clipscore.gradcam.png", "1.png.clipscore.gradcam.png"]
    assert decode_image(drawn_maps[0]).shape == decode_image(images / "0.png").shape
    again = scoring.read_folder(images, prompts)
    assert [picture.path.name for picture in again] == ["0.png", "1.png"], "maps and thumbnails of a run are no images of the next"


def test_the_verb_prints_a_table_and_writes_the_file(folder, capsys):
    arguments = [
        "score",
        "--images",
        str(folder),
        "--scorers",
        "brightness,jpeg-size",
        "--plug",
        str(BRIGHTNESS),
        "--executor",
        "inline",
        "--device",
        "cpu",
    ]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["scorer", "mean", "least", "greatest", "images", "failed"]
    assert [line.split()[0] for line in shown[1:3]] == ["brightness", "jpeg_size"] and shown[3].startswith("3 images, every value in")
    assert shown[4] == f"report: {folder / 'scores.report' / 'index.html'}"
    assert len(pd.read_parquet(folder / "scores.parquet")) == 6
    (folder / "3.png").write_bytes(b"none")
    assert cli.main([*arguments, "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["scorers"][0]["failed"] == {"error": 1}


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--scorers", "brightnes"], "Did you mean 'brightness'"),
        (["--scorers", ","], "names none"),
        (["--scorers", "brightness", "--set", "hps.x=1"], "nothing here is called"),
    ],
)
def test_usage_faults_exit_2(folder, capsys, extra, words):
    assert cli.main(["score", "--images", str(folder), "--plug", str(BRIGHTNESS), *extra]) == 2
    assert words in capsys.readouterr().err


def test_doctor_tries_scorers_on_a_picture(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = scoring.self_test(
        recipes("brightness", "jpeg_size") | {"git": Recipe(registry.find("scorers", "git"), {"model": str(tmp_path / "none")})}, Inline()
    )
    assert re.fullmatch(r"ready: 0\.\d+ in \d+\.\d s", found["brightness"])
    assert found["git"].startswith("not ready: The GitForCausalLM") and "--set git.model=PATH" in found["git"]


def test_every_scorer_is_found_described_and_states_its_needs():
    for entry in registry.entries("scorers").values():
        assert entry.description and len(entry.description) < 160, entry.name
        if entry.name in {"blip_vqa", "git", "vqascore", "orm", "hpsv3", "groundingdino", "rahf"}:
            assert any(need.startswith("weights: ") for need in entry.needs), entry.name
        if entry.name in {"remote", "unifiedreward", "deqa", "unipercept"}:
            assert entry.needs == ("endpoint",)


def test_serve_serves_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "mmalign", "serve", "--scorers", "jpeg_size", "--port", "0", "--device", "cpu"]
    root = Path(scoring.__file__).parent.parent
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=root)
    try:
        line = process.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert url, line + process.stdout.read()
        far, near = client.load(client.Config(url=url.group())), load_scorer("jpeg_size")
        assert far.score(tiny.seven()) == near.score(tiny.seven())
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_the_self_test_picture_is_judged_by_scorers_of_facts():
    sample = scoring.self_test_sample()
    assert sample.image.shape == (256, 256, 3) and np.unique(sample.image.reshape(-1, 3), axis=0).shape[0] == 3
    assert not isinstance(load_scorer("jpeg_size").score([sample])[0], Failure)
