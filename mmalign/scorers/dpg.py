"""DPG-Bench: the share of a dense prompt's questions that a VQA model answers with yes, following their dependencies (0 to 1).

Paper: Hu et al., ELLA, arXiv 2403.05135; TencentQQGYLab/ELLA dpg_bench/compute_dpg_bench.py at 3c228f1. The official model is mPLUG-large
VQA, which only ModelScope runs: it answers from an environment of its own (mmalign/adapters/mplug_server.py) behind `mmalign serve`. With
`vqa` "blip" BLIP-VQA answers here instead (yes where P(yes) > P(no)); its metric is named dpg-blip, for it is another judge. Parts are the
answers before dependencies, by question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from mmalign.config import Secret
from mmalign.scorers import blip_vqa, remote
from mmalign.scorers._question_graph import Asked, parts, questions_of, score
from mmalign.types import Deviation, Failure, Prompt, Sample, Score, Value, digest

NEEDS = ("endpoint",)
VERSION = 1
SERVED = "mplug_server"

Answers = Callable[[Sequence[Sample]], list[dict[int, float] | Failure]]


@dataclass(frozen=True)
class Config:
    """`vqa`: who answers; `url`, `token`, `timeout`, `retries`: where mPLUG is served; `blip`, `processor`, `resolution`: of BLIP-VQA."""

    vqa: Literal["mplug", "blip"] = "mplug"
    url: str = "http://127.0.0.1:8193"
    token: Secret = field(default_factory=lambda: Secret("MMALIGN_TOKEN"))
    timeout: float = 120.0
    retries: int = 5
    blip: str = "Salesforce/blip-vqa-capfilt-large"
    processor: str = "Salesforce/blip-vqa-capfilt-large"
    resolution: int | None = 480
    batch_size: int = 16


def load(config: Config = Config(), device: str = "cpu") -> Dpg:
    """With mPLUG the device is the server's."""
    if config.vqa == "mplug":
        served = remote.connect("dpg", remote.Config(config.url, SERVED, config.token, config.timeout, config.retries), SERVED)
        return Dpg(lambda samples: _served(served, samples), served.fingerprint, "dpg", ())
    options = {"model": config.blip, "processor": config.processor, "resolution": config.resolution, "batch_size": config.batch_size}
    blip = blip_vqa.load(blip_vqa.Config(**options, is_rounded=False), device)  # type: ignore[arg-type]
    told = Deviation("dpg.vqa", "mPLUG-large VQA (ModelScope)", f"BLIP-VQA {config.blip}", "another judge: report as dpg-blip")
    return Dpg(lambda samples: _by_blip(blip, samples), blip.fingerprint, "dpg-blip", (told,))


class Dpg:
    """The scorer: questions from the prompt's metadata, answers from the VQA model."""

    name = "dpg"
    range = (0.0, 1.0)

    def __init__(self, answers: Answers, model: str, metric_name: str, deviations: tuple[Deviation, ...]) -> None:
        self._answers, self.metric_name, self.deviations = answers, metric_name, deviations
        self.fingerprint = digest("dpg", VERSION, model)

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One value or failure per sample, in order."""
        asked = [questions_of(sample) for sample in samples]
        answers = iter(self._answers([sample for sample, one in zip(samples, asked, strict=True) if not isinstance(one, Failure)]))
        return [one if isinstance(one, Failure) else _value(one, next(answers)) for one in asked]


def _value(questions: Sequence[Asked], answers: dict[int, float] | Failure) -> Score:
    if isinstance(answers, Failure):
        return answers
    if lost := [one.number for one in questions if one.number not in answers]:
        return Failure("score", "parse", f"The VQA model gave no answer to question {lost[0]}.")
    return Value(score(questions, answers), parts(answers))


def _served(served: remote.RemoteScorer, samples: Sequence[Sample]) -> list[dict[int, float] | Failure]:
    """The served model's answers: its parts are "q<number>"."""
    return [
        one if isinstance(one, Failure) else {int(name.removeprefix("q")): answer for name, answer in one.parts.items()}
        for one in served.score(samples)
    ]


def _by_blip(blip: blip_vqa.BlipVqa, samples: Sequence[Sample]) -> list[dict[int, float] | Failure]:
    """BLIP's answers; it reads eight questions of an image at a time, and adds the question mark itself."""
    asked: list[tuple[int, Sequence[Asked]]] = []
    for at, sample in enumerate(samples):
        questions = questions_of(sample)
        assert not isinstance(questions, Failure), questions
        size = blip_vqa.MAX_PHRASES
        asked += [(at, questions[start : start + size]) for start in range(0, len(questions), size)]
    found: list[dict[int, float] | Failure] = [{} for _ in samples]
    scores = blip.score([_with_phrases(samples[at], some) for at, some in asked])
    for (at, some), one in zip(asked, scores, strict=True):
        known = found[at]
        if isinstance(one, Failure) or isinstance(known, Failure):
            found[at] = one if isinstance(one, Failure) else known
            continue
        found[at] = {**known, **{each.number: float(one.parts[_phrase(each)] > 0.5) for each in some}}
    return found


def _with_phrases(sample: Sample, questions: Sequence[Asked]) -> Sample:
    prompt = sample.request.prompt
    asked = Prompt(prompt.id, prompt.text, prompt.tags, {"noun_phrases": [_phrase(one) for one in questions]})
    return replace(sample, request=replace(sample.request, prompt=asked))


def _phrase(question: Asked) -> str:
    return question.text.strip().removesuffix("?")
