"""T2I-CompBench: an image's score by its prompt's category: attributes, places in 2D and 3D, counts, actions, or three in one.

Paper: Huang et al., arXiv 2307.06350 and 2404.19148 (++); Karine-Huang/T2I-CompBench at 1b70949. By meta["category"]:

    color, shape, texture    product of BLIP-VQA's answers to the prompt's noun phrases
    spatial, 3d_spatial      two things and their meta["relation"], by detection (and depth): _compbench_rules.py
    numeracy                 kinds and numbers of meta["counts"], by detection
    non_spatial              raw cosine of CLIP ViT-B/32
    complex                  attribute score averaged with that of meta["aspects"] (spatial, action or both)

Changed: the official detector (UniDet) runs nowhere any more, so GroundingDINO is asked for the prompt's things by name: such numbers are
t2i_compbench-gdino. DPT reads 384 pixels a side where the official code gives it 480. `compat` "upstream" keeps the rules' defects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mmalign.scorers import _compbench_rules as rules
from mmalign.scorers import _depth, _grounding, _phrases, blip_vqa, clipscore, groundingdino
from mmalign.scorers._clip import Dtype
from mmalign.scorers._samples import Item, score_in_batches
from mmalign.types import Deviation, Failure, Sample, Score, Value, digest

if TYPE_CHECKING:
    import numpy as np

NEEDS = (
    "weights: Salesforce/blip-vqa-capfilt-large",
    "weights: openai/clip-vit-base-patch32",
    "weights: IDEA-Research/grounding-dino-base",
    "weights: Intel/dpt-hybrid-midas",
)
VERSION = 1
ATTRIBUTES = ("color", "shape", "texture")
DETECTED = ("spatial", "3d_spatial", "numeracy")
CATEGORIES = (*ATTRIBUTES, *DETECTED, "non_spatial", "complex")
Found = Mapping[str, _grounding.Found]


@dataclass(frozen=True)
class Config:
    """`blip`, `clip`, `detector`, `depth`: hub ids or folders (`blip` also the original .pth, with `processor` for its tokenizer).

    `threshold`: the detector's; `depth_side`, `blip_side`, `detector_side`: input sizes; `parser`: whence noun phrases come.
    """

    blip: str = "Salesforce/blip-vqa-capfilt-large"
    processor: str = "Salesforce/blip-vqa-capfilt-large"
    clip: str = "openai/clip-vit-base-patch32"
    detector: str = "IDEA-Research/grounding-dino-base"
    depth: str = "Intel/dpt-hybrid-midas"
    compat: rules.Compat = "fixed"
    threshold: float = 0.3
    parser: _phrases.Parser = "rule"
    blip_side: int | None = 480
    detector_side: int = 800
    depth_side: int = 384
    batch_size: int = 8
    dtype: Dtype = "float32"


def load(config: Config = Config(), device: str = "cpu") -> CompBench:
    """All four networks; MmalignError when one is absent."""
    common: dict[str, Any] = {"batch_size": config.batch_size, "dtype": config.dtype}
    asked = blip_vqa.Config(config.blip, config.processor, config.blip_side, config.parser, **common)
    found = groundingdino.Config(config.detector, threshold=config.threshold, resolution=config.detector_side, **common)
    return CompBench(
        config,
        blip_vqa.load(asked, device),
        clipscore.load(clipscore.Config(config.clip, **common), device),
        groundingdino.load(found, device),
        _depth.load(config.depth, config.depth_side, device, config.dtype, "t2i_compbench.depth"),
    )


class CompBench:
    """The loaded scorer. Parts: attribute, spatial and action of a complex prompt; confidences and position are in the detail."""

    name = "t2i_compbench"
    metric_name = "t2i_compbench-gdino"
    range = (-1.0, 1.0)  # the cosine's

    def __init__(self, config: Config, blip: Any, clip: Any, detector: groundingdino.GroundingDino, depth: _depth.DepthModel) -> None:
        self.config, self.blip, self.clip, self.detector, self.depth = config, blip, clip, detector, depth
        self.fingerprint = digest(
            *("t2i_compbench", VERSION, config.compat, config.depth_side),
            *(model.fingerprint for model in (blip, clip, detector, depth)),
        )
        self.deviations: tuple[Deviation, ...] = (
            Deviation("t2i_compbench.detector", "UniDet (RS200 and R50)", config.detector, "another detector: t2i_compbench-gdino"),
            Deviation("t2i_compbench.depth", "DPT-hybrid at 480 x 480", f"{config.depth} at {config.depth_side}", "other input size"),
            *(
                []
                if config.parser == "spacy"
                else [Deviation("t2i_compbench.parser", "spaCy en_core_web_sm", "rule", "other noun phrases")]
            ),
        )

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One value or failure per sample, in order."""
        return score_in_batches(samples, max(1, len(samples)), self._measure)

    def _measure(self, items: Sequence[Item]) -> list[Score]:
        aspects = [_aspects(item) for item in items]
        found: dict[str, dict[int, Score]] = {}
        measures = {"attribute": self._attributes, "action": self._actions, "spatial": self._places, "numeracy": self._counts}
        for name, measure in measures.items():
            own = [at for at, some in enumerate(aspects) if not isinstance(some, Failure) and name in some]
            found[name] = dict(zip(own, measure([items[at] for at in own]), strict=True)) if own else {}
        return [some if isinstance(some, Failure) else _joined({name: found[name][at] for name in some}) for at, some in enumerate(aspects)]

    def _attributes(self, items: Sequence[Item]) -> list[Score]:
        return self.blip.score([item.sample for item in items])

    def _actions(self, items: Sequence[Item]) -> list[Score]:
        return self.clip.score([item.sample for item in items])

    def _places(self, items: Sequence[Item]) -> list[Score]:
        found = self.detector.find(items, [tuple(dict.fromkeys(_meta(item)["pair"])) for item in items])
        deep = [at for at, item in enumerate(items) if _meta(item)["relation"] in rules.FRONT + rules.BACK]
        frames = [rules.frame(*item.pixels.shape[:2]) for item in items]
        maps = dict(zip(deep, self.depth.maps([items[at].pixels for at in deep], [frames[at] for at in deep]), strict=True))
        return [
            things if isinstance(things, Failure) else self._place(_meta(item), things, frames[at], maps.get(at))
            for at, (item, things) in enumerate(zip(items, found, strict=True))
        ]

    def _place(
        self, meta: Mapping[str, Any], found: Mapping[str, _grounding.Found], frame: tuple[int, int], map_HW: np.ndarray | None
    ) -> Value:
        if not meta["relation"]:
            return Value(0.0, detail="the prompt names no relation")
        first, second = (_thing(found[name], frame) for name in meta["pair"])

        def depth(rows: slice, columns: slice) -> float:
            assert map_HW is not None
            part = map_HW[rows, columns]
            return float(part.mean()) if part.size else float("nan")

        score = rules.pair_score(meta["relation"], first, second, self.config.compat, depth)
        words = [f"{name} {thing.score:.2f}" if thing else f"no {name}" for name, thing in zip(meta["pair"], (first, second), strict=True)]
        return Value(score, detail=", ".join(words))

    def _counts(self, items: Sequence[Item]) -> list[Score]:
        wanted = [[(str(name), int(number)) for name, number in _meta(item)["counts"]] for item in items]
        found = self.detector.find(items, [tuple(dict.fromkeys(name for name, _ in some)) for some in wanted])
        scores: list[Score] = []
        for item, some, things in zip(items, wanted, found, strict=True):
            if isinstance(things, Failure):
                scores.append(things)
                continue
            frame = rules.frame(*item.pixels.shape[:2])
            numbers = [len(rules.distinct([_box(box, frame) for box in things[name].boxes])) for name, _ in some]
            words = ", ".join(f"{number} {name}" for number, (name, _) in zip(numbers, some, strict=True))
            scores.append(Value(rules.count_score(some, numbers), detail=words))
        return scores


