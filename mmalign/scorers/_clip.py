"""A loaded CLIP: unit image and text features, text once per prompt, and the patches that attribution asks about.

transformers' CLIPModel carries every CLIP-shaped scorer; `load` reads the Hugging Face layout, `load_open_clip` the files of open_clip.
Shapes: B batch, D features, S side of the network's input; N patches on a grid of h x w; C channels of their embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from mmalign.hub import CHECKPOINTS
from mmalign.reach import is_cache_only
from mmalign.scorers import _weights
from mmalign.scorers._preprocess import CropCentre, Preprocess, Triple
from mmalign.scorers._whole import load_whole
from mmalign.types import MmalignError, digest

if TYPE_CHECKING:
    import torch

VERSION = 1  # raise it with any change that can change a feature
MAX_TOKENS = 77
MAX_CACHED = 10_000  # text features kept per tower, 40 MB at most

Dtype = Literal["float32", "bfloat16", "float16"]

LAYER = "resblocks.*"
OPEN_CLIP = {  # open_clip's name -> transformers' (patterns of _weights.rename)
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.@": "vision_model.pre_layrnorm.@",
    "visual.ln_post.@": "vision_model.post_layernorm.@",
    "visual.proj": "^visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.@": "text_model.final_layer_norm.@",
    "text_projection": "^text_projection.weight",
} | {
    f"{old}{LAYER}.{part}": f"{new}.encoder.layers.*.{target}"
    for old, new in (("visual.transformer.", "vision_model"), ("transformer.", "text_model"))
    for part, target in (
        ("ln_1.@", "layer_norm1.@"),
        ("ln_2.@", "layer_norm2.@"),
        ("attn.in_proj_@", "self_attn.?_proj.@"),
        ("attn.out_proj.@", "self_attn.out_proj.@"),
        ("mlp.c_fc.@", "mlp.fc1.@"),
        ("mlp.c_proj.@", "mlp.fc2.@"),
    )
}
HEAD_WIDTH = {1280: 80, 1408: 88, 1664: 104}  # of open_clip's ViT-H, -g and -bigG image towers; 64 everywhere else


@dataclass
class Clip:
    """A CLIPModel with its tokenizer and preprocessing. Its only state is the cache of text features."""

    model: Any
    tokenizer: Any
    preprocess: Preprocess
    _texts: dict[str, tuple[torch.Tensor, int]] = field(default_factory=dict, repr=False)

    @property
    def fingerprint(self) -> str:
        weights, words = _weights.fingerprint_tensors(self.model), _weights.fingerprint_tokenizer(self.tokenizer)
        activation = self.model.config.vision_config.hidden_act
        return digest("clip", VERSION, weights, words, activation, type(self.preprocess).__name__, self.preprocess)

    @property
    def logit_scale(self) -> float:
        return float(self.model.logit_scale.detach().float().exp())

    @property
    def patch_embedding(self) -> torch.nn.Module:
        """The convolution whose output is the activation map [B, C, h, w] that Grad-CAM explains."""
        return self.model.vision_model.embeddings.patch_embedding

    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        vision = self.model.config.vision_config
        return (vision.image_size // vision.patch_size,) * 2

    def encode_pixels(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Unit features [B, D] in float32 of pixels in [0, 1] of any size, differentiable in the pixels."""
        return self._encode_input(self._input(pixels_BCHW))

    def encode_images(self, images: Sequence[Any]) -> torch.Tensor:
        """Unit features [B, D] of uint8 images of any sizes, by the exact preprocessing."""

        like = self.model.visual_projection.weight
        return self._encode_input(self.preprocess.images(images).to(like.device, like.dtype))

    def text_features(self, prompts: Sequence[str]) -> torch.Tensor:
        """Unit features [B, D] in float32, without gradient; a prompt is encoded once and then remembered."""
        import torch

        absent = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if absent:
            if len(self._texts) + len(absent) > MAX_CACHED:
                self._texts.clear()
                absent = list(dict.fromkeys(prompts))
            self._texts.update(zip(absent, self._encode(absent), strict=True))
        return torch.stack([self._texts[prompt][0] for prompt in prompts])

    def n_tokens(self, prompt: str) -> int:
        """How many tokens the prompt has before it is cut to MAX_TOKENS, with both special ones; the prompt must have been encoded."""
        return self._texts[prompt][1]

    def patch_activations(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """What the patch embedding makes of pixels in [0, 1]: [B, C, h, w]."""
        return self.patch_embedding(self._input(pixels_BCHW))

    def patch_tokens(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Unit features of the patches [B, D, h, w] in the space of image and text features."""
        from torch.nn import functional

        tower = self.model.vision_model
        hidden_BND = tower.post_layernorm(tower(pixel_values=self._input(pixels_BCHW)).last_hidden_state[:, 1:])
        unit_BND = functional.normalize(self.model.visual_projection(hidden_BND).float(), dim=-1)
        return unit_BND.mT.unflatten(2, self.patch_grid())

    def encode_gated(self, pixels_BCHW: torch.Tensor, gates_RN: torch.Tensor, index_R: torch.Tensor) -> torch.Tensor:
        """Unit features [R, D]: row r is picture index_R[r] seen through its patches' gates (attribution/dropping.py)."""
        from torch.nn import functional

        from mmalign.attribution.dropping import pooled_with_gates

        pooled = pooled_with_gates(self.model.vision_model, self._input(pixels_BCHW), gates_RN, index_R)
        return functional.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    def _encode_input(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        return functional.normalize(self.model.get_image_features(pixel_values=x_BCHW).pooler_output.float(), dim=-1)

    def _input(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        like = self.model.visual_projection.weight
        return self.preprocess.tensor(pixels_BCHW).to(like.device, like.dtype)

    def _encode(self, prompts: Sequence[str]) -> list[tuple[torch.Tensor, int]]:
        import torch
        from torch.nn import functional

        lengths = [len(ids) for ids in self.tokenizer(list(prompts), verbose=False).input_ids]
        # All are padded to 77, as the originals do, so that a prompt's features do not depend on its neighbours.
        # No attention mask: the text tower is causal, and nothing after the end token is read.
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=self._context, return_tensors="pt")
        with torch.no_grad():
            features = self.model.get_text_features(input_ids=tokens.input_ids.to(self.model.text_projection.weight.device)).pooler_output
        return list(zip(functional.normalize(features.float(), dim=-1), lengths, strict=True))

    @property
    def _context(self) -> int:
        return min(MAX_TOKENS, self.model.config.text_config.max_position_embeddings)


def load(spec: str, option: str, device: str, dtype: Dtype, preprocess: Preprocess | None = None, words: str | None = None) -> Clip:
    """A CLIP in the Hugging Face layout: a bundled name, folder or hub id.

    Without `preprocess` the checkpoint's processor file decides it; `words` names another tokenizer.
    """
    from transformers import CLIPModel

    bundled = CHECKPOINTS / spec
    spec = str(bundled) if (bundled / "config.json").is_file() else spec
    model = load_whole(CLIPModel, spec, device, dtype, option).requires_grad_(False)
    return Clip(model, _weights.tokenizer(words or spec, option), preprocess or preprocess_of(spec, model, option))


def preprocess_of(spec: str, model: Any, option: str, rounding: Literal["even", "down"] = "even") -> CropCentre:
    """The crop that a checkpoint's processor file describes, CLIP's own where it has none; MmalignError when it is no such crop."""
    from transformers import CLIPImageProcessorPil

    side = model.config.vision_config.image_size
    try:
        processor = CLIPImageProcessorPil.from_pretrained(spec, local_files_only=is_cache_only(spec))
    except OSError:
        return CropCentre(side, rounding=rounding)
    size, crop = dict(processor.size), dict(processor.crop_size)
    if size.get("shortest_edge") != side or crop.get("height") != side or crop.get("width") != side or int(processor.resample) != 3:
        raise MmalignError(
            f"The processor of '{spec}' ({option}) resizes to {size} by filter {processor.resample} and crops to {crop}; "
            f"expected the short side to {side} by bicubic (3) and a crop of {side} x {side}, as CLIP's."
        )
    return CropCentre(side, cast(Triple, tuple(processor.image_mean)), cast(Triple, tuple(processor.image_std)), rounding)


def load_open_clip(path: Path, words: Any, preprocess: Callable[[int], Preprocess], device: str, dtype: Dtype) -> Clip:
    """A CLIP from a file of open_clip (ViT towers, plain GELU), sizes read from its tensors; `preprocess` gets the input's side."""
    import torch
    from transformers import CLIPModel

    state = {key: tensor for key, tensor in _weights.read_tensors(path).items() if key != "attn_mask"}
    absent = [name for name in ("visual.conv1.weight", "visual.proj", "token_embedding.weight", "text_projection") if name not in state]
    if absent:
        raise MmalignError(f"{path} is no open_clip ViT checkpoint: it lacks {', '.join(absent)}.")
    model: Any = CLIPModel(open_clip_config(state, words.eos_token_id))
    _weights.fill(model, _weights.rename({key: tensor.float() for key, tensor in state.items()}, OPEN_CLIP, str(path)), str(path))
    model = model.to(device=device, dtype=getattr(torch, dtype)).eval().requires_grad_(False)
    return Clip(model, words, preprocess(model.config.vision_config.image_size))


def open_clip_config(state: Mapping[str, torch.Tensor], eos_token_id: int) -> Any:
    """The CLIPConfig of open_clip's tensors. What shapes do not tell (heads) follows open_clip's rule of a head width per model width."""
    from transformers import CLIPConfig

    def tower(prefix: str, width: int, head_width: int) -> dict[str, Any]:
        n_layers = len({key for key in state if key.startswith(f"{prefix}transformer.resblocks.") and key.endswith(".ln_1.weight")})
        hidden = state[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
        shared = {"projection_dim": state["text_projection"].shape[1], "hidden_act": "gelu"}
        heads = max(1, width // head_width)
        return {"hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": n_layers, "num_attention_heads": heads, **shared}

    width, _, patch, _ = state["visual.conv1.weight"].shape
    vocabulary, text_width = state["token_embedding.weight"].shape
    grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    text = tower("", text_width, 64)
    text |= {"vocab_size": vocabulary, "max_position_embeddings": state["positional_embedding"].shape[0], "eos_token_id": eos_token_id}
    vision = tower("visual.", width, HEAD_WIDTH.get(width, 64)) | {"patch_size": patch, "image_size": grid * patch}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=state["text_projection"].shape[1])
