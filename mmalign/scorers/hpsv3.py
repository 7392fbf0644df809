"""HPSv3: a Qwen2-VL-7B trained on people's choices; the mean of the Gaussian that it gives to an image's quality (about -5 to 15).

Paper: Ma et al., arXiv 2508.03789; package hpsv3 1.0.0, weights MizzenAI/HPSv3. The hidden state at the added token <|Reward|> goes through
a small head in float32 to (mu, log sigma); mu is the score. An image is resized by bicubic to about 256 x 28 x 28 pixels in multiples of
28. Two things are easily lost in a port. The official forward pass calls Qwen2-VL's decoder without position ids, which in the pinned
transformers 4.45.2 means plain counting, image tokens included, and not the three-dimensional positions of Qwen2-VL: so it was trained, so
it is here. And the vocabulary is cut to the tokenizer's length when <|Reward|> is added. Changed: the unused language head is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmalign.images import CLIP_MEAN, CLIP_STD, Size, normalise, resize, to_tensor
from mmalign.scorers import _folders, _rows, _weights
from mmalign.scorers._clip import Dtype
from mmalign.scorers._hpsv3_question import QUESTION
from mmalign.scorers._samples import Item, score_in_batches
from mmalign.types import Failure, Sample, Score, Value, digest

if TYPE_CHECKING:
    import numpy as np
    import torch

NEEDS = ("weights: MizzenAI/HPSv3", "weights: Qwen/Qwen2-VL-7B-Instruct")
VERSION = 1
REWARD = "<|Reward|>"
PIXELS = 256 * 28 * 28
MAX_ASPECT = 200
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
AFTER = "<|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
NAMES = {"visual.@": "network.visual.@", "model.@": "network.language_model.@", "rm_head.@": "head.@"}


@dataclass(frozen=True)
class Config:
    """`weights`: path or OWNER/NAME:FILE of HPSv3.safetensors; `base`: folder or hub id of Qwen2-VL, for its config and tokenizer."""

    weights: str = "MizzenAI/HPSv3:HPSv3.safetensors"
    base: str = "Qwen/Qwen2-VL-7B-Instruct"
    pixels: int = PIXELS
    batch_size: int = 4
    dtype: Dtype = "bfloat16"


def load(config: Config = Config(), device: str = "cpu") -> HpsV3:
    import torch
    from torch import nn
    from transformers import Qwen2VLConfig, Qwen2VLModel

    words = _weights.tokenizer(config.base, "hpsv3.base")
    words.add_special_tokens({"additional_special_tokens": [REWARD]})
    path = _weights.official_file(config.weights, "hpsv3.weights")
    state = {key: tensor for key, tensor in _weights.read_tensors(path).items() if key != "lm_head.weight"}
    options: Any = Qwen2VLConfig.from_pretrained(_folders.folder(config.base, "hpsv3.base", ("*.json", "*.txt")))
    options.text_config.vocab_size = state["model.embed_tokens.weight"].shape[0]
    width, inner, narrow = options.text_config.hidden_size, state["rm_head.0.weight"].shape[0], state["rm_head.3.weight"].shape[0]
    head = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Dropout(0.05), nn.Linear(inner, narrow), nn.ReLU(), nn.Linear(narrow, 2))
    model: Any = nn.ModuleDict({"network": Qwen2VLModel(options), "head": head})
    _weights.fill(model, _weights.rename(state, NAMES, str(path)), str(path))
    model = model.to(device).eval().requires_grad_(False)
    model.network.to(getattr(torch, config.dtype))
    return HpsV3(config, model, words)


class HpsV3:
    """The loaded scorer. Parts: `mu`, the value, and `sigma`, the spread that the model gives it."""

    name = "hpsv3"
    range = (-math.inf, math.inf)

    def __init__(self, config: Config, model: Any, words: Any) -> None:
        self.config, self.model, self.words = config, model, words
        self.reward = words.convert_tokens_to_ids(REWARD)
        vision = model.network.config.vision_config
        self.patch, self.merge, self.frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        weights = _weights.fingerprint_tensors(model), _weights.fingerprint_tokenizer(words)
        self.fingerprint = digest("hpsv3", VERSION, config.pixels, config.dtype, weights)

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One value or failure per sample, in order."""
        return score_in_batches(samples, self.config.batch_size, self._measure)

    def _measure(self, items: Sequence[Item]) -> list[Score]:
        texts = _rows.token_ids(self.words, [AFTER.format(QUESTION.format(text_prompt=item.text)) for item in items])
        before = self.words(BEFORE).input_ids
        asked = {position: self._read(item, before, text) for position, (item, text) in enumerate(zip(items, texts, strict=True))}
        holes: dict[int, Score] = {position: read for position, read in asked.items() if isinstance(read, Failure)}
        readable = {position: read for position, read in asked.items() if not isinstance(read, Failure)}
        values = dict(zip(readable, self._run(list(readable.values())) if readable else [], strict=True))
        return [holes.get(position) or values[position] for position in range(len(items))]

    def _read(self, item: Item, before: Sequence[int], text: Sequence[int]) -> tuple[list[int], torch.Tensor, Size] | Failure:
        """Tokens, patches and patch grid of an item, or why the network cannot read it."""
        height, width = item.pixels.shape[:2]
        if max(height, width) > MAX_ASPECT * min(height, width):
            return Failure(
                "score",
                "error",
                f"The image of {item.sample.request.id} is {height} x {width}; HPSv3 reads sides of at most 1:{MAX_ASPECT}.",
            )
        patches, grid = patchify(item.pixels, self.config.pixels, self.patch, self.merge, self.frames)
        image_token = self.model.network.config.image_token_id
        if text.count(self.reward) != 1 or image_token in text:
            return Failure(
                "score",
                "error",
                f"The prompt of {item.sample.request.id} holds a control token of HPSv3 ({REWARD} or an image); it cannot be read.",
            )
        ids = [*before, *[image_token] * (grid[0] * grid[1] // self.merge**2), *text]
        limit = self.model.network.config.text_config.max_position_embeddings
        if len(ids) > limit:
            return Failure("score", "error", f"The prompt of {item.sample.request.id} makes {len(ids)} tokens; HPSv3 reads {limit}.")
        return ids, patches, grid

    def _run(self, read: Sequence[tuple[list[int], torch.Tensor, Size]]) -> list[Value]:
        """One forward pass, padded on the right: the decoder is causal, so nothing before the padding can see it."""
        import torch

        longest = max(len(ids) for ids, _, _ in read)
        device = self.model.head[0].weight.device
        ids_BL = torch.tensor([ids + [self.words.pad_token_id or 0] * (longest - len(ids)) for ids, _, _ in read], device=device)
        mask_BL = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _, _ in read], device=device)
        with torch.no_grad():
            states = self.model.network(
                input_ids=ids_BL,
                attention_mask=mask_BL,
                position_ids=torch.arange(longest, device=device).expand(3, len(read), -1),
                pixel_values=torch.cat([patches for _, patches, _ in read]).to(device),
                image_grid_thw=torch.tensor([(1, *grid) for _, _, grid in read], device=device),
            ).last_hidden_state
            numbers = self.model.head(states[ids_BL == self.reward].float()).tolist()
        return [Value(mu, {"mu": mu, "sigma": math.exp(min(log_sigma, 700.0))}) for mu, log_sigma in numbers]


