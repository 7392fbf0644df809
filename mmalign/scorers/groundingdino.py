"""GroundingDINO reward: are the prompt's objects there, as many as it says, and where it says (0 to 1), as in T2I-R1.

CaraJ7/T2I-R1 reward_gdino.py at 2d9d4d1; the network is transformers' GroundingDinoForObjectDetection (the same weights as
groundingdino_swint_ogc.pth). The caption joins the nouns by " . "; a noun's score for a box is the mean of the sigmoids over the tokens of
its first and last word, and the box counts above 0.3. Prompts without nouns score 1. The rules, the official code's defects and their
repair are in `_grounding.py`; compat="upstream" keeps every defect. Changed: nouns come from a small rule where the metadata have none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mmalign import shim
from mmalign.images import IMAGENET_MEAN, IMAGENET_STD, Size, normalise, resize, to_tensor
from mmalign.scorers import _grounding, _phrases, _weights
from mmalign.scorers._clip import Dtype
from mmalign.scorers._rows import buckets
from mmalign.scorers._samples import Item, score_in_batches
from mmalign.scorers._whole import load_whole
from mmalign.types import Failure, Sample, Score, Value, digest

if TYPE_CHECKING:
    import numpy as np
    import torch

NEEDS = ("weights: IDEA-Research/grounding-dino-tiny",)
VERSION = 1
MAY_LACK = ("swin.layernorm", "special_tokens")  # a norm that is not used, and a constant
EPSILON = 1e-6


@dataclass(frozen=True)
class Config:
    """`model`: hub id or folder; `compat`: see `_grounding.py`; `resolution`: of the short side, the long one is at most 5/3 of it."""

    model: str = "IDEA-Research/grounding-dino-tiny"
    compat: _grounding.Compat = "fixed"
    threshold: float = 0.3
    resolution: int = 800
    parser: _phrases.Parser = "rule"
    batch_size: int = 4
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold lies between 0 and 1, got {self.threshold}")


@dataclass(frozen=True)
class Question:
    """One image with what is asked of it: nouns, their caption's token ids, and the tokens that stand for each noun [nouns, tokens]."""

    pixels: np.ndarray
    nouns: tuple[str, ...]
    ids: tuple[int, ...]
    spans: torch.Tensor

    @property
    def size(self) -> Size:
        return self.pixels.shape[0], self.pixels.shape[1]


def load(config: Config = Config(), device: str = "cpu") -> GroundingDino:
    from transformers import GroundingDinoForObjectDetection

    model = load_whole(GroundingDinoForObjectDetection, config.model, device, config.dtype, "groundingdino.model", MAY_LACK)
    return GroundingDino(config, model.requires_grad_(False), _weights.tokenizer(config.model, "groundingdino.model"))


