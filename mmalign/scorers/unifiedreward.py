"""UnifiedReward: a VLM that rates an image's alignment, coherence and style (2.0) or writes one final score (1.x); an endpoint.

Paper: Wang et al., arXiv 2503.05236; CodeGoat24/UnifiedReward at ff6f520. Serve it with vLLM under the name UnifiedReward: `vllm serve
CodeGoat24/UnifiedReward-2.0-qwen3vl-8b --served-model-name UnifiedReward --port 8080`. The questions are the official ones; ratings lie
between 1 and 5, the value is a rating (or the mean of the three) over 5. Changed: temperature 0 is sent, where the official client leaves
sampling to the server; a reply without a rating is a failure, where Flow-GRPO makes it 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from mmalign.config import Secret
from mmalign.judge import Endpoint, Judge, Question, read
from mmalign.scorers._samples import Item, score_in_batches
from mmalign.types import Failure, Sample, Score, Value, digest

NEEDS = ("endpoint",)
VERSION = 1
AXES = ("alignment", "coherence", "style")
LOW, HIGH = 1.0, 5.0

AXES_QUESTION = (
    "You are presented with a generated image and its associated text caption. "
    "Your task is to analyze the image across multiple dimensions in relation to the caption. Specifically:\n"
    "Provide overall assessments for the image along the following axes (each rated from 1 to 5):\n"
    "- Alignment Score: How well the image matches the caption in terms of content.\n"
    "- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, etc.).\n"
    "- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.\n\n"
    "Output your evaluation using the format below:\n\n"
    "Alignment Score (1-5): X\n"
    "Coherence Score (1-5): Y\n"
    "Style Score (1-5): Z\n\n"
    "Your task is provided as follows:\n"
    "Text Caption: [{}]"
)
FINAL_QUESTION = (
    "You are given a text caption and a generated image based on that caption. "
    "Your task is to evaluate this image based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. "
    "Consider the accuracy of depicted objects, their relationships, and attributes as described in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of this image, "
    "including clarity, detail preservation, color accuracy, and overall aesthetic appeal.\n"
    "Extract key elements from the provided text caption, evaluate their presence in the generated image using the format: "
    "'element (type): value' (where value=0 means not generated, and value=1 means generated), "
    "and assign a score from 1 to 5 after 'Final Score:'.\n"
    "Your task is provided as follows:\n"
    "Text Caption: [{}]"
)
FINAL = re.compile(r"Final Score:\s*([1-5](?:\.\d+)?)")
AXIS = {axis: re.compile(rf"{axis} Score(?: \(1-5\))?:\s*(\d+(?:\.\d+)?)", re.IGNORECASE) for axis in AXES}


@dataclass(frozen=True)
class Config:
    """`version`: which question is asked; `rating`: which axis of 2.0 is the value; `is_thinking` False switches Qwen3's thinking off."""

    base_url: str = "http://127.0.0.1:8080/v1"
    model: str = "UnifiedReward"
    version: Literal["2.0", "1.5"] = "2.0"
    rating: Literal["mean", "alignment", "coherence", "style"] = "mean"
    key: Secret = field(default_factory=lambda: Secret("UNIFIEDREWARD_API_KEY"))
    max_tokens: int = 4096
    image: Literal["png", "jpeg"] = "jpeg"
    is_thinking: bool | None = None
    concurrency: int = 16
    timeout: float = 120.0
    retries: int = 6
    pause: float = 1.0


def load(config: Config = Config(), device: str = "cpu") -> UnifiedReward:
    """The device is the server's; nothing is asked before the first image."""
    extra = {} if config.is_thinking is None else {"chat_template_kwargs": {"enable_thinking": config.is_thinking}}
    endpoint = Endpoint(
        model=config.model,
        base_url=config.base_url,
        key=config.key,
        max_tokens=config.max_tokens,
        image=config.image,
        concurrency=config.concurrency,
        timeout=config.timeout,
        retries=config.retries,
        pause=config.pause,
        extra=extra,
    )
    return UnifiedReward(config, Judge(endpoint))


class UnifiedReward:
    """The client. Parts: the ratings as the model wrote them; the detail names the model that answered."""

    name = "unifiedreward"
    range = (LOW / HIGH, 1.0)

    def __init__(self, config: Config, judge: Judge) -> None:
        self.config, self.judge = config, judge
        kept = ("model", "version", "rating", "max_tokens", "image", "is_thinking")
        self.fingerprint = digest("unifiedreward", VERSION, {name: value for name, value in asdict(config).items() if name in kept})

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One value or failure per sample, in order."""
        return score_in_batches(samples, max(1, len(samples)), self._measure)

    def _measure(self, items: Sequence[Item]) -> list[Score]:
        template, parse = (AXES_QUESTION, axes_of) if self.config.version == "2.0" else (FINAL_QUESTION, final_of)
        replies = self.judge.ask([Question(template.replace("{}", item.text), (item.pixels,)) for item in items])
        scores: list[Score] = []
        for reply in replies:
            parts = read(reply, parse)
            if isinstance(parts, Failure) or isinstance(reply, Failure):
                scores.append(parts if isinstance(parts, Failure) else reply)  # type: ignore[arg-type]
                continue
            chosen = parts.get(self.config.rating, sum(parts.values()) / len(parts))
            scores.append(Value(chosen / HIGH, parts, detail=f"{reply.model}: {reply.text.strip()[-500:]}"))
        return scores


def axes_of(text: str) -> dict[str, float]:
    """The three ratings of a 2.0 reply; the last mention of an axis counts. ValueError when one is absent or out of range."""
    found = {axis: pattern.findall(text) for axis, pattern in AXIS.items()}
    if absent := [axis for axis, numbers in found.items() if not numbers]:
        raise ValueError(f"it gives no {absent[0]} score")
    ratings = {axis: float(numbers[-1]) for axis, numbers in found.items()}
    if wrong := [axis for axis, rating in ratings.items() if not LOW <= rating <= HIGH]:
        raise ValueError(f"its {wrong[0]} score {ratings[wrong[0]]:g} is not between 1 and 5")
    return ratings


def final_of(text: str) -> dict[str, float]:
    """The final score of a 1.x reply."""
    numbers = FINAL.findall(text)
    if not numbers or not LOW <= float(numbers[-1]) <= HIGH:
        raise ValueError("it gives no final score between 1 and 5")
    return {"final": float(numbers[-1])}
