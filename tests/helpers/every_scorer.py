"""Every scorer on tiny weights: how it is loaded, seven samples that it tells apart, and what of a sample it reads.

A case is made on demand, under a folder of its own; what it starts or stands in for (servers, packages that do not install here) ends
with the `Cases` that made it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_geneval, tiny_questions
from helpers import tiny_scorers as tiny
from helpers.replay import said, serving, text_of

import mmalign
from mmalign import registry, serve
from mmalign.reward import load_scorer
from mmalign.testbed import world
from mmalign.testbed.render import render
from mmalign.types import Prompt, Request, Sample, Scorer
from mmalign.worker import Recipe

ADAPTERS = Path(mmalign.__file__).parent / "adapters"
QUOTING = ('a red cat that says "hello"', 'a blue dog on the mat that says "you"', 'you idiot says "cat"')


def quoting() -> list[Sample]:
    """Texts with toxic words and quoted ones, pictures of three sizes."""
    return [tiny.sample(number, QUOTING[number % 3]) for number in range(7)]


def naming() -> list[Sample]:
    """Texts that name one to three things in words that the tiny vocabularies hold."""
    samples = tiny_questions.seven()
    return [Sample(sample.request, tiny.image(at, 40 + 8 * (at % 3), 48)) for at, sample in enumerate(samples)]


def detected() -> list[Sample]:
    """Prompts with GenEval's metadata."""
    things = [{"class": "giraffe", "count": 1}], [{"class": "bird", "count": 2}], [{"class": "scissors", "count": 1, "color": "red"}]
    tags = ("single_object", "counting", "colors")
    prompts = [Prompt(f"p{at}", "a thing", meta={"tag": tags[at % 3], "include": things[at % 3]}) for at in range(7)]
    return [Sample(Request(prompt, 0, at), tiny.image(at, 40 + 8 * (at % 3), 48)) for at, prompt in enumerate(prompts)]


def drawn() -> list[Sample]:
    """Prompts of the shapes world, each with the picture of another, so that some facts hold and some do not; the first three
    pictures show what their prompts forbid."""
    kinds = ("color_attr", "dense_4")
    scenes = [scene for _, (_, _, scene) in zip(range(7), world.sample_prompts("test", kinds, 5), strict=False)]
    prompts = world.prompts("test", per_kind=4, kinds=kinds)[:7]
    samples = []
    for at, (prompt, scene, picture) in enumerate(zip(prompts, scenes, render(scenes), strict=True)):
        shown = {(thing.shape, thing.color) for thing in scene}
        pairs = [(shape, color) for shape in world.SHAPES for color in world.COLORS if ((shape, color) in shown) == (at < 3)]
        samples.append(Sample(Request(replace(prompt, meta={**prompt.meta, "forbidden": list(pairs[0])}), 0, at), picture))
    return samples


@dataclass(frozen=True)
class Case:
    """`options` as typed by a user; `batch_option` is how many it takes at once, "" where it has no such option."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    samples: Callable[[], list[Sample]] = quoting
    reads_image: bool = True
    reads_text: bool = True
    has_weights: bool = True
    batch_option: str = "batch_size"

    def load(self, batch: int | None = None, **options: Any) -> Scorer:
        size = {self.batch_option: batch} if batch and self.batch_option else {}
        return load_scorer(self.name, {**self.options, **size, **options})

    @property
    def recipe(self) -> Recipe:
        return Recipe(registry.find("scorers", self.name), self.options)


class Cases:
    """Makes cases under a folder; a context manager that stops their servers and takes back their stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._made = folder, dict[str, Case]()
        self._stack = ExitStack()
        self.patch = self._stack.enter_context(pytest.MonkeyPatch.context())

    def __enter__(self) -> Cases:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __getitem__(self, name: str) -> Case:
        if name not in self._made:
            self._made[name] = MAKERS[name](self, self.folder / name)
        return self._made[name]

    def serve(self, name: str, path: Path | None = None, **options: Any) -> str:
        """The address of a server of one scorer."""
        entry = registry.find("scorers", name, [path] if path else [])
        return self._stack.enter_context(serve.Server({name: Recipe(entry, options)}, serve.Settings(port=0, linger=0.0))).url

    def answer(self, answer: Callable[..., Any]) -> str:
        """The address of an OpenAI-compatible endpoint."""
        return self._stack.enter_context(serving(answer)).url


