"""RAHF: four predicted human ratings and the two maps of where an image is implausible and where it misses its prompt.

Paper: Liang et al., arXiv 2312.10240. The architecture is written from its description (`_rahf_model.py`); the authors' re-implementation
(youweiliang/RichHF at 4ea4f4c) offers its weights on Google Drive for non-commercial use in a layout of its own, which is not read here,
and Google's are not public. `weights` is a folder that `save` wrote: config.json, model.safetensors and the tokenizer's files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmalign.scorers import _folders, _weights
from mmalign.scorers._clip import Dtype
from mmalign.scorers._preprocess import Squash
from mmalign.scorers._rows import buckets, token_ids
from mmalign.scorers._samples import Item, cut_note, score_in_batches
from mmalign.types import MmalignError, Sample, Score, Value, digest

NEEDS = ("weights: a RAHF folder (docs/scorers.md)",)
VERSION = 1
MAX_TOKENS = 512
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Config:
    """`weights`: the folder; `rating`: which score is the value; `heatmap`: which map it carries."""

    weights: str = ""
    rating: Literal["plausibility", "alignment", "aesthetics", "overall"] = "overall"
    heatmap: Literal["misalignment", "implausibility"] = "misalignment"
    batch_size: int = 16
    dtype: Dtype = "float32"


def load(config: Config = Config(), device: str = "cpu") -> RahfScorer:
    import torch

    from mmalign.scorers._rahf_model import Rahf, Sizes

    if not config.weights:
        raise MmalignError(
            "The scorer rahf has no weights that could be fetched: Google's are not public, and those of youweiliang/RichHF have another "
            "layout and a non-commercial licence. Train the network and name its folder with --set rahf.weights=PATH (docs/scorers.md)."
        )
    path = _folders.folder(config.weights, "rahf.weights")
    options = _folders.config_of(path)
    if unknown := sorted(options.keys() - Sizes.__dataclass_fields__.keys()):
        raise MmalignError(f"{path / 'config.json'} has the unknown size '{unknown[0]}'; known: {', '.join(Sizes.__dataclass_fields__)}.")
    model = Rahf(Sizes(**options))
    state = _folders.tensors_of(path)
    tied = "encoder.encoder.embed_tokens.weight"
    if tied in model.state_dict():
        state.setdefault(tied, state["encoder.shared.weight"])
    _weights.fill(model, state, str(path))
    model = model.to(device=device, dtype=getattr(torch, config.dtype)).eval().requires_grad_(False)
    return RahfScorer(config, model, _weights.tokenizer(str(path), "rahf.weights"))


def save(model: Any, words: Any, path: Path) -> None:
    """Write a network and its tokenizer as the folder that `load` reads."""
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    words.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(model.options, indent=2) + "\n", encoding="utf-8")
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items() if key != "encoder.encoder.embed_tokens.weight"}
    save_file(state, path / "model.safetensors")


class RahfScorer:
    """The loaded scorer. Parts: the four ratings (0 to 1); `heatmap`: the chosen map [D, D], 24 x 24 at the paper's size."""

    name = "rahf"
    range = (0.0, 1.0)

    def __init__(self, config: Config, model: Any, words: Any) -> None:
        self.config, self.model, self.words = config, model, words
        side = model.sizes.image
        self.preprocess = Squash((side, side), "pil-bilinear", HALF, HALF)
        settings = config.rating, config.heatmap, config.dtype
        self.fingerprint = digest("rahf", VERSION, settings, _weights.fingerprint_tensors(model), _weights.fingerprint_tokenizer(words))

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One value or failure per sample, in order."""
        return score_in_batches(samples, self.config.batch_size, self._measure)

    def _measure(self, items: Sequence[Item]) -> list[Score]:
        import torch

        asked = token_ids(self.words, [item.text for item in items])
        found: list[Score] = [Value(0.0)] * len(items)
        weight = self.model.project.weight
        with torch.no_grad():
            for group in buckets([min(len(ids), MAX_TOKENS) for ids in asked], self.config.batch_size):
                pixels = self.preprocess.images([items[at].pixels for at in group]).to(weight.device, weight.dtype)
                ids = torch.tensor([asked[at][:MAX_TOKENS] for at in group], device=weight.device)
                scores, maps = self.model(pixels, ids, torch.ones_like(ids))
                chosen = maps[self.config.heatmap].cpu().numpy()
                columns = {name: column.tolist() for name, column in scores.items()}
                for row, at in enumerate(group):
                    parts = {name: column[row] for name, column in columns.items()}
                    found[at] = Value(parts[self.config.rating], parts, heatmap=chosen[row], detail=cut_note(len(asked[at]), MAX_TOKENS))
        return found
