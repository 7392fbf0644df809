"""Score a folder of images with any scorers: a table here, every value in a Parquet file, a page to look at."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmalign.options import add_worker_options
from mmalign.screen import Screen, columns
from mmalign.verbs import COMPLETE, INCOMPLETE, Run


def declare(parser: argparse.ArgumentParser) -> Run:
    what = parser.add_argument_group("what")
    what.add_argument("--images", required=True, type=Path, metavar="DIR", help="images, in this folder or below it")
    what.add_argument("--prompts", type=Path, metavar="FILE", help=".txt (a line per image), .json or .jsonl (by image name)")
    what.add_argument("--scorers", required=True, metavar="NAME[,NAME]", help="as `mmalign ls scorers` lists them")
    what.add_argument("--set", action="append", default=[], metavar="SCORER.OPTION=VALUE", help="an option of a scorer")
    what.add_argument("--out", type=Path, metavar="FILE", help="the Parquet file (default: scores.parquet in the folder)")
    what.add_argument("--attribution", metavar="TOOL", help="also draw what earned each score (fast_shap, shap, gradcam, ...)")
    add_worker_options(parser.add_argument_group("how (none of it changes a number)"))

    def run(options: argparse.Namespace, screen: Screen) -> int:
        from mmalign import jobs, scoring
        from mmalign.score_report import write_score_report

        recipes = jobs.scorer_recipes(options)
        with screen.progress() as show:
            scores = scoring.score_folder(
                options.images,
                options.prompts,
                recipes,
                jobs.executor(options),
                options.batch_size,
                lambda name, done, total: show(name, f"score {name}", done, total),
            )
        out = options.out or options.images / "scores.parquet"
        scoring.write_parquet(scores, out)
        found = scores.summary()
        for text in columns([list(found[0]), *([scoring.cell(value) for value in line.values()] for line in found)]):
            screen.say(text)
        screen.say(f"{len(scores.rows)} images, every value in {out}")
        tool, device = options.attribution, jobs.devices(options.device)[0]
        folder = out.with_suffix(scoring.FOLDER)
        maps = scoring.write_maps(scores, recipes, tool, device, folder / "maps") if tool else {}
        if maps:
            screen.say(f"{len(maps)} maps in {folder / 'maps'}")
        page = write_score_report(scores, folder, maps, tool or "")
        screen.say(f"report: {page}")
        screen.give({"scorers": found, "file": out, "maps": list(maps.values()), "report": page})
        return INCOMPLETE if scores.failures else COMPLETE

    return run
