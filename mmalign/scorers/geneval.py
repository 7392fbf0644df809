"""GenEval: objects, counts, colours and positions by Mask2Former and CLIP; official, strict and soft verdicts.

Paper: Ghosh et al., arXiv 2310.11513. Code: djghosh13/geneval at af4902f; soft and strict forms: yifan123/reward-server at 92ac29f.
The official detector is one mmdet checkpoint (`_mmdet.OFFICIAL_FILE`): give its path as `detector` and the metric may be called GenEval.
With any other detector, the default included, `metric_name` is "geneval-hf" and `deviations` says why: the thresholds are not calibrated
for it. Expected with the official one: SD 1.5 0.43, SD 2.1 0.50, SDXL 0.55 (mean of the six tasks).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mmalign.scorers._geneval_verdict import Compat, Detection, check_metadata, keep, soft_verdict, verdict
from mmalign.types import Deviation, Failure, MmalignError, Sample, Score, Value, digest

NEEDS = ("weights: facebook/mask2former-swin-small-coco-instance", "weights: openai/clip-vit-large-patch14")
VERSION = 2  # raise it with any change that can change a value

# COCO's 80 classes in the detector's order, with the three names that GenEval changed (computer mouse, tv remote, computer keyboard).
NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,bench,bird,cat,"
    "dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,"
    "baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,"
    "sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,"
    "computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,"
    "teddy bear,hair drier,toothbrush"
)
CLASSES = tuple(NAMES.split(","))

Colours = dict[tuple[str, int], "list[str] | FloatingPointError"]  # class and number of objects -> their colours


@dataclass(frozen=True)
class Config:
    """Options. `detector`: hub id, folder or mmdet's .pth; `rule`: which verdict is the value; `clamp` and `compat` shape the soft one.

    `resolution`: short side of the detector's input (its long side is at most 5/3 of it); a smaller one is a cheaper, different reward.
    """

    detector: str = "facebook/mask2former-swin-small-coco-instance"
    clip: str = "openai/clip-vit-large-patch14"
    rule: Literal["official", "strict", "soft"] = "official"
    clamp: bool = False
    compat: Compat = "upstream"
    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    position_threshold: float = 0.1
    resolution: int = 800
    batch_size: int = 8
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        if not (0 < self.threshold < 1 and 0 < self.counting_threshold < 1):
            raise ValueError(f"thresholds lie between 0 and 1, got {self.threshold} and {self.counting_threshold}")
        if self.resolution < 32:
            raise ValueError(f"resolution is at least 32, got {self.resolution}")
        if self.batch_size < 1 or self.max_objects < 1:
            raise ValueError(f"batch_size and max_objects are at least 1, got {self.batch_size} and {self.max_objects}")


def load(config: Config, device: str = "cpu") -> GenEval:
    """The scorer with both networks on `device`; MmalignError when one is absent, damaged or of another kind."""
    from transformers import Mask2FormerForUniversalSegmentation

    from mmalign.scorers import _mask2former, _mmdet
    from mmalign.scorers._clip_colour import ColourClassifier
    from mmalign.scorers._whole import load_whole

    path = Path(config.detector).expanduser()
    if path.is_file():
        detector, official = _mmdet.load_checkpoint(path, device, config.dtype), _mmdet.is_official(path)
    else:
        network = Mask2FormerForUniversalSegmentation
        detector = load_whole(network, config.detector, device, config.dtype, "geneval.detector", _mask2former.MAY_LACK)
        official = False
    if detector.config.num_labels != len(CLASSES):
        raise MmalignError(
            f"The GenEval detector '{config.detector}' knows {detector.config.num_labels} classes; expected COCO's {len(CLASSES)} things. "
            f"A panoptic or ADE20k checkpoint cannot be used: take a '-coco-instance' one."
        )
    return GenEval(config, detector, ColourClassifier(config.clip, device, config.dtype), official)


class GenEval:
    """The loaded scorer. A value's parts hold all three verdicts (correct, strict, soft) whichever is its `x`; its detail says what failed.

    A prompt's `meta` is a line of GenEval's metadata (tag, include, exclude). An image's value depends on that image and prompt alone.
    """

    name = "geneval"

    def __init__(self, config: Config, detector: Any, colours: Any, official_detector: bool) -> None:
        from mmalign.scorers._weights import fingerprint_tensors, fingerprint_tokenizer

        self.config, self.detector, self.colours = config, detector, colours
        self.deviations = _deviations(config, official_detector, colours.is_official)
        self.metric_name = "geneval" if official_detector else "geneval-hf"
        self.range = (0.0, 1.0) if config.rule != "soft" or config.clamp else (2.0 - config.max_objects, 1.0)
        settings = {key: value for key, value in asdict(config).items() if key not in ("detector", "clip", "batch_size")}
        self.fingerprint = digest(
            "geneval", VERSION, settings, fingerprint_tensors(detector, colours.model), fingerprint_tokenizer(colours.tokenizer)
        )

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One value or failure per sample, in order."""
        from mmalign.scorers._mask2former import detect
        from mmalign.scorers._samples import image_of

        scores: dict[int, Score] = {}
        images: dict[int, Any] = {}
        for index, sample in enumerate(samples):
            problem = check_metadata(sample.request.prompt.meta, CLASSES)
            if problem:
                scores[index] = Failure("score", "error", f"Prompt {sample.request.prompt.id}: {problem}.")
            elif isinstance(image := image_of(sample), Failure):
                scores[index] = image
            else:
                images[index] = image
        floor = min(self.config.threshold, self.config.counting_threshold)
        found = detect(self.detector, list(images.values()), self.config.batch_size, floor, self.config.resolution)
        detections: dict[int, Mapping[str, Sequence[Detection]]] = {}
        for index, objects in zip(images, found, strict=True):
            if isinstance(objects, FloatingPointError):
                scores[index] = Failure("score", "nonfinite", f"{objects}.")
            else:
                detections[index] = self._select(objects, samples[index].request.prompt.meta["tag"])
        colours = self._colours(images, detections, samples)
        for index, things in detections.items():
            scores[index] = self._judge(things, samples[index].request.prompt.meta, colours[index])
        return [scores[index] for index in range(len(samples))]

    def _select(self, objects: Sequence[Any], tag: str) -> dict[str, list[Detection]]:
        config = self.config
        return select(objects, tag, config.threshold, config.counting_threshold, config.max_objects)

    def _colours(
        self, images: Mapping[int, Any], detections: Mapping[int, Mapping[str, Sequence[Detection]]], samples: Sequence[Sample]
    ) -> dict[int, Colours]:
        """By image the colours of every group that a verdict may ask for; one run of the classifier for the crops of all images."""
        from mmalign.scorers._clip_colour import Group

        keys = [
            (index, name, count)
            for index, things in detections.items()
            for name, count in groups_asked(things, samples[index].request.prompt.meta)
        ]
        groups = [Group(images[index], name, detections[index][name][:count]) for index, name, count in keys]
        found: dict[int, Colours] = {index: {} for index in detections}
        for (index, name, count), colours in zip(keys, self.colours.colours(groups), strict=True):
            found[index][name, count] = colours
        return found

    def _judge(self, detections: Mapping[str, Sequence[Detection]], metadata: Mapping[str, Any], colours: Colours) -> Score:
        config = self.config

        def colours_of(name: str, group: Sequence[Detection]) -> list[str]:
            known = colours[name, len(group)]  # a group is always the best few of its class
            if isinstance(known, FloatingPointError):
                raise known
            return known

        try:
            correct, reason = verdict(detections, metadata, colours_of, config.position_threshold)
            soft = soft_verdict(detections, metadata, colours_of, config.position_threshold, config.compat, config.clamp)
        except FloatingPointError as error:
            return Failure("score", "nonfinite", f"{error}.")
        parts = {"correct": float(correct), "strict": float(soft.correct), "soft": soft.soft}
        chosen = {"official": "correct", "strict": "strict", "soft": "soft"}[config.rule]
        return Value(parts[chosen], parts, detail=reason if config.rule == "official" else soft.reason)


