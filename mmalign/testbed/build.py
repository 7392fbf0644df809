"""Builds the testbed's checkpoints: `python -m mmalign.testbed.build janus clip preference mmada showo sd3 [--work DIR] [--out DIR]`.

Each build is seeded and resumes where it was stopped; logs and state stay in the work folder, the checkpoint goes to --out/tiny-<name>.
"""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

BUILDS = ("janus", "clip", "preference", "mmada", "showo", "sd3")
CHECKPOINTS = Path(__file__).parent / "checkpoints"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mmalign.testbed.build", description=__doc__)
    parser.add_argument("names", nargs="+", choices=BUILDS)
    parser.add_argument("--work", type=Path, default=Path("build/testbed"), help="training state and logs")
    parser.add_argument("--out", type=Path, default=CHECKPOINTS, help="folder that receives tiny-<name>")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args(argv)

    import torch

    torch.set_num_threads(arguments.threads)
    for name in arguments.names:
        recipe = importlib.import_module(f"mmalign.testbed.build_{name}")
        recipe.build(arguments.out / f"tiny-{name}", arguments.work / name)
        print(f"tiny-{name} written to {arguments.out / f'tiny-{name}'}")  # noqa: T201


if __name__ == "__main__":
    main()
