"""Every attribution tool side by side on tiny-clip: `python tests/bench_attribution.py [reference | table | tower]`.

`reference` makes tests/data/attribution_reference.npz: pictures of the shapes world that no training saw, their prompts, and the long
reference maps of both games. `table` runs all tools on them and writes the table of docs/attribution.md. `tower` times fast_shap against
the package on an HPSv2-sized image tower with random weights, on a GPU when there is one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from helpers.shap_package import explain_grid, image_explainer

from mmalign.attribution import Amortised, AmortisedHead, Attribution, BlurGame, DropGame, FastShap, Lime, Shap, attribute
from mmalign.attribution.fast_shap import VARIANTS
from mmalign.attribution.maps import Maps, entropy, normalise, resize_area, top_mass
from mmalign.attribution.reference import kernel_shap
from mmalign.hub import fingerprint_weights
from mmalign.scorers import clipscore, shapes
from mmalign.testbed.build import CHECKPOINTS
from mmalign.testbed.crowds import scenes
from mmalign.types import Prompt

HERE = Path(__file__).parent
REFERENCE = HERE / "data" / "attribution_reference.npz"
DOCUMENT = HERE.parent / "docs" / "attribution.md"
BEGIN, END = "<!-- bench begins -->", "<!-- bench ends -->"
GRID, SIZE, BLUR = 24, 96, 0.5


def tensor(pixels_BHWC: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).float() / 255


def enlarged(pixels_BCHW: torch.Tensor) -> torch.Tensor:
    return F.interpolate(pixels_BCHW, (SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def load_clip() -> clipscore.CosineScorer:
    return clipscore.load(clipscore.Config(model=str(CHECKPOINTS / "tiny-clip")))


def correlation(a: torch.Tensor, b: torch.Tensor, grid: int) -> float:
    """Mean over pictures of the correlation of two maps averaged on a grid; a constant map counts as 0."""
    pairs = zip(*(resize_area(torch.as_tensor(m).double(), grid, grid).flatten(1).numpy() for m in (a, b)), strict=True)
    return float(np.mean([np.corrcoef(x, y)[0, 1] if x.std() > 1e-12 else 0.0 for x, y in pairs]))


def overlap(a: torch.Tensor, b: torch.Tensor, share: float = 0.1) -> float:
    """Share of the reference's top cells that are among the map's top cells."""
    k = int(share * a[0].numel())
    tops = [maps.flatten(1).topk(k, dim=1).indices.tolist() for maps in (a, b)]
    return float(np.mean([len(set(x) & set(y)) / k for x, y in zip(*tops, strict=True)]))


def area_under_curve(maps: torch.Tensor, truth: torch.Tensor) -> float:
    """Probability that a cell of a named thing has more credit than another cell (ties count half)."""
    found = []
    for credit, real in zip(maps.flatten(1), truth.flatten(1) >= 0.5, strict=True):
        inside, outside = credit[real], credit[~real]
        gap = inside[:, None] - outside[None]
        found.append(float((gap > 0).double().mean() + 0.5 * (gap == 0).double().mean()))
    return float(np.mean(found))


def make_reference(number: int, evaluations: int) -> None:
    clip = load_clip()
    prompts, pixels = scenes("val", number, seed=1)
    texts = [prompt.text for prompt in prompts]
    found, agreement = {}, {}
    for name, cost in (("drop", evaluations // 4), ("blur", evaluations)):
        maps, halves = [], []
        for i in range(number):
            x, text = tensor(pixels[i : i + 1]), texts[i : i + 1]
            game = DropGame(clip, x, text) if name == "drop" else BlurGame(clip, enlarged(x), text, (GRID, GRID), BLUR)
            with torch.autocast("cpu", torch.bfloat16, enabled=name == "blur"):  # its rounding is a hundredth of the spread of the masks
                credit, half = kernel_shap(game, cost)
            maps.append(credit[0])
            halves.append(np.corrcoef(half[0, 0].flatten(), half[1, 0].flatten())[0, 1])
            say(f"{name} {i} {texts[i]!r}: halves agree to {halves[-1]:.3f}")
        found[name], agreement[name] = torch.stack(maps).float().numpy(), np.array(halves)
    REFERENCE.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        REFERENCE,
        pixels=pixels,
        prompts=json.dumps([{"id": prompt.id, "text": prompt.text, "meta": dict(prompt.meta)} for prompt in prompts]),
        weights=fingerprint_weights(CHECKPOINTS / "tiny-clip"),
        evaluations=evaluations,
        halves_blur=agreement["blur"],
        halves_drop=agreement["drop"],
        **found,
    )


class Bench:
    """The held-out pictures with their reference and truth; `row` runs one tool and says what the table prints."""

    def __init__(self, repeats: int) -> None:
        self.saved = np.load(REFERENCE)
        assert str(self.saved["weights"]) == fingerprint_weights(CHECKPOINTS / "tiny-clip"), "tiny-clip has changed: run `reference` first"
        self.clip, self.repeats = load_clip(), repeats
        self.prompts = [Prompt(**entry) for entry in json.loads(str(self.saved["prompts"]))]
        self.texts = [prompt.text for prompt in self.prompts]
        self.pixels = tensor(self.saved["pixels"])
        self.large = enlarged(self.pixels)
        self.truth = attribute(Attribution(tool="oracle", grid=GRID), shapes.load(), self.pixels, self.prompts).credit

    def row(self, name: str, run: Callable[[], Maps]) -> list[str]:
        seconds = []
        for _ in range(self.repeats):
            begun = time.perf_counter()
            found = run()
            seconds.append((time.perf_counter() - begun) / len(self.pixels))
        is_drop = found.tool.endswith("/drop")
        fine, coarse = (8, 4) if is_drop else (24, 8)
        reference = torch.from_numpy(self.saved["drop" if is_drop else "blur"]).double()
        own = resize_area(found.credit, fine, fine)
        cells = [
            name,
            "drop" if is_drop else "blur",
            f"{found.evaluations:.0f}",
            f"{statistics.median(seconds):.3f}",
            f"{correlation(own, reference, fine):.3f}",
            f"{correlation(own, reference, coarse):.3f}",
            f"{overlap(own, reference):.2f}",
            f"{area_under_curve(found.credit, self.truth):.3f}",
            f"{float(top_mass(found.weights).mean()):.2f}",
            f"{float(entropy(found.weights).mean()):.2f}",
        ]
        say(" | ".join(cells))
        return cells

    def tool(self, **options) -> Callable[[], Maps]:
        scorer = shapes.load() if options["tool"] == "oracle" else self.clip
        prompts = self.prompts if options["tool"] == "oracle" else self.texts
        return lambda: attribute(Attribution(grid=GRID, size=SIZE, blur=BLUR, **options), scorer, self.pixels, prompts)

    def package_on_pixels(self) -> Callable[[], Maps]:
        """The package as its users call it: the image masker on pixels and channels, patch sums afterwards."""
        current = [0]
        explain = image_explainer(lambda x: self.clip.score_pixels(x, [self.texts[current[0]]] * len(x)), SIZE, SIZE, round(BLUR * SIZE))

        def run() -> Maps:
            found = []
            for current[0], picture in enumerate(self.large):
                found.append(explain(picture.permute(1, 2, 0).numpy(), 500, 50))
            credit = resize_area(torch.from_numpy(np.stack(found)), GRID, GRID) * (SIZE / GRID) ** 2
            return Maps("package", credit, normalise(credit), 500)

        run()  # numba compiles once
        return run

    def package_on_cells(self, masking: str, evaluations: int = 500, batch: int = 50) -> Callable[[], Maps]:
        """The package on the game's own cells, masks handed to the scorer as tensors."""

        def run() -> Maps:
            found = []
            for i in range(len(self.texts)):
                part, text = slice(i, i + 1), self.texts[i : i + 1]
                if masking == "drop":
                    game = DropGame(self.clip, self.pixels[part], text)
                else:
                    game = BlurGame(self.clip, self.large[part], text, (GRID, GRID), BLUR)
                found.append(explain_grid(game, evaluations, batch)[0])
            credit = torch.from_numpy(np.stack(found)).double()
            side = credit.shape[1]
            credit = resize_area(credit, GRID, GRID) * (side / GRID) ** 2
            return Maps("package/drop" if masking == "drop" else "package", credit, normalise(credit), evaluations)

        run()
        return run

    def trained_head(self, steps: int) -> Callable[[], Maps]:
        """The amortised head after `steps` batches of 16 pictures of the training split, a quarter of each played."""
        head = AmortisedHead(self.clip, self.clip.clip.model.config.projection_dim, Amortised(floor=-1.0))
        for step in range(steps):
            prompts, pixels = scenes("train", 16, seed=step)
            game = BlurGame(self.clip, enlarged(tensor(pixels)), [prompt.text for prompt in prompts], (GRID, GRID), BLUR)
            figures = head.step(game)
        say(f"head after {steps} steps: {figures}")

        def run() -> Maps:
            game = BlurGame(self.clip, self.large, self.texts, (GRID, GRID), BLUR)
            credit = head.explain(game)
            return Maps("amortised", credit, normalise(credit), game.evaluations)

        return run


