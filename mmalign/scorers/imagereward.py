"""ImageReward: a BLIP trained on expert rankings of generated images; a z-score, about -2.3 to 2.

Paper: Xu et al., arXiv 2304.05977; THUDM/ImageReward ImageReward/ImageReward.py at c1392c6. Image: CLIP's crop to 224, BLIP's ViT-L/16.
Text: BERT tokens padded and cut to 35, the first one stays [CLS] (BLIP's own image-text encoder would write [ENC] there). The text encoder
attends to the image's tokens; its [CLS] state h goes through a five-layer head without activations: r = (head(h) - 0.16717362830052426) /
1.0333394966054072. Changed: transformers' BLIP classes in place of the package's, whose dependencies no longer install (outputs equal);
images are batched where the package and Flow-GRPO loop; the head is folded to one affine map in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.scorers import _affine, _weights
from mmalign.scorers._clip import Dtype
from mmalign.scorers._preprocess import CropCentre, Preprocess
from mmalign.scorers._samples import Item, cut_note, score_in_batches
from mmalign.types import MmalignError, Sample, Score, Value, digest

if TYPE_CHECKING:
    import torch

NEEDS = ("weights: THUDM/ImageReward", "weights: google-bert/bert-base-uncased")
VERSION = 1
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35

VISION = {  # names under blip.visual_encoder -> names in BlipVisionModel
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.@": "embeddings.patch_embedding.@",
    "norm.@": "post_layernorm.@",
    "blocks.*.norm1.@": "encoder.layers.*.layer_norm1.@",
    "blocks.*.norm2.@": "encoder.layers.*.layer_norm2.@",
    "blocks.*.attn.qkv.@": "encoder.layers.*.self_attn.qkv.@",
    "blocks.*.attn.proj.@": "encoder.layers.*.self_attn.projection.@",
    "blocks.*.mlp.@": "encoder.layers.*.mlp.@",
}


@dataclass(frozen=True)
class Config:
    """`weights`: ImageReward.pt as a path or OWNER/NAME:FILE on the hub; `tokenizer`: BERT's uncased vocabulary."""

    weights: str = "THUDM/ImageReward:ImageReward.pt"
    tokenizer: str = "google-bert/bert-base-uncased"
    batch_size: int = 16
    dtype: Dtype = "float32"


def load(config: Config = Config(), device: str = "cpu") -> ImageReward:
    import torch
    from transformers import BlipTextModel, BlipVisionModel

    path = _weights.official_file(config.weights, "imagereward.weights")
    words = _weights.tokenizer(config.tokenizer, "imagereward.tokenizer")
    parts = split(_weights.read_tensors(path), path)
    vision_config, text_config = configs(parts, path)
    vision: Any = BlipVisionModel(vision_config)
    text: Any = BlipTextModel(text_config, add_pooling_layer=False)
    _weights.fill(vision, _weights.rename(parts["blip.visual_encoder."], VISION, str(path)), str(path))
    _weights.fill(text, parts["blip.text_encoder."], str(path))
    head = _affine.fold(parts["mlp."], text_config.hidden_size, str(path)).to(device)
    for network in (vision, text):
        network.to(device=device, dtype=getattr(torch, config.dtype)).eval().requires_grad_(False)
    identity = _weights.fingerprint_tensors(vision, text, head), _weights.fingerprint_tokenizer(words)
    preprocess = CropCentre(vision_config.image_size)
    return ImageReward(vision, text, head, words, preprocess, digest("imagereward", VERSION, *identity), config.batch_size)