class EchoReader:
    """Stands in for the OCR engine: how many letters of "hello" it reads depends on every pixel."""

    def __call__(self, picture: np.ndarray) -> SimpleNamespace:
        return SimpleNamespace(txts=("Hello"[: int(picture.sum()) % 6],))


class PackageOfUniPercept:
    """Stands in for unipercept-reward, which needs libraries of its own: its ratings follow the picture's mean colour."""

    def __init__(self, device: str) -> None: ...

    def reward(self, image_paths: Sequence[str]) -> list[dict[str, float]]:
        from mmalign.images import decode_image

        means = [float(decode_image(Path(path)).mean()) for path in image_paths]
        return [{"iaa": mean / 4, "iqa": mean / 5, "ista": mean / 6} for mean in means]


def _saved(path: Path, content: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return str(path)


def _clip(folder: Path) -> str:
    return str(tiny_geneval.make_clip(folder / "clip"))


def _aesthetic(cases: Cases, folder: Path) -> Case:
    head = _saved(folder / "head.pth", tiny.head_state(8))
    return Case("aesthetic", {"model": _clip(folder), "head": head}, reads_text=False)


def _blip_vqa(cases: Cases, folder: Path) -> Case:
    options = {"model": str(tiny_questions.blip(folder)), "processor": str(folder), "resolution": 32, "is_rounded": False}
    return Case("blip_vqa", options, naming)


def _deqa(cases: Cases, folder: Path) -> Case:
    def rate(images: list[Any]) -> list[float]:
        return [1 + 4 * np.asarray(image).mean() / 255 for image in images]

    model = SimpleNamespace(config=SimpleNamespace(_commit_hash="abc"), score=rate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda name, **options: model)
        url = cases.serve("deqa_server", ADAPTERS / "deqa_server.py")
    return Case("deqa", {"url": url}, reads_text=False, has_weights=False, batch_option="")


def _geneval(cases: Cases, folder: Path) -> Case:
    detector = str(tiny_geneval.make_detector(folder / "detector"))
    options = {"detector": detector, "clip": _clip(folder), "resolution": 64, "rule": "soft", "counting_threshold": 0.4}
    return Case("geneval", options, detected, reads_text=False)


def _hpsv2(cases: Cases, folder: Path) -> Case:
    weights = _saved(folder / "hps.pt", {"state_dict": tiny.open_clip_state()})
    return Case("hpsv2", {"weights": weights, "tokenizer": _clip(folder)})


def _hpsv3(cases: Cases, folder: Path) -> Case:
    weights, base, _ = tiny_questions.hpsv3(folder)
    return Case("hpsv3", {"weights": str(weights), "base": str(base), "pixels": 3136, "dtype": "float32"}, naming)


def _imagereward(cases: Cases, folder: Path) -> Case:
    weights = _saved(folder / "ImageReward.pt", tiny.imagereward_state())
    return Case("imagereward", {"weights": weights, "tokenizer": str(tiny.bert_tokenizer(folder / "words"))})


def _ocr(cases: Cases, folder: Path) -> Case:
    """The engine itself runs in test_ocr.py; here a quick one, so that the contract takes no minute."""
    pytest.importorskip("rapidocr", reason="needs the extra [ocr]")
    cases.patch.setattr("rapidocr.RapidOCR", lambda params: EchoReader())
    return Case("ocr", has_weights=False, batch_option="")


def _rahf(cases: Cases, folder: Path) -> Case:
    tiny_questions.rahf(folder)
    return Case("rahf", {"weights": str(folder)}, naming)


def _remote(cases: Cases, folder: Path) -> Case:
    """The served scorer takes one at a time: what a server joins depends on the moment, and with it a value's last bits."""
    return Case("remote", {"url": cases.serve("clipscore", model=_clip(folder), batch_size=1), "retries": 0}, has_weights=False)


def _safety(cases: Cases, folder: Path) -> Case:
    return Case("safety", {"toxicity": str(tiny.toxic_bert(folder / "bert")), "nsfw": str(tiny.nsfw_vit(folder / "vit"))})


def _unifiedreward(cases: Cases, folder: Path) -> Case:
    def rate(body: dict[str, Any], number: int) -> tuple[int, Any, float]:
        asked = text_of(body).rpartition("Text Caption: [")[2]
        marks = zip(("Alignment", "Coherence", "Style"), (len(asked) % 5 + 1, len(asked) % 4 + 1, 3), strict=True)
        return said("\n".join(f"{axis} Score (1-5): {mark}" for axis, mark in marks))

    return Case("unifiedreward", {"base_url": cases.answer(rate), "retries": 0}, naming, has_weights=False, batch_option="concurrency")


def _unipercept(cases: Cases, folder: Path) -> Case:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "unipercept_reward", SimpleNamespace(UniPerceptRewardInferencer=PackageOfUniPercept))
        patch.setattr("importlib.metadata.version", lambda name: "1.0.3")
        url = cases.serve("unipercept_server", ADAPTERS / "unipercept_server.py")
    return Case("unipercept", {"url": url}, reads_text=False, has_weights=False, batch_option="")


