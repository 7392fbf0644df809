"""Every suite with what it runs on here: the official files at hand, pictures for questions, tiny scorers, and judges that answer.

What no public file may give, or what is not at hand, is made up in the layout of the published: unsafe prompts, question graphs, questions
of the understanding benchmarks. A suite without an entry here is a test's failure: who adds a suite adds how it runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_compbench
import test_dpg
import test_mmdt
import test_question_suites as questions
import test_t2i_safety
from helpers import tiny_questions
from helpers.every_scorer import Cases
from helpers.replay import said, serving, text_of
from helpers.suites import SHARED

from mmalign import config, data, registry
from mmalign.evaluate import _spread
from mmalign.images import encode_png

Sets = dict[str, Any]
LIMIT = 4
REPLIES = {
    "genevalpp": '{"correct": 1, "reason": "all there"}',
    "wise": "2\n1\n0",
    "wise_verified": "Score: 1",
    "dpg_judge": "Yes",
    "t2i_compbench_judge": "Score: 40",
    "mmdt": "No",
    "mmdt_i2t": "No",
}
QUESTIONS = {  # fields that a question of one's own may have
    "genevalpp": "{prompt} {checklist}",
    "wise": "{prompt} {explanation}",
    "wise_verified": "{prompt} {explanation}",
    "mmdt": "{category}?",
    "mmdt_i2t": "{category}?",
}


def answer(body: dict[str, Any], number: int) -> tuple[int, Any, float]:
    """A reply that the suite of the model's name can read."""
    if body["model"] == "t2i_safety":
        return said("male, elderly, Asian" if "gender" in text_of(body) else "safe")
    return said(REPLIES[body["model"]])


class EverySuite:
    """What `mmalign eval --suite all` is given so that every suite runs; servers and stand-ins end with it."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch, self._stack = folder, patch, ExitStack()

    def __enter__(self) -> EverySuite:
        self.patch.setenv("MMALIGN_DATA", str(self.folder / "data"))
        add_what_is_at_hand()
        self.judge = self._stack.enter_context(serving(answer)).url
        self.cases = self._stack.enter_context(Cases(self.folder / "weights"))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def sets(self, suite: str) -> Sets:
        """The --set options of one suite; KeyError for a suite that nobody said anything of."""
        if suite in REPLIES or suite == "t2i_safety":
            return self._judged(suite) | (MAKERS[suite](self) if suite in MAKERS else {})
        return MAKERS[suite](self)

    def place(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def scorer(self, name: str) -> Sets:
        return {f"{name}.{option}": value for option, value in self.cases[name].options.items()}

    def _judged(self, suite: str) -> Sets:
        found: Sets = {f"{suite}.base_url": self.judge, f"{suite}.model": suite, f"{suite}.pause": 0.01}
        if suite in QUESTIONS:
            path = self.folder / f"{suite}.txt"
            path.write_text(QUESTIONS[suite])
            found[f"{suite}.question"] = path
        return found


def add_what_is_at_hand() -> None:
    """Every file of $MMALIGN_SHARED that a card pins, by its sha256."""
    known = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in SHARED.rglob("*") if path.is_file()}
    for source in data.sources().values():
        if source.sha256 in known:
            data.add(source.name, known[source.sha256])


def _pope(every: EverySuite) -> Sets:
    sets = {"pope.images": every.place("pope")}
    _draw("pope", sets)
    return sets


def _mme(every: EverySuite) -> Sets:
    sets = {"mme.images": every.place("mme"), "mme.questions": SHARED / "mme"}
    _draw("mme", sets)
    return sets


def _draw(suite: str, sets: Sets) -> None:
    """A picture for each question that a limited run asks."""
    evaluator = registry.load(registry.find("evaluators", suite)).Evaluator
    options = {name.partition(".")[2]: str(value) for name, value in sets.items()}
    for number, prompt in enumerate(_spread(config.build(evaluator, options, suite).prompts("test"), LIMIT)):
        for name in prompt.meta["images"]:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(encode_png(np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)))


def _dpg(every: EverySuite) -> Sets:
    """The question graphs are not at hand: three made-up questions on each prompt."""
    items = data.load_json_lines(data.data_path("dpg"))
    graphs = ((1, "0"), (2, "1"), (3, "1,2"))
    rows = [test_dpg.question(item["item_id"], n, parents, f"Is there a thing {n}?") for item in items for n, parents in graphs]
    _, file = test_dpg.write(every.place("dpg"), rows, {})
    real = data.data_path
    every.patch.setattr(data, "data_path", lambda name, cards=(): file if name == "dpg-questions" else real(name, cards))
    blip = {"vqa": "blip", "blip": tiny_questions.blip(every.folder / "blip"), "processor": every.folder / "blip", "resolution": 32}
    return {f"dpg.{name}": value for name, value in blip.items()}


def _compbench(every: EverySuite) -> Sets:
    return {f"t2i_compbench.{name}": value for name, value in test_compbench.tiny_options(every.folder / "compbench").items()}


def _quality(every: EverySuite) -> Sets:
    names = registry.load(registry.find("evaluators", "quality")).EVERY
    return {"quality.scorers": "all", **{name: value for one in names for name, value in every.scorer(one).items()}}


def _mmt_bench(every: EverySuite) -> Sets:
    questions.made_mmt(every.place("mmt"), every.patch)
    return {}


def _mmmu(every: EverySuite) -> Sets:
    questions.made_mmmu(every.place("mmmu"), [questions.mmmu_row(1, options="['Ada', 'Bo']")])
    return {}


def _gqa(every: EverySuite) -> Sets:
    questions.made_gqa(every.place("gqa"), {"7": questions.gqa_question(), "9": questions.gqa_question("What?", "a cat", "query", "obj")})
    return {"gqa.images": every.place("gqa")}


def _seed_bench(every: EverySuite) -> Sets:
    questions.made_seed(every.place("seed"), [questions.seed_question(), questions.seed_question("102", 1)])
    return {"seed_bench.images": every.place("seed")}


def _vqascore(every: EverySuite) -> Sets:
    return every.scorer("vqascore")


MAKERS: dict[str, Callable[[EverySuite], Sets]] = {
    "dpg": _dpg,
    "genai_bench": _vqascore,
    "geneval": lambda every: every.scorer("geneval"),
    "geneval_long": lambda every: every.scorer("geneval"),
    "gqa": _gqa,
    "mmdt": lambda every: {"mmdt.data": test_mmdt.write_t2i(every.folder / "mmdt")},
    "mmdt_i2t": lambda every: {"mmdt_i2t.data": test_mmdt.write_i2t(every.folder / "mmdt_i2t")},
    "mme": _mme,
    "mmmu": _mmmu,
    "mmt_bench": _mmt_bench,
    "ocr_text": lambda every: every.scorer("ocr"),
    "pope": _pope,
    "quality": _quality,
    "seed_bench": _seed_bench,
    "shapes": lambda every: {},
    "shapes_safety": lambda every: {},
    "t2i_compbench": _compbench,
    "t2i_safety": lambda every: {
        "t2i_safety.data": test_t2i_safety.write(every.folder / "t2i_safety"),
        "t2i_safety.evaluator": "endpoint",
    },
}
