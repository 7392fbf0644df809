"""Learning from pairs: what each method shows and asks, exact resume, two processes, damaged pictures, and the page with the maps."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from helpers.tiny_masked import make_showo
from mmalign.trainers import _supervised, segros

from mmalign import cli, history, loop, training_report
from mmalign.history import read_metrics
from mmalign.images import decode_image
from mmalign.models import showo
from mmalign.pairs import open_pairs
from mmalign.testbed.pairs import write_pairs, write_questions
from mmalign.types import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 3
TOKENS = 16  # of the tiny model's pictures


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_showo(tmp_path_factory.mktemp("models") / "a-showo", seed=1)


@pytest.fixture(scope="module")
def model(checkpoint):
    return showo.load(checkpoint)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_pairs(folder, 10)
    write_questions(folder / "questions", 6)
    return folder


def words(checkpoint, data, run, *more, steps=STEPS, trainer="segros"):
    return [
        *("train", trainer, "--model", f"showo:{checkpoint}", "--run-dir", str(run), *(("--data", str(data)) if data else ())),
        *("--steps", str(steps), "--pairs-per-step", "4", "--micro-batch", "2", "--learning-rate", "1e-3", "--warmup", "0"),
        *("--save-every", "1", "--image-every", "0", "--device", "cpu", *more),
    ]


def launch(arguments, processes=1):
    many = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m") if processes > 1 else ()
    return subprocess.Popen(
        [sys.executable, "-m", *many, "mmalign", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def weights(run):
    from safetensors.torch import load_file

    return load_file(run / "model" / "pytorch_model.safetensors")


def difference(first, second, but="nothing"):
    one, other = weights(first), weights(second)
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one if but not in name)


def figures(run):
    return [{name: value for name, value in line.items() if not name.startswith("seconds/")} for line in read_metrics(run)]


def config(**options):
    chosen = {"steps": 1, "pairs_per_step": 4, "micro_batch": 4, "learning_rate": 1e-3, "warmup": 0, "image_every": 0, "unconditional": 0.0}
    return segros.Config(**{**chosen, **options})


def steps_of(model, data, run, monkeypatch=None, **options):
    """Trains a copy of the model in memory; returns its parameters, its figures and what it was asked."""
    chosen, asked = config(**options), []
    kept = {name: value.clone() for name, value in model.net.state_dict().items()}
    token_losses, text_log_prob = type(model).token_losses, type(model).text_log_prob

    def remember(self, prompts, pixels, seeds, blank=None, given=None):
        losses = token_losses(self, prompts, pixels, seeds, blank, given)
        asked.append((prompts.texts, given, losses, list(seeds)))
        return losses

    def answer(self, questions, pictures, answers):
        asked.append((tuple(questions), tuple(answers)))
        return text_log_prob(self, questions, pictures, answers)

    if monkeypatch:
        monkeypatch.setattr(type(model), "token_losses", remember)
        monkeypatch.setattr(type(model), "text_log_prob", answer)
    try:
        made = loop.Loop(chosen, model, run)
        segros.train(chosen, model, None, open_pairs(str(data), chosen.seed), made)
        return {name: value.clone() for name, value in model.net.state_dict().items()}, read_metrics(run), asked
    finally:
        model.net.load_state_dict(kept)
        model.net.requires_grad_(True)


@pytest.fixture(scope="module")
def undisturbed(checkpoint, data, tmp_path_factory):
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert cli.main(words(checkpoint, data, run)) == 0
    return run


# What each method shows and asks


def test_segros_gives_a_third_as_hints_and_hides_what_is_grounded(model, data, tmp_path, monkeypatch):
    _, (line,), asked = steps_of(model, data, tmp_path / "run", monkeypatch, noise=0.0)
    (texts, given, losses, seeds), (questions, answers) = asked
    assert given.hints.shape == (4, math.floor(0.3 * TOKENS), 48) and given.hinted is None
    assert given.hidden.sum(1).tolist() == model.hidden_number(seeds).tolist() and torch.equal(given.scored, given.hidden)
    pairs, _ = open_pairs(str(data), 0).draw(0, 4)
    assert texts == answers == tuple(pair.prompt.text for pair in pairs) and set(questions) == {"Describe the image."}
    pixels = model.fit([pair.image for pair in pairs])
    visual, tokens = model.image_features(pixels), model.text_features(texts)
    for row in range(4):
        found = segros.ground(tokens[row].features, visual[row])
        order = found.map.argsort(descending=True, stable=True)
        assert set(order[: int(given.hidden[row].sum())].tolist()) == set(given.hidden[row].nonzero().flatten().tolist())
        hints = sorted(order[:4].tolist())
        assert torch.equal(given.hints[row], visual[row][hints])
    drawing, spoken = line["loss/drawing"], line["loss/answers"]
    assert line["loss"] == pytest.approx(drawing + spoken) and drawing == pytest.approx(float(losses.mean.detach().mean()), rel=1e-5)
    assert 0 <= line["copy_rate"] <= 1 and line["hidden"] == pytest.approx(float(given.hidden.double().mean()))
    right = losses.right & given.hidden
    is_hint = torch.stack(
        [segros.roles_of(segros.ground(t.features, v).map, 0, noise=0.0).hint for t, v in zip(tokens, visual, strict=True)]
    )
    both = given.hidden & is_hint
    assert line["copy_rate"] == pytest.approx(float((right & both).sum() / both.sum()))


def test_reca_gives_everything_as_hint_and_no_caption(model, data, tmp_path, monkeypatch):
    _, _, asked = steps_of(model, data, tmp_path / "run", monkeypatch, method="reca", answer_weight=0.0)
    ((texts, given, losses, seeds),) = asked
    assert set(texts) == {"Draw this picture."} and given.hidden is None and given.scored is None
    pairs, _ = open_pairs(str(data), 0).draw(0, 4)
    assert torch.equal(given.hints, model.image_features(model.fit([pair.image for pair in pairs])))
    assert losses.scored.sum(1).tolist() == model.hidden_number(seeds).tolist()


def test_plain_fine_tuning_is_the_familys_own_loss(model, data, tmp_path, monkeypatch):
    _, (line,), asked = steps_of(model, data, tmp_path / "run", monkeypatch, method="sft", answer_weight=0.0)
    ((texts, given, _, seeds),) = asked
    pairs, _ = open_pairs(str(data), 0).draw(0, 4)
    assert given.hints is None and given.hidden is None and "copy_rate" not in line and "loss/answers" not in line
    pixels = model.fit([pair.image for pair in pairs])
    assert line["loss"] == pytest.approx(float(model.supervised_loss(model.encode_prompts(texts), pixels, seeds).detach().mean()), rel=1e-5)


def test_choices_can_be_made_one_by_one(model, data, tmp_path, monkeypatch):
    """Filtered hints in RecA (the paper's Table 9), drop-loss (Table 6), hints that go with the caption, lossy hints."""
    pruned = steps_of(model, data, tmp_path / "a", monkeypatch, method="reca", hints="top", hint_ratio=0.3, answer_weight=0.0)[2][0]
    assert pruned[1].hints.shape[1] == 4 and set(pruned[0]) == {"Draw this picture."}
    dropped = steps_of(model, data, tmp_path / "b", monkeypatch, scored_share=0.5, answer_weight=0.0)[2][0]
    hidden, scored = dropped[1].hidden.sum(1), dropped[1].scored.sum(1)
    assert scored.tolist() == [max(1, int(number) // 2) for number in hidden] and torch.equal(dropped[2].scored, dropped[1].scored)
    bare = steps_of(model, data, tmp_path / "c", monkeypatch, unconditional=1.0, drop_hint_with_prompt=True, answer_weight=0.0)[2][0]
    assert not bare[1].hinted.any()
    whole, lossy = (
        steps_of(model, data, tmp_path / f"d{side}", monkeypatch, method="reca", hint_side=side, answer_weight=0.0)[2][0] for side in (0, 4)
    )
    assert not torch.equal(whole[1].hints, lossy[1].hints)


def test_questions_of_their_own_keep_the_understanding(model, data, tmp_path, monkeypatch):
    _, _, asked = steps_of(model, data, tmp_path / "run", monkeypatch, questions=str(data / "questions"))
    rows = [json.loads(line) for line in (data / "questions" / "questions.jsonl").read_text().splitlines()]
    (questions, answers) = asked[1]
    assert {(row["question"], row["answer"]) for row in rows} >= set(zip(questions, answers, strict=True))


def test_micro_batches_change_nothing(model, data, tmp_path):
    whole, lines, _ = steps_of(model, data, tmp_path / "whole")
    parts, other, _ = steps_of(model, data, tmp_path / "parts", micro_batch=1)
    moved = torch.cat([(whole[name] - parts[name]).abs().flatten() for name in whole])
    assert float(moved.quantile(0.999)) < 2e-5, "Adam's first step is a sign, which rounding decides where a gradient is nearly zero"
    assert lines[0]["grad_norm"] == pytest.approx(other[0]["grad_norm"], rel=1e-5)
    assert lines[0]["loss"] == pytest.approx(other[0]["loss"], rel=1e-5) and lines[0]["copy_rate"] == other[0]["copy_rate"]


def test_gradients_into_hints_can_be_scaled():
    features = torch.arange(30.0).view(2, 5, 3).requires_grad_()
    hints = [torch.tensor([True, False, True, False, False])] * 2
    whole, part = (torch.autograd.grad(segros._picked(features, hints, scale).sum(), features)[0] for scale in (1.0, 0.1))
    assert whole.sum() == 2 * 2 * 3 and torch.allclose(part, 0.1 * whole)
    assert torch.allclose(segros._picked(features, hints, 0.1), features[:, [0, 2]])


def test_it_learns(model, data, tmp_path):
    _, lines, _ = steps_of(
        model, data, tmp_path / "run", steps=12, pairs_per_step=10, micro_batch=10, learning_rate=5e-3, schedule="constant"
    )
    assert lines[-1]["loss/answers"] < 0.7 * lines[0]["loss/answers"]
    assert sum(line["loss/drawing"] for line in lines[-3:]) < 0.9 * sum(line["loss/drawing"] for line in lines[:3])


# Runs


def test_a_run_leaves_a_trained_model_and_its_figures(undisturbed, checkpoint):
    from safetensors.torch import load_file

    before, after = load_file(checkpoint / "pytorch_model.safetensors"), weights(undisturbed)
    assert before.keys() == after.keys() and all(not torch.equal(before[name], after[name]) for name in before if "k_proj.bias" not in name)
    lines = read_metrics(undisturbed)
    assert [line["step"] for line in lines] == [1, 2, 3] and all(line["skipped"] == 0 for line in lines)
    facts = json.loads((undisturbed / "model" / "training.json").read_text())
    assert facts["trained_on_rewards"] == [] and facts["data"] and facts["config"]["method"] == "segros"
    assert json.loads((undisturbed / "run.json").read_text())["pairs"]["number"] == 10


def test_a_killed_run_continues_bit_for_bit(undisturbed, checkpoint, data, tmp_path):
    run = tmp_path / "killed"
    process = launch(words(checkpoint, data, run))
    deadline = time.monotonic() + 300
    while not (run / "state" / "step-000001" / "manifest.json").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "model").exists()
    assert cli.main(words(checkpoint, data, run)) == 0
    assert figures(run) == figures(undisturbed) and difference(run, undisturbed) == 0.0


@pytest.mark.slow
def test_two_processes_do_what_one_does(undisturbed, checkpoint, data, tmp_path):
    both = tmp_path / "both"
    process = launch(words(checkpoint, data, both), processes=2)
    output = process.communicate(timeout=600)[0].decode()
    assert process.returncode == 0, output[-3000:]
    # A shift of all keys changes no attention: the gradient of their norm's bias is rounding alone, of which Adam makes steps.
    assert difference(both, undisturbed, but="k_layernorm.bias") < 1e-5, output[-3000:]
    for line, other in zip(figures(both), figures(undisturbed), strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_a_damaged_picture_is_counted_and_named(checkpoint, data, tmp_path, capsys):
    import shutil

    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    picture = copy / "images" / "000003.png"
    picture.write_bytes(picture.read_bytes()[:60])
    run = tmp_path / "run"
    assert cli.main(words(checkpoint, copy, run)) == 0
    (name,) = json.loads((run / "skipped.json").read_text())
    assert name == "pairs.jsonl#4" and "000003.png" in capsys.readouterr().out
    assert sum(line["skipped"] for line in read_metrics(run)) >= 1


def test_the_page_shows_maps_words_hints_and_targets(checkpoint, data, tmp_path):
    run = tmp_path / "run"
    assert cli.main(words(checkpoint, data, run, "--image-every", "1", "--set", "sampling.steps=2", steps=1)) == 0
    (album,) = history.read_albums(run, "grounding")
    side = 16
    assert [decode_image(file).shape for file in album.files] == [(side, 4 * side, 3)] * 2
    assert all(caption.count("[") == caption.count("]") > 0 for caption in album.captions)
    panels = [decode_image(album.files[0])[:, part * side : (part + 1) * side] for part in range(4)]
    assert all((panel != panels[0]).any() for panel in panels[1:])
    page = (run / "index.html").read_text()
    assert "Where text and picture meet" in page and "grounding/step-000001/00.png" in page and "10 pairs of" in page
    assert "Right tokens" in page and "The training loss has been measured 1 times" in page


def test_captions_mark_the_chosen_words():
    assert _supervised.marked(("a", " red", " cir", "cle", " "), (False, True, True, True, True)) == "a [red] [cir][cle]"


def test_the_verdict_of_a_run_without_reward():
    falling = [{"step": n, "loss": 5 - 0.3 * n, "panel/strict": 0.1 * n} for n in range(9)]
    assert history.verdict(falling) == "The training loss falls; strict on held-out prompts rises."
    assert "No held-out panel" in history.verdict([{"step": n, "loss": 1.0} for n in range(9)])
    assert training_report.CHARTS[0][0] == "Loss"


@pytest.mark.parametrize(
    ("more", "place", "trainer", "expected"),
    [
        ((), None, "segros", "--data with a folder"),
        (("--prompts", "shapes"), True, "segros", "neither --prompts nor --reward"),
        (("--reward", "shapes=1"), True, "segros", "neither --prompts nor --reward"),
        (("--prompts", "shapes"), True, "gvu", "not from --data"),
        (("--text-ratio", "0"), True, "segros", "text_ratio is a share"),
        (("--temperature", "0"), True, "segros", "temperature must be positive"),
        (("--method", "recca"), True, "segros", "one of segros, reca, sft"),
    ],
)
def test_what_does_not_fit_is_told(checkpoint, data, tmp_path, capsys, more, place, trainer, expected):
    line = words(checkpoint, data if place else None, tmp_path / "run", *more, trainer=trainer)
    if trainer == "gvu":
        line = [word for word in line if word not in ("--pairs-per-step", "4")]
    assert cli.main(line) == 2
    assert expected in capsys.readouterr().err


def test_other_data_under_the_same_name_is_refused(undisturbed, checkpoint, data, tmp_path, capsys):
    rows = (data / "pairs.jsonl").read_text()
    try:
        (data / "pairs.jsonl").write_text(rows + rows)
        assert cli.main(words(checkpoint, data, undisturbed)) == 2
    finally:
        (data / "pairs.jsonl").write_text(rows)
    assert "another pairs" in capsys.readouterr().err


def test_a_model_that_cannot_learn_so_is_told(data):
    class Bare:
        name, family = "bare", "bare"
        token_losses = None

    with pytest.raises(UsageError, match="it has no text_features, image_features, hidden_number, text_log_prob"):
        segros.check(config(), Bare())
    segros.check(config(method="sft", answer_weight=0.0), Bare())


def test_grids_that_differ_are_told(model, data, tmp_path, monkeypatch):
    features = type(model).image_features
    monkeypatch.setattr(type(model), "image_features", lambda self, pixels: features(self, pixels)[:, :9])
    with pytest.raises(UsageError, match=r"as 9 tokens and draws it as 16.*--context random"):
        steps_of(model, data, tmp_path / "run")


def test_the_papers_values_are_the_defaults():
    made = segros.Config()
    assert (made.learning_rate, made.weight_decay, made.betas, made.steps, made.warmup) == (5e-7, 0.01, (0.9, 0.999), 5000, 1000)
    assert (made.pairs_per_step, made.micro_batch, made.text_ratio, made.answer_weight, made.noise) == (4 * 5, 4, 0.4, 1.0, 0.5)
    assert replace(made, method="reca").chosen == ("all", "random", False) and replace(made, method="sft").chosen == (
        "none",
        "random",
        True,
    )