@dataclass(frozen=True)
class ImageReward:
    """The loaded scorer. The text encoder reads image and prompt together, so only the tokens of a prompt can be remembered."""

    vision: Any
    text: Any
    head: Any
    tokenizer: Any
    preprocess: Preprocess
    fingerprint: str
    batch_size: int
    name: str = "imagereward"
    range: tuple[float, float] = (float("-inf"), float("inf"))
    _tokens: dict[str, tuple[torch.Tensor, torch.Tensor, int]] = field(default_factory=dict, repr=False)

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One value or failure per sample, in order."""
        return score_in_batches(samples, self.batch_size, self._measure)

    def score_pixels(self, pixels_BCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores [B] of pixels in [0, 1] of any size, differentiable in the pixels."""
        return self._score(self.preprocess.tensor(pixels_BCHW), prompts)

    @property
    def patch_embedding(self) -> Any:
        return self.vision.embeddings.patch_embedding

    def patch_activations(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """What the patch embedding makes of pixels in [0, 1]: [B, C, h, w]."""
        convolution = self.patch_embedding
        return convolution(self.preprocess.tensor(pixels_BCHW).to(convolution.weight.device, convolution.weight.dtype))

    def _score(self, x_BCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        like = self.text.embeddings.word_embeddings.weight
        ids_BL, mask_BL = (part.to(like.device) for part in self._tokenise(prompts))
        image_BND = self.vision(pixel_values=x_BCHW.to(like.device, like.dtype)).last_hidden_state
        states = self.text(
            input_ids=ids_BL,
            attention_mask=mask_BL,
            encoder_hidden_states=image_BND,
            encoder_attention_mask=image_BND.new_ones(image_BND.shape[:2]),
            is_decoder=False,
        )
        return (self.head(states.last_hidden_state[:, 0].float())[:, 0] - MEAN) / DEVIATION

    def _tokenise(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, both [B, 35]."""
        import torch

        absent = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._tokens]
        if absent:
            lengths = [len(ids) for ids in self.tokenizer(absent, verbose=False).input_ids]
            found = self.tokenizer(absent, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            self._tokens.update(zip(absent, zip(found.input_ids, found.attention_mask, lengths, strict=True), strict=True))
        rows = [self._tokens[prompt] for prompt in prompts]
        return torch.stack([ids for ids, _, _ in rows]), torch.stack([mask for _, mask, _ in rows])

    def _measure(self, items: Sequence[Item]) -> list[Value]:
        import torch

        prompts = [item.text for item in items]
        with torch.no_grad():
            scores_B = self._score(self.preprocess.images([item.pixels for item in items]), prompts)
        notes = [cut_note(self._tokens[prompt][2], MAX_TOKENS) for prompt in prompts]
        return [Value(score, detail=note) for score, note in zip(scores_B.tolist(), notes, strict=True)]


def split(state: Mapping[str, torch.Tensor], path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The official file's tensors by part, in float32 and without the part's prefix; MmalignError when a tensor belongs to none."""
    parts: dict[str, dict[str, torch.Tensor]] = {"blip.visual_encoder.": {}, "blip.text_encoder.": {}, "mlp.": {}}
    for key, tensor in state.items():
        prefix = next((prefix for prefix in parts if key.startswith(prefix)), None)
        if prefix is None:
            raise MmalignError(f"{path} is no ImageReward.pt: its tensor '{key}' is under none of {', '.join(parts)}")
        if not key.endswith(_weights.HARMLESS):
            parts[prefix][key.removeprefix(prefix)] = tensor.float()
    absent = [prefix for prefix, tensors in parts.items() if not tensors]
    if absent:
        raise MmalignError(f"{path} is no ImageReward.pt: it has no tensors under {', '.join(absent)}")
    return parts


def configs(parts: Mapping[str, Mapping[str, torch.Tensor]], path: Path) -> tuple[Any, Any]:
    """BLIP's configurations with sizes read from the tensors; heads are 64 wide, as in ViT-L and BERT."""
    from transformers import BlipTextConfig, BlipVisionConfig

    vision, text = parts["blip.visual_encoder."], parts["blip.text_encoder."]
    try:
        width, _, patch, _ = vision["patch_embed.proj.weight"].shape
        vocabulary, text_width = text["embeddings.word_embeddings.weight"].shape
        vision_config = BlipVisionConfig(
            hidden_size=width,
            num_hidden_layers=sum(key.endswith(".norm1.weight") for key in vision),
            num_attention_heads=max(1, width // 64),
            intermediate_size=vision["blocks.0.mlp.fc1.weight"].shape[0],
            image_size=round((vision["pos_embed"].shape[1] - 1) ** 0.5) * patch,
            patch_size=patch,
            layer_norm_eps=1e-6,
            hidden_act="gelu",
        )
        text_config = BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=text_width,
            encoder_hidden_size=width,
            num_hidden_layers=sum(key.endswith(".attention.self.query.weight") for key in text),
            num_attention_heads=max(1, text_width // 64),
            intermediate_size=text["encoder.layer.0.intermediate.dense.weight"].shape[0],
            max_position_embeddings=text["embeddings.position_embeddings.weight"].shape[0],
            layer_norm_eps=1e-12,
            hidden_act="gelu",
        )
    except KeyError as error:
        raise MmalignError(f"{path} is no ImageReward.pt: it lacks the tensor {error}.") from error
    return vision_config, text_config