def make_table(repeats: int, head_steps: int) -> None:
    bench = Bench(repeats)
    tree = Shap(batch=50)
    rows = [
        bench.row("`shap` package, image masker, 500", bench.package_on_pixels()),
        bench.row("`shap` package, 24x24 cells, 500", bench.package_on_cells("blur")),
        bench.row("shap, 500", bench.tool(tool="shap", shap=tree)),
        bench.row("shap, 2000", bench.tool(tool="shap", shap=Shap(2000, 50))),
        bench.row("**fast_shap** (default)", bench.tool(tool="fast_shap")),
        bench.row("fast_shap A", bench.tool(tool="fast_shap", fast_shap=VARIANTS["A"])),
        bench.row("fast_shap B", bench.tool(tool="fast_shap", fast_shap=VARIANTS["B"])),
        bench.row("fast_shap A without g g^T", bench.tool(tool="fast_shap", fast_shap=FastShap(pairs=64, steps=1, follow=0))),
        bench.row("fast_shap, no gradient, 64 pairs", bench.tool(tool="fast_shap", fast_shap=FastShap(pairs=64, steps=0))),
        bench.row(f"amortised head, {head_steps} steps", bench.trained_head(head_steps)),
        bench.row("lime, 500", bench.tool(tool="lime")),
        bench.row("lime, probability, no intercept", bench.tool(tool="lime", lime=Lime(target="probability", intercept=False))),
        bench.row("gradcam", bench.tool(tool="gradcam")),
        bench.row("oracle", bench.tool(tool="oracle")),
        bench.row("permuted fast_shap", bench.tool(tool="permuted")),
        bench.row("random", bench.tool(tool="random")),
        bench.row("constant", bench.tool(tool="constant")),
        bench.row("`shap` package, 8x8 patches, 500", bench.package_on_cells("drop")),
        bench.row("shap, 500", bench.tool(tool="shap", shap=tree, masking="drop")),
        bench.row("**fast_shap** (default)", bench.tool(tool="fast_shap", masking="drop")),
        bench.row("fast_shap, 48 pairs, 1 gradient", bench.tool(tool="fast_shap", masking="drop", fast_shap=FastShap(pairs=48, steps=1))),
        bench.row("fast_shap A", bench.tool(tool="fast_shap", masking="drop", fast_shap=VARIANTS["A"])),
    ]
    slowest = float(rows[0][3])
    names = ["tool", "game", "evaluations", "s / picture", "token r", "block r", "top 10 %", "AUC", "top mass", "entropy", "x package"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join([*cells, f"{slowest / max(float(cells[3]), 1e-3):.1f}"]) + " |" for cells in rows]
    halves = ", ".join(f"{name} {np.mean(bench.saved[f'halves_{name}']):.3f}" for name in ("blur", "drop"))
    note = (
        f"{len(bench.texts)} pictures, median of {repeats} runs, {torch.get_num_threads()} CPU thread(s). "
        f"Reference: {int(bench.saved['evaluations'])} evaluations a picture (drop: a quarter); its halves correlate at {halves}."
    )
    text = DOCUMENT.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    DOCUMENT.write_text(f"{before}{BEGIN}\n{note}\n\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")


