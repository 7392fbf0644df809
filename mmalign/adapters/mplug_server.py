"""mPLUG-large VQA in its own environment, for `mmalign serve`; the scorer `dpg` is its client.

Recipe (one GPU with 8 GB; ModelScope's requirements are its own). mmalign itself is installed without its dependencies:

    python3.10 -m venv mplug && . mplug/bin/activate
    pip install "modelscope[multi-modal]" "torch<2.2" "transformers<4.40" pillow
    pip install --no-deps mmalign && pip install pyyaml rich
    python -m mmalign serve --plug $(python -c "import mmalign.adapters as a; print(a.__path__[0])")/mplug_server.py \\
        --scorers mplug_server --device cuda --port 8193

The pipeline is the one that ELLA's dpg_bench calls. Parts are the answers by question, 1 for exactly "yes"; the value is their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmalign.types import Failure, Sample, Score, Value, digest

NEEDS = ("environment: mmalign/adapters/mplug_server.py",)
VERSION = 1


@dataclass(frozen=True)
class Config:
    """`model`: ModelScope's name or a folder; `revision`: of it."""

    model: str = "damo/mplug_visual-question-answering_coco_large_en"
    revision: str = "master"


def load(config: Config = Config(), device: str = "cuda") -> MplugServer:
    from modelscope.pipelines import pipeline
    from modelscope.utils.constant import Tasks

    place = "gpu" if device.startswith("cuda") else "cpu"
    answer = pipeline(Tasks.visual_question_answering, model=config.model, model_revision=config.revision, device=place)
    return MplugServer(config, answer)


class MplugServer:
    """The loaded pipeline."""

    name = "mplug_server"
    range = (0.0, 1.0)

    def __init__(self, config: Config, answer: Any) -> None:
        self._answer = answer
        self.fingerprint = digest("mplug_server", VERSION, config.model, config.revision)

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """The answers to each sample's questions (meta["questions"]), in order."""
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> Score:
        from PIL import Image

        questions = sample.request.prompt.meta.get("questions")
        if sample.image is None or not questions:
            return Failure("score", "missing", "the sample holds no image, or its prompt no questions")
        picture = Image.fromarray(sample.image)
        said = {f"q{one['number']}": self._answer({"image": picture, "question": one["text"]})["text"] for one in questions}
        parts = {name: float(text == "yes") for name, text in said.items()}
        return Value(sum(parts.values()) / len(parts), parts, detail=" | ".join(said.values()))