def smart_size(size: Size, pixels: int, unit: int) -> Size:
    """The size in multiples of `unit` nearest to `pixels` in area at the image's aspect; an area below is rounded up, above down."""
    height, width = (max(unit, round(side / unit) * unit) for side in size)
    scale = math.sqrt(size[0] * size[1] / pixels)
    if height * width > pixels:
        return math.floor(size[0] / scale / unit) * unit, math.floor(size[1] / scale / unit) * unit
    if height * width < pixels:
        return math.ceil(size[0] / scale / unit) * unit, math.ceil(size[1] / scale / unit) * unit
    return height, width


def patchify(image_HWC: np.ndarray, pixels: int, patch: int, merge: int, frames: int) -> tuple[torch.Tensor, Size]:
    """Qwen2-VL's patches [N, C * frames * patch * patch] in merge order, and their grid (rows, columns); a still is repeated."""
    from einops import rearrange, repeat

    small = resize(image_HWC, smart_size((image_HWC.shape[0], image_HWC.shape[1]), pixels, patch * merge), "pil-bicubic")
    x_CHW = normalise(to_tensor(small), CLIP_MEAN, CLIP_STD)[0]
    grid = small.shape[0] // patch, small.shape[1] // patch
    x_FCHW = repeat(x_CHW, "c h w -> f c h w", f=frames)
    pattern = "f c (gh mh ph) (gw mw pw) -> (gh gw mh mw) (c f ph pw)"
    return rearrange(x_FCHW, pattern, mh=merge, mw=merge, ph=patch, pw=patch), grid