def time_tower(layers: int, side: int, group: int) -> None:
    """fast_shap on a whole group against the package picture by picture, on a random ViT of HPSv2's width."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "projection_dim": 1024}
    config = CLIPVisionConfig(num_hidden_layers=layers, image_size=side, patch_size=14, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = (
            CLIPVisionModelWithProjection(config)
            .eval()
            .requires_grad_(False)
            .to(device, torch.bfloat16 if device == "cuda" else torch.float32)
        )
    text = F.normalize(torch.randn(1024, generator=torch.Generator().manual_seed(0)), dim=0).to(device)

    class Tower:
        def score_pixels(self, pixels_BCHW, prompts):
            small = F.interpolate(pixels_BCHW.to(device), (side, side), mode="bicubic", antialias=True, align_corners=False)
            return F.normalize(tower(pixel_values=small.to(tower.dtype)).image_embeds.float(), dim=-1) @ text

    noise = torch.rand(group, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    pixels = F.interpolate(noise, (384, 384), mode="bicubic").clamp(0, 1)
    texts = ["a picture"] * group
    explain = image_explainer(lambda x: Tower().score_pixels(x, []).cpu(), 384, 384, 192)
    picture = pixels[0].permute(1, 2, 0).numpy()
    for warm in (True, False):
        begun = time.perf_counter()
        explain(picture, 20 if warm else 500, 50)
        package = time.perf_counter() - begun
    for masking_warm in (True, False):
        begun = time.perf_counter()
        attribute(Attribution(grid=GRID), Tower(), pixels.to(device)[: 1 if masking_warm else group], texts[: 1 if masking_warm else group])
        fast = (time.perf_counter() - begun) / group
    say(f"{device}, {layers} layers, {side} px, group of {group}: package {package:.3f} s a picture, fast_shap {fast:.3f} s")
    say(f"ratio {package / fast:.1f}")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", default="table", choices=("reference", "table", "tower"))
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--evaluations", type=int, default=60_000, help="of the reference, for each picture")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--head-steps", type=int, default=150)
    parser.add_argument("--layers", type=int, default=32, help="of the tower")
    parser.add_argument("--side", type=int, default=224, help="pixels that the tower sees")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "reference":
        make_reference(arguments.pictures, arguments.evaluations)
    elif arguments.what == "table":
        make_table(arguments.repeats, arguments.head_steps)
    else:
        time_tower(arguments.layers, arguments.side, arguments.group)


if __name__ == "__main__":
    main()
