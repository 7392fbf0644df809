"""T2I-CompBench by a VLM judge: how well an image shows what its prompt's category is about, rated 0 to 100 (here 0 to 1).

The kind of protocol that SeGroS (arXiv 2603.19807) and RecA (arXiv 2509.07295) report: T2I-CompBench's prompts, one image each, rated by
Qwen2.5-VL-32B. Neither publishes its question, so this one is ours, and numbers are comparable among themselves alone. The question names
the prompt and the aspect that its category tests; a reply without a rating is asked for again and then is a failure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mmalign.judge import Question
from mmalign.scorers import _official
from mmalign.scorers._judged import Judged, JudgeOptions
from mmalign.scorers._samples import Item
from mmalign.types import Failure, Value

NEEDS = ("endpoint",)
VERSION = 1
ASPECTS = {
    "color": "every object has the colour that the prompt gives it",
    "shape": "every object has the shape that the prompt gives it",
    "texture": "every object has the texture or material that the prompt gives it",
    "spatial": "the objects stand to each other in the image plane as the prompt says",
    "3d_spatial": "the objects stand in front of, behind or hidden by each other as the prompt says",
    "numeracy": "every kind of object is there in exactly the number that the prompt gives",
    "non_spatial": "the persons and objects do what the prompt says, with or to each other",
    "complex": "all objects are there with all their attributes and relations",
}
OWN = _official.Template(
    (
        "This image was made from the prompt below. Judge one thing only: whether ",
        "aspect",
        ". All objects of the prompt must be there; beauty and realism do not count.\n\nPrompt: ",
        "prompt",
        "\n\nGive a whole number from 0 (nothing of it) through 50 (half of it) to 100 (all of it, without a flaw), on a line of the form\n"
        "Score: NUMBER",
    )
)
SCORE = re.compile(r"score\W{0,6}(\d{1,3}(?:\.\d+)?)(?!\d)", re.IGNORECASE)
BARE = re.compile(r"\W*(\d{1,3}(?:\.\d+)?)\W*")
HIGHEST = 100.0


@dataclass(frozen=True)
class Config(JudgeOptions):
    """`question`: "official" is our wording, or a text file with {prompt} and {aspect}."""

    model: str = "Qwen/Qwen2.5-VL-32B-Instruct"
    base_url: str = "http://127.0.0.1:8000/v1"
    max_tokens: int = 256


def load(config: Config = Config(), device: str = "cpu") -> Judged:
    """The device is the judge's."""
    is_own = config.question != "official"
    wording = _official.own(Path(config.question).expanduser(), ("prompt", "aspect"), "t2i_compbench_judge.question") if is_own else OWN

    def ask(item: Item) -> Mapping[str, Question] | Failure:
        prompt = item.sample.request.prompt
        aspect = ASPECTS.get(str(prompt.meta.get("category")))
        if aspect is None:
            return Failure("score", "missing", f"The prompt {prompt.id} names no category of T2I-CompBench in its metadata.")
        return {"rating": Question(wording.fill({"prompt": prompt.text, "aspect": aspect}), (item.pixels,))}

    def value(item: Item, said: Mapping[str, float]) -> Value:
        return Value(said["rating"] / HIGHEST)

    return Judged("t2i_compbench_judge", VERSION, config, wording, ask, rating_of, value)


def rating_of(text: str) -> float:
    """The rating that a reply gives: the last after the word score, or the reply itself. ValueError for none, or one above 100."""
    labelled, bare = SCORE.findall(text), BARE.fullmatch(text)
    if not labelled and bare is None:
        raise ValueError("it gives no score")
    rating = float(labelled[-1] if labelled or bare is None else bare[1])
    if rating > HIGHEST:
        raise ValueError(f"its score {rating:g} is above 100")
    return rating
