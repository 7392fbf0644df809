"""A mid-quality corpus of the shapes world: `python -m mmalign.testbed.pairs --out DIR --number N --wrong 0.2 --questions M`.

DIR receives pictures, `pairs.jsonl` (each picture with its prompt; in a share of them one thing is wrong) and, in `questions/`, right
questions and answers about right pictures. Train with --data DIR, and with --questions DIR/questions to keep the understanding.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from mmalign.images import encode_png
from mmalign.testbed import corpus
from mmalign.testbed.render import render
from mmalign.testbed.world import Scene

SEED = 8_000_000  # streams that no shipped checkpoint was built from


def write_pairs(folder: Path, number: int, wrong: float = 0.2, seed: int = 0) -> Path:
    """Writes that many pictures with prompts of the train split, a share `wrong` of them spoiled in one thing; returns pairs.jsonl."""
    drawings = corpus.drawings(SEED + seed, number, wrong, planned=0.0, arranged=True)
    rows = [{"text": drawing.text} for drawing in drawings]
    return _write(folder / "pairs.jsonl", [drawing.scene for drawing in drawings], rows)


def write_questions(folder: Path, number: int, seed: int = 0) -> Path:
    """Writes that many right questions and answers about right pictures; returns questions.jsonl."""
    asked = corpus.questions(SEED + seed, number)
    rows = [{"question": item.question, "answer": item.answer} for item in asked]
    return _write(folder / "questions.jsonl", [item.scene for item in asked], rows)


def _write(file: Path, scenes: Sequence[Scene], rows: Sequence[dict[str, str]]) -> Path:
    (file.parent / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (picture, row) in enumerate(zip(render(scenes), rows, strict=True)):
        name = f"images/{index:06d}.png"
        (file.parent / name).write_bytes(encode_png(picture))
        lines.append(json.dumps({"image": name, **row}) + "\n")
    file.write_text("".join(lines), encoding="utf-8")
    return file


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mmalign.testbed.pairs", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--number", type=int, default=4000, metavar="N", help="pictures with prompts")
    parser.add_argument("--wrong", type=float, default=0.2, metavar="SHARE", help="share of pictures with one thing wrong")
    parser.add_argument("--questions", type=int, default=0, metavar="M", help="questions with answers; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(argv)
    made = [write_pairs(chosen.out, chosen.number, chosen.wrong, chosen.seed)]
    if chosen.questions:
        made.append(write_questions(chosen.out / "questions", chosen.questions, chosen.seed))
    print("written: " + ", ".join(map(str, made)))  # noqa: T201


if __name__ == "__main__":
    main()