def _vqascore(cases: Cases, folder: Path) -> Case:
    model, vision = tiny_questions.clip_t5(folder)
    return Case("vqascore", {"model": str(model), "vision": str(vision), "tokenizer": str(folder), "dtype": "float32"}, naming)


MAKERS: dict[str, Callable[[Cases, Path], Case]] = {
    "aesthetic": _aesthetic,
    "blip_vqa": _blip_vqa,
    "clipscore": lambda cases, folder: Case("clipscore", {"model": _clip(folder)}),
    "deqa": _deqa,
    "geneval": _geneval,
    "git": lambda cases, folder: Case("git", {"model": str(tiny_questions.git(folder))}, naming),
    "groundingdino": lambda cases, folder: Case(
        "groundingdino", {"model": str(tiny_questions.grounding_dino(folder)), "resolution": 96, "threshold": 0.5}, naming
    ),
    "hpsv2": _hpsv2,
    "hpsv3": _hpsv3,
    "imagereward": _imagereward,
    "jpeg_size": lambda cases, folder: Case("jpeg_size", reads_text=False, has_weights=False, batch_option=""),
    "nsfw": lambda cases, folder: Case("nsfw", {"model": str(tiny.nsfw_vit(folder))}, reads_text=False),
    "ocr": _ocr,
    "orm": lambda cases, folder: Case("orm", {"model": str(tiny_questions.llava_next(folder)[0]), "dtype": "float32"}, naming),
    "pickscore": lambda cases, folder: Case("pickscore", {"model": _clip(folder), "processor": str(folder / "clip")}),
    "rahf": _rahf,
    "remote": _remote,
    "safety": _safety,
    "self_understanding": lambda cases, folder: Case("self_understanding", samples=drawn, batch_option=""),
    "shapes": lambda cases, folder: Case("shapes", samples=drawn, reads_text=False, has_weights=False, batch_option=""),
    "shapes_preference": lambda cases, folder: Case("shapes_preference", samples=drawn),
    "shapes_safety": lambda cases, folder: Case("shapes_safety", samples=drawn, reads_text=False, has_weights=False, batch_option=""),
    "toxicity": lambda cases, folder: Case("toxicity", {"model": str(tiny.toxic_bert(folder))}, reads_image=False),
    "unifiedreward": _unifiedreward,
    "unipercept": _unipercept,
    "vqascore": _vqascore,
}


def networks(held: object) -> list[torch.nn.Module]:
    """Every network in the fields of a scorer and of what it holds."""
    inner = [getattr(held, item.name) for item in fields(held)] if hasattr(held, "__dataclass_fields__") else list(vars(held).values())
    found = [value for value in inner if isinstance(value, torch.nn.Module)]
    for value in inner:
        is_ours = type(value).__module__.startswith("mmalign.") and not isinstance(value, torch.nn.Module)
        found += networks(value) if is_ours and hasattr(value, "__dict__") else []
    return found
