"""GvU's claims about what training with its own understanding changes: one run of `mmalign train gvu`, seen from several sides."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from statistics import fmean

from mmalign.leaderboards.measures.gvu import model

from mmalign.history import read_metrics
from mmalign.testbed.measure import caption_ranking
from mmalign.types import MmalignError

EDGE = 10  # steps at the beginning and at the end that are compared
MIXED = ("color_count_attr", "spatial_count_attr", "color_spatial_attr", "size_spatial_attr", "multi_object_count_attr")
KINDS = {
    "mixed": tuple(f"pp_{kind}" for kind in MIXED),
    "single": ("single_object", "counting", "colors", "position"),
    "plus": ("pp_color_attr", "pp_counting", *(f"pp_{kind}" for kind in MIXED)),
    "dense": ("dense_3", "dense_4", "dense_5", "dense_6"),
}


@cache
def scratch() -> Path:
    """Where the base's results stay while this program runs, so that it is evaluated once."""
    return Path(tempfile.mkdtemp(prefix="mmalign-gvu-"))


def trained(seed: int, steps: int = 60, name: str = "tiny-janus", pairs: int = 600) -> dict[str, float]:
    """Before and after so many steps: strict rates on the suite `shapes`, of all prompts and by groups of kinds (gains of `KINDS`), the
    reward of the first and the last steps, and how often the true caption is ranked first."""
    run = scratch() / f"run-{seed}-{steps}"
    words = ["train", "gvu", "--model", name, "--steps", str(steps), "--seed", str(seed), "--panel-every", "0", "--image-every", "0"]
    words += ["--then-eval", "shapes", "--results", str(scratch() / "results"), "--run-dir", str(run), "--json"]
    done = subprocess.run([sys.executable, "-m", "mmalign", *words], capture_output=True, text=True)
    if done.returncode:
        raise MmalignError(f"`mmalign {' '.join(words)}` ended with {done.returncode}: {done.stderr.strip()[-600:]}")
    before, after = _metrics(scratch() / "results" / name), _metrics(scratch() / "results" / run.name)
    rewards = [line["reward"] for line in read_metrics(run) if "reward" in line]
    return {
        "base": before["strict"],
        "trained": after["strict"],
        **{f"gain on {group}": fmean(after[kind] - before[kind] for kind in kinds) for group, kinds in KINDS.items()},
        "first reward": fmean(rewards[:EDGE]),
        "last reward": fmean(rewards[-EDGE:]),
        "captions before": caption_ranking(model(name), pairs, seed),
        "captions after": caption_ranking(model(str(run / "model")), pairs, seed),
    }


def _metrics(folder: Path) -> dict[str, float]:
    (file,) = (folder / "shapes").glob("*.json")
    return {key: metric["value"] for key, metric in json.loads(file.read_text(encoding="utf-8"))["metrics"].items()}
