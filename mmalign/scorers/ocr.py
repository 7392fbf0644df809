"""How exactly the quoted text of a prompt stands in the image: 1 minus the edit distance per letter, read by OCR (0 to 1).

yifan123/flow_grpo flow_grpo/ocr.py at ac4c86e. Target: the text in the prompt's first pair of quotes. Everything recognised is joined in
the reader's order; spaces go, letters become small. Distance: 0 when the target is part of what was read, else Levenshtein's, at most the
target's length n. Score: 1 - distance / n. Changed: rapidocr (its models are in its wheel) where the original has PaddleOCR; under
`compat` "fixed" curly quotes count as quotes, the reader gets BGR as it expects, and a prompt without quoted text or a reader that breaks
is a failure. "upstream" reads straight quotes only, hands over RGB, and gives 0 when the reader breaks (a prompt without quotes stopped it
altogether).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from mmalign.scorers._samples import image_of, text_of
from mmalign.types import Failure, MmalignError, Sample, Score, Value, digest

NEEDS = ("extra: ocr",)
VERSION = 1
QUOTES = '"\u201c\u201d\u201e\u201f'  # straight, and the curly ones of English and German
QUOTED = {"fixed": re.compile(f"[{QUOTES}]([^{QUOTES}]*)[{QUOTES}]"), "upstream": re.compile('"([^"]*)(?:"|$)')}


@dataclass(frozen=True)
class Config:
    """`confidence`: lines that the reader is less sure of are dropped (0.5 is rapidocr's default; upstream keeps all of PaddleOCR's)."""

    compat: Literal["fixed", "upstream"] = "fixed"
    confidence: float = 0.5


def load(config: Config = Config(), device: str = "cpu") -> OcrScorer:
    """The reader runs on the CPU whatever the device, with as many threads as torch may use."""
    try:
        from rapidocr import RapidOCR
    except ModuleNotFoundError as error:
        raise MmalignError("The scorer 'ocr' needs rapidocr, onnxruntime and rapidfuzz: pip install 'mmalign[ocr]'.") from error
    import torch

    settings = {
        "Global.text_score": config.confidence,
        "Global.log_level": "error",
        "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
    }
    return OcrScorer(config, RapidOCR(params=settings))


def target_of(prompt: str, compat: Literal["fixed", "upstream"] = "fixed") -> str:
    """The quoted text of a prompt without spaces, in small letters; "" when there is none."""
    match = QUOTED[compat].search(prompt)
    return plain(match[1]) if match else ""


def plain(text: str) -> str:
    return text.replace(" ", "").lower()


def accuracy(recognised: str, target: str) -> tuple[float, int]:
    """The score and the edit distance of plain texts; the target is not empty."""
    from rapidfuzz.distance import Levenshtein

    distance = 0 if target in recognised else min(Levenshtein.distance(recognised, target), len(target))
    return 1 - distance / len(target), distance


@dataclass(frozen=True)
class OcrScorer:
    """The loaded scorer; a value's detail is what was read, line by line."""

    config: Config
    reader: Any
    name: str = "ocr"
    range: tuple[float, float] = (0.0, 1.0)

    @cached_property
    def fingerprint(self) -> str:
        from importlib.metadata import version

        return digest("ocr", VERSION, asdict(self.config), "rapidocr", version("rapidocr"))  # the wheel's version is its models' identity

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One value or failure per sample, in order."""
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> Score:
        image, prompt = image_of(sample), text_of(sample, "prompt")
        if isinstance(image, Failure):
            return image
        if isinstance(prompt, Failure):
            return prompt
        target = target_of(prompt, self.config.compat)
        if not target:
            return Failure("score", "missing", f"The prompt of {sample.request.id} quotes no text to be written: {prompt[:100]!r}.")
        pixels = image[..., ::-1] if self.config.compat == "fixed" else image
        try:
            lines = list(self.reader(pixels.copy()).txts or ())
        except (RuntimeError, ValueError) as error:
            if self.config.compat == "upstream":
                return Value(0.0, {"distance": float(len(target))}, detail=f"the reader broke: {error}")
            return Failure("score", "error", f"The text reader broke on the image of {sample.request.id}: {error}")
        share, distance = accuracy(plain("".join(lines)), target)
        return Value(share, {"distance": float(distance)}, detail=" | ".join(lines))