def groups_asked(detections: Mapping[str, Sequence[Detection]], metadata: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Class and number of objects of every group whose colours the verdicts may ask for: clauses with a colour whose count holds."""
    clauses = [clause for clause in metadata["include"] if "color" in clause]
    asked = [(clause["class"], clause["count"]) for clause in clauses if len(detections.get(clause["class"], ())) >= clause["count"]]
    return list(dict.fromkeys(asked))


def select(objects: Sequence[Any], tag: str, threshold: float, counting_threshold: float, limit: int) -> dict[str, list[Detection]]:
    """Class name -> objects above the tag's threshold (counting has its own, for every class), best first, at most `limit`."""
    by_class: dict[int, list[Detection]] = {}
    for item in objects:
        by_class.setdefault(item.label, []).append(item.detection)
    least = counting_threshold if tag == "counting" else threshold
    kept = {}
    for label, group in sorted(by_class.items()):
        chosen = keep([detection.score for detection in group], least, limit)
        if chosen:
            kept[CLASSES[label]] = [group[index] for index in chosen]
    return kept


def _deviations(config: Config, official_detector: bool, official_clip: bool) -> tuple[Deviation, ...]:
    """What the options alone do not show: whose weights these are. Changed options are recorded by the core."""
    from mmalign.scorers._mmdet import OFFICIAL_FILE

    found = []
    if not official_detector:
        why = "other weights, for which the thresholds 0.3 and 0.9 are not calibrated: report as geneval-hf"
        found.append(Deviation("geneval.detector", OFFICIAL_FILE, config.detector, why))
    if not official_clip:
        found.append(Deviation("geneval.clip", "OpenAI ViT-L/14", config.clip, "another colour classifier"))
    return tuple(found)
