"""Diffusion pipelines in small: pixels equal diffusers' own, ratios of one, batches, completions, strict reading."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.tiny_diffusion import MAKERS

from mmalign import hub, sde
from mmalign.models import diffusion as family
from mmalign.models.layers.noise import normals, streams
from mmalign.trajectory import Policy
from mmalign.types import Failure, MmalignError, Prompt, Request, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["a red circle", "two small blue squares above a star", "x"]
SIZE = (16, 16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {name: make(root / name, seed=1) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def models(folders):
    return {name: family.load(folder) for name, folder in folders.items()}


@pytest.fixture(params=sorted(MAKERS))
def model(request, models):
    return models[request.param]


def policy(model, level=0.7, steps=5, guidance=3.0, noise=None):
    return Policy(guidance, noise=noise or model.layout.rules[0], levels=(level,) * steps)


def requests(count, size=SIZE):
    return [Request(Prompt(f"p{n}", TEXTS[n % 3]), 0, 100 + n, size) for n in range(count)]


def test_pictures_are_those_of_diffusers_own_pipeline(model, folders, models):
    import diffusers

    name = next(name for name, other in models.items() if other is model)
    cls = getattr(diffusers, family.pipeline_of(folders[name]))
    official = cls.from_pretrained(folders[name], **({"safety_checker": None} if name == "sd15" else {}))
    if name == "sd15":
        official.scheduler = diffusers.DDIMScheduler.from_config(official.scheduler.config, clip_sample=False)
    official.set_progress_bar_config(disable=True)
    settings, size = model.settings, (32, 32) if name == "sana" else SIZE  # SANA's own call takes multiples of 32 alone
    latents = normals(streams([100, 101, 102]), *model.layout.shape(size))
    if name in ("flux", "qwen"):
        latents = official._pack_latents(latents, 3, *latents.shape[1:])
    more = {} if name == "sd15" else {"max_sequence_length": settings["tokens"]}
    weight = {"true_cfg_scale" if name == "qwen" else "guidance_scale": settings["guidance"]}
    if name == "qwen":
        more["negative_prompt"] = [" "] * 3
    if name == "sana":
        more["use_resolution_binning"] = False
    whole = official(
        TEXTS,
        height=size[0],
        width=size[1],
        num_inference_steps=settings["steps"],
        latents=latents,
        output_type="np",
        **weight,
        **more,
    ).images
    chosen = policy(model, 0.0, settings["steps"], settings["guidance"])
    ours = model.draw(model.encode_prompts(TEXTS, settings["negative"]), chosen, [100, 101, 102], size)
    assert np.abs(model.decode(ours).permute(0, 2, 3, 1).numpy() - whole).max() < 1e-5 and whole.std() > 0.05
    for picture, sample in zip(whole, model.generate(requests(3, size)), strict=True):
        assert np.abs((picture * 255).round() - sample.image).max() <= 1  # 1e-5 may lie across a rounding edge


def test_a_picture_depends_on_its_request_alone(model):
    together = model.generate(requests(19))
    for n in (0, 7, 18):
        assert np.array_equal(model.generate([requests(19)[n]])[0].image, together[n].image)
    assert not np.array_equal(together[0].image, together[3].image)  # one text, two seeds


@pytest.mark.parametrize("level", [0.7, 0.2])
def test_the_ratio_of_a_fresh_trajectory_is_exactly_one(model, level):
    for noise in model.layout.rules:
        drawn = model.sample(model.encode_prompts(TEXTS), policy(model, level, noise=noise), [1, 2, 3], SIZE)
        again = model.log_prob(model.encode_prompts(TEXTS), drawn)
        assert torch.equal(again, drawn.log_prob) and again.requires_grad
        alone = model.log_prob(model.encode_prompts(TEXTS[1:2]), drawn.select([1]))
        assert torch.equal(alone[0], again[1])
        assert drawn.states.dtype == torch.float32 and torch.equal(drawn.states[:, 1:], drawn.actions[:, :-1])


def test_every_step_is_scored_as_its_gaussian(models):
    model = models["sd3"]
    prompts = model.encode_prompts(TEXTS)
    drawn = model.sample(prompts, policy(model, guidance=1.0, steps=10), [1, 2, 3])
    for k in range(10):
        before, after = drawn.times[k].tolist()
        rate = 0.7 * (before / (1 - (after if before == 1 else before))) ** 0.5
        x, v = drawn.states[:, k], drawn.predictions[:, k]
        mean = x * (1 + rate**2 / (2 * before) * (after - before)) + v * (1 + rate**2 * (1 - before) / (2 * before)) * (after - before)
        normal = torch.distributions.Normal(mean, rate * (before - after) ** 0.5)
        assert torch.allclose(normal.log_prob(drawn.actions[:, k]).mean((1, 2, 3)), drawn.log_prob[:, k], rtol=1e-3, atol=1e-4)


def test_a_step_without_noise_is_no_decision(model):
    made = Policy(3.0, noise=model.layout.rules[0], levels=(0.0, 0.6, 0.0, 0.0))
    drawn = model.sample(model.encode_prompts(TEXTS), made, [1, 2, 3], SIZE)
    assert (drawn.log_prob != 0).tolist() == [[False, True, False, False]] * 3


def test_detaching_the_unconditional_branch_changes_the_gradient_alone(models):
    model = models["sd3"]
    prompts = model.encode_prompts(TEXTS)
    drawn = model.sample(prompts, policy(model), [1, 2, 3])
    values = [model.log_prob(prompts, drawn, which) for which in ("guided", "guided_detach_uncond")]
    assert torch.allclose(*values, atol=1e-5)
    weight = model.net.transformer_blocks[0].attn.to_q.weight
    first, second = (torch.autograd.grad(value[:, :-1].mean(), weight)[0] for value in values)
    assert (first - second).abs().max() > 0.1 * first.abs().max() > 0
    assert (model.log_prob(prompts, drawn, "cond") - drawn.log_prob).abs().max() > 0.01


def completed_alone(model, prompts, drawn, row, k, n):
    """One completion by itself, its own predictions throughout."""
    total = drawn.actions.shape[1]
    grid = torch.cat([drawn.times[:, 0], drawn.times[-1:, 1]])
    x = drawn.states[row : row + 1, k]
    plan = sde.stops(total - k, n or total)
    for here, there in zip(plan, plan[1:], strict=False):
        before, after = grid[total - here], grid[total - there]
        prediction = model._predict(x, before.reshape(1), prompts.select([row]), drawn.policy.guidance, "guided")
        x = sde.step(x, prediction, before, after, 0.0, drawn.policy.noise).mean
    return x[0]


@pytest.mark.parametrize("n", [0, 1, 2])
def test_the_wavefront_completes_every_state_as_if_alone(model, n):
    prompts = model.encode_prompts(TEXTS)
    drawn = model.sample(prompts, policy(model), [1, 2, 3], SIZE)
    whole = model.complete(prompts, drawn, n)
    assert whole.shape[:2] == (3, 6) and torch.equal(whole[:, -1], drawn.actions[:, -1])
    with torch.no_grad():
        for row in range(3):
            for k in range(5):
                alone = completed_alone(model, prompts, drawn, row, k, n)
                assert (whole[row, k] - alone).abs().max() < 1e-5 * max(1.0, float(alone.abs().max()))
    assert torch.equal(whole, model.complete(prompts, drawn, n))


def test_without_noise_every_state_completes_to_the_end(models):
    model = models["sd3"]
    prompts = model.encode_prompts(TEXTS)
    drawn = model.sample(prompts, policy(model, 0.0), [1, 2, 3])
    whole = model.complete(prompts, drawn)
    assert torch.allclose(whole, whole[:, -1:].expand_as(whole), atol=1e-4)


def test_one_step_completions_cost_no_evaluation(models, monkeypatch):
    model = models["sd3"]
    prompts = model.encode_prompts(TEXTS)
    drawn = model.sample(prompts, policy(model), [1, 2, 3])
    monkeypatch.setattr(model.layout, "predict", lambda *_: pytest.fail("evaluated the network"))
    model.complete(prompts, drawn, 1)


def test_sizes_that_cannot_be_drawn_are_failures(model):
    odd = Request(Prompt("p", "x"), 0, 1, (17, 16))
    made = model.generate([odd, requests(1)[0]])
    assert isinstance(made[0], Failure) and "multiples of" in made[0].message and made[1].image.shape == (16, 16, 3)


def test_a_saved_pipeline_draws_the_same(model, tmp_path):
    model.save(tmp_path / "saved")
    again = family.load(tmp_path / "saved")
    assert np.array_equal(again.generate(requests(1))[0].image, model.generate(requests(1))[0].image)
    assert again.settings == model.settings


def test_lora_on_attention_trains_adapters_alone_and_leaves_no_trace_when_merged_out(folders, tmp_path):
    from mmalign.loop import Loop, LoopConfig

    model = family.load(folders["sd3"])
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    prompts = model.encode_prompts(TEXTS)
    drawn = model.sample(prompts, policy(model), [1, 2, 3])
    base = model.log_prob(prompts, drawn).detach()
    loop = Loop(LoopConfig(steps=1, lora_rank=4, learning_rate=1e-2, parts=("attention",)), model, tmp_path / "run")
    assert all("attn" in name and "lora_" in name for name in loop.parameters)
    assert torch.equal(model.log_prob(prompts, drawn), base)  # adapters start at no effect
    for _ in loop.steps():
        loop.backward(-model.log_prob(prompts, drawn)[:, :-1].mean(), {}, [])
        loop.update()
    assert not torch.equal(model.log_prob(prompts, drawn), base)
    with loop.reference():
        assert torch.equal(model.log_prob(prompts, drawn), base)
    loop.export(tmp_path / "model")
    merged = family.load(tmp_path / "model").net.state_dict()
    moved = {name for name in before if not torch.equal(before[name], merged[name])}
    assert merged.keys() == before.keys() and moved and all("attn" in name for name in moved)


def test_the_flow_loss_sees_the_pictures_and_the_blank_rows(models):
    model = models["sd3"]
    prompts = model.encode_prompts(TEXTS)
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    loss = model.supervised_loss(prompts, pixels, [1, 2, 3])
    assert loss.shape == (3,) and loss.requires_grad
    assert torch.allclose(loss[1:2], model.supervised_loss(prompts.select([1]), pixels[1:2], [2]), atol=1e-5)
    blank = model.supervised_loss(prompts, pixels, [1, 2, 3], torch.tensor([True, False, False]))
    assert blank[0] != loss[0] and torch.equal(blank[1:], loss[1:])
    assert (model.decode(model.encode_image(pixels)).shape) == pixels.shape


def test_a_folder_is_recognised_and_read_strictly(folders, tmp_path):
    spec = hub.resolve_model(str(folders["sd3"]))
    assert spec.family == "diffusion" and "StableDiffusion3Pipeline" in spec.how
    broken = tmp_path / "broken"
    shutil.copytree(folders["sd3"], broken)
    file = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    name = next(name for name in tensors if "attn" in name)
    tensors.pop(name)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(MmalignError, match="1 parameters are missing.*attn"):
        family.load(broken)
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps({**index, "transformer": ["evil", "Net"]}))
    with pytest.raises(MmalignError, match="'evil'"):
        family.load(broken)
    shutil.rmtree(broken / "vae")
    (broken / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(MmalignError, match="lacks its part 'vae'|parameters are missing"):
        family.load(broken)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (Policy(3.0, levels=()), "needs its levels"),
        (Policy(3.0, noise="ddim", levels=(0.5,)), "no noise 'ddim'"),
    ],
)
def test_wrong_policies_are_sentences(models, made, words):
    model = models["sd3"]
    with pytest.raises(UsageError, match=words):
        model.sample(model.encode_prompts(["x"]), made, [1])
    with pytest.raises(UsageError, match="own seed"):
        model.sample(model.encode_prompts(["x"]), policy(model), [1, 2])