class GroundingDino:
    """The loaded scorer. Parts depend on the task: presence by noun, presence and relation, or the count found by noun."""

    name = "groundingdino"

    def __init__(self, config: Config, model: Any, words: Any) -> None:
        self.config, self.model, self.words = config, model, words
        self.range = (0.0, 1.0)
        settings = {key: value for key, value in asdict(config).items() if key not in ("model", "batch_size")}
        chunks = _phrases.spacy_version() if config.parser == "spacy" else "rule"
        weights = _weights.fingerprint_tensors(model), _weights.fingerprint_tokenizer(words)
        self.fingerprint = digest("groundingdino", VERSION, settings, chunks, weights)

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One value or failure per sample, in order."""
        return score_in_batches(samples, self.config.batch_size, self._measure)

    def find(self, items: Sequence[Item], nouns: Sequence[tuple[str, ...]]) -> list[dict[str, _grounding.Found] | Failure]:
        """What is found of each item's own nouns, best first (boxes: centre and size in 0..1); for benchmarks with rules of their own."""
        asked = [self._question(item, own) if own else None for item, own in zip(items, nouns, strict=True)]
        found = iter(self._detect([question for question in asked if isinstance(question, Question)]))
        results: list[dict[str, _grounding.Found] | Failure] = []
        for item, question in zip(items, asked, strict=True):
            if not isinstance(question, Question):
                results.append({} if question is None else question)
                continue
            by_noun = dict(zip(question.nouns, map(_grounding.best_first, next(found)), strict=True))
            results.append(self._not_finite(item, by_noun.values()) or by_noun)
        return results

    def _measure(self, items: Sequence[Item]) -> list[Score]:
        scores: dict[int, Score] = {}
        asked: dict[int, Question] = {}
        for position, item in enumerate(items):
            nouns = self._nouns(item)
            question = self._question(item, nouns) if nouns else Value(1.0, detail="the prompt names no thing")
            if isinstance(question, Question):
                asked[position] = question
            else:
                scores[position] = question
        found = self._detect(list(asked.values()))
        scores |= {position: self._judge(items[position], asked[position], boxes) for position, boxes in zip(asked, found, strict=True)}
        return [scores[position] for position in range(len(items))]

    def _nouns(self, item: Item) -> tuple[str, ...]:
        meta = item.sample.request.prompt.meta
        if "nouns" in meta:
            return tuple(str(noun) for noun in meta["nouns"] or ())
        found = _phrases.phrases(item.sample.request.prompt, self.config.parser, ())
        return tuple(dict.fromkeys(_phrases.without_determiner(phrase) for phrase in found))

    def _question(self, item: Item, nouns: tuple[str, ...]) -> Question | Failure:
        import torch

        text = caption(nouns)
        tokens = self.words(text)
        limit = self.model.config.max_text_len
        if len(tokens.input_ids) > limit:
            return Failure(
                "score", "error", f"The nouns of {item.sample.request.id} make {len(tokens.input_ids)} tokens; GroundingDINO reads {limit}."
            )
        spans = torch.zeros(len(nouns), len(tokens.input_ids))
        for row, words in enumerate(word_spans(nouns)):
            for start, end in words:
                first, last = _token(tokens, range(start, start + 3)), _token(tokens, range(end - 1, end - 4, -1))
                if first is not None and last is not None:
                    spans[row, first : last + 1] = 1
        size = detector_size((item.pixels.shape[0], item.pixels.shape[1]), self.config.resolution)
        return Question(
            resize(item.pixels, size, "pil-bilinear"), nouns, tuple(tokens.input_ids), spans / (spans.sum(-1, keepdim=True) + EPSILON)
        )

    def _detect(self, questions: Sequence[Question]) -> list[list[_grounding.Found]]:
        """Boxes and scores by noun; questions run together when caption length and image size agree, so nothing is padded."""
        import torch

        found: dict[int, list[_grounding.Found]] = {}
        like = next(self.model.parameters())
        with torch.no_grad():
            for group in buckets([(len(question.ids), question.size) for question in questions], self.config.batch_size):
                pixels = torch.cat([normalise(to_tensor(questions[at].pixels), IMAGENET_MEAN, IMAGENET_STD) for at in group])
                ids = torch.tensor([questions[at].ids for at in group], device=like.device)
                output = self.model(pixel_values=pixels.to(like.device, like.dtype), input_ids=ids, attention_mask=torch.ones_like(ids))
                for row, at in enumerate(group):
                    shares = output.logits[row, :, : ids.shape[1]].float().sigmoid().cpu()
                    scores = (questions[at].spans @ shares.T).tolist()
                    boxes = output.pred_boxes[row].float().cpu().tolist()
                    found[at] = [self._above(boxes, noun) for noun in scores]
        return [found[at] for at in range(len(questions))]

    def _above(self, boxes: Sequence[Sequence[float]], scores: Sequence[float]) -> _grounding.Found:
        # NaN scores are kept, so that broken weights surface as a failure and not as an empty picture.
        kept = [at for at, score in enumerate(scores) if not score <= self.config.threshold]
        return _grounding.Found([(*boxes[at],) for at in kept], [scores[at] for at in kept])  # type: ignore[misc]

    def _not_finite(self, item: Item, found: Iterable[_grounding.Found]) -> Failure | None:
        if all(score == score for noun in found for score in noun.scores):
            return None
        return Failure("score", "nonfinite", f"The detector's scores for {item.sample.request.id} are not finite. Are the weights sound?")

    def _judge(self, item: Item, question: Question, found: Sequence[_grounding.Found]) -> Score:
        meta, name = item.sample.request.prompt.meta, item.sample.request.id
        if (hole := self._not_finite(item, found)) is not None:
            return hole
        compat = self.config.compat
        by_noun = dict(zip(question.nouns, found, strict=True))
        if compat == "upstream":
            by_noun = {noun: item for noun, item in by_noun.items() if len(noun.strip().split(" ")) <= 2}
            by_noun |= {noun: _grounding.Found((), ()) for noun in question.nouns if noun not in by_noun}
        try:
            x, parts = _grounding.judge(by_noun, meta, question.nouns, compat, _nms)
        except _grounding.NotAsked as error:
            return Failure(
                "score", "missing", f"The metadata of {name} ask of '{error}', which is none of its nouns {list(question.nouns)}."
            )
        except (KeyError, TypeError, ValueError) as error:
            return Failure("score", "missing", f"The metadata of {name} do not describe its task '{meta.get('task_type')}': {error!r}.")
        return Value(x, parts)


def caption(nouns: Sequence[str]) -> str:
    return " . ".join(nouns) + "."


def word_spans(nouns: Sequence[str]) -> list[list[tuple[int, int]]]:
    """For each noun, where its first and its last word stand in the caption (one span when it is a single word)."""
    spans, start = [], 0
    for noun in nouns:
        words, end = noun.strip().split(" "), start + len(noun)
        spans.append([(start, end)] if len(words) == 1 else [(start, start + len(words[0])), (end - len(words[-1]), end)])
        start = end + 3
    return spans


def detector_size(size: Size, short: int) -> Size:
    """DETR's: short side to `short` unless the long one would pass 1333/800 of it; the other side is truncated."""
    low, high = min(size), max(size)
    longest = round(short * 1333 / 800)
    if high / low * short > longest:
        short = round(longest * low / high)
    height, width = size
    return (short, int(short * width / height)) if height <= width else (int(short * height / width), short)


def _token(tokens: Any, characters: range) -> int | None:
    """The token of the first of these characters that has one."""
    return next((token for at in characters if at >= 0 and (token := tokens.char_to_token(at)) is not None), None)


def _nms(boxes: Sequence[_grounding.Box], scores: Sequence[float], overlap: float) -> Sequence[int]:
    import torch

    return shim.nms(torch.tensor(boxes), torch.tensor(scores), overlap).tolist()