def _meta(item: Item) -> Mapping[str, Any]:
    return item.sample.request.prompt.meta


def _aspects(item: Item) -> tuple[str, ...] | Failure:
    """What of an image is measured; a Failure when the prompt's metadata do not say."""
    meta, name = _meta(item), item.sample.request.prompt.id
    category = meta.get("category")
    own = {"spatial": ("spatial",), "3d_spatial": ("spatial",), "numeracy": ("numeracy",), "non_spatial": ("action",)}
    if category in ATTRIBUTES:
        return ("attribute",)
    found = ("attribute", *meta.get("aspects", ())) if category == "complex" else own.get(str(category), ())
    if not found or not set(found) <= {"attribute", "spatial", "action", "numeracy"} or found == ("attribute",):
        return Failure("score", "missing", f"The prompt {name} names no category of T2I-CompBench in its metadata; got {category!r}.")
    if "spatial" in found and ("relation" not in meta or len(meta.get("pair", ())) != (2 if meta["relation"] else 0)):
        return Failure("score", "missing", f"The metadata of the prompt {name} do not say which two things stand in which relation.")
    if "numeracy" in found and not meta.get("counts"):
        return Failure("score", "missing", f"The metadata of the prompt {name} count nothing.")
    return found


def _joined(scores: Mapping[str, Score]) -> Score:
    """One aspect's score as it is; several as their mean, with the aspects as parts."""
    hole = next((score for score in scores.values() if isinstance(score, Failure)), None)
    if hole is not None:
        return hole
    values = {name: score for name, score in scores.items() if isinstance(score, Value)}
    if len(values) == 1:
        (value,) = values.values()
        return replace(value, parts={}, detail=value.detail or ", ".join(f"{name} {part:.4g}" for name, part in value.parts.items()))
    detail = "; ".join(value.detail for value in values.values() if value.detail)
    return Value(sum(value.x for value in values.values()) / len(values), {name: value.x for name, value in values.items()}, detail=detail)


def _thing(found: _grounding.Found, frame: tuple[int, int]) -> rules.Thing | None:
    return rules.Thing(_box(found.boxes[0], frame), found.scores[0]) if found.boxes else None


def _box(box: _grounding.Box, frame: tuple[int, int]) -> rules.Box:
    """Corners in the frame's pixels of a centre and size in 0..1."""
    x0, y0, x1, y1 = _grounding.corners(box)
    height, width = frame
    return x0 * width, y0 * height, x1 * width, y1 * height
