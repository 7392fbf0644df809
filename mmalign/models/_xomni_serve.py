"""X-Omni as a model that serves requests: reading the checkpoint and FLUX beside it, settings, saving."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from mmalign import hub
from mmalign.models._causal_serve import CausalServing
from mmalign.models._serving import DTYPES
from mmalign.models._xomni import CutPolicy, XOmni
from mmalign.models._xomni_flux import PARTS, read_decoder
from mmalign.models._xomni_net import XOmniNet
from mmalign.models._xomni_text import Fitting, XOmniText
from mmalign.models.layers.copies import place
from mmalign.models.layers.extras import copy_files, extra_folders
from mmalign.models.layers.qwen2 import qwen2_config
from mmalign.models.layers.siglip_vq import SiglipTokenizer, read_siglip_tokenizer
from mmalign.models.layers.weights import check_names, check_shapes, read_tensors
from mmalign.trajectory import Prompts, Trajectory
from mmalign.types import MmalignError, UsageError, digest

REVISION = 1  # of the sampler: raise it when equal weights, seed and settings give other samples
NEEDED = {"flux": "the folder of black-forest-labs/FLUX.1-dev, with whose text encoders and image coder the decoder draws"}
VISION_HEADS = {"siglip2_giant_patch16_384": 16, "siglip_so400m_patch16_384": 16}  # modeling_vit.py of the checkpoint
TEXT_FILES = ("config.json", "generation_config.json", "tokenizer*", "vocab.json", "merges.txt", "added_tokens.json")
MORE_FILES = ("special_tokens_map.json", "chat_template.*", "*.py")


class XOmniModel(CausalServing, XOmni):
    """An X-Omni with a name, a fingerprint and `generate`."""

    family = "xomni"
    capabilities = frozenset({"image", "answer", "choose", "train"})

    def __init__(self, path: Path, flux: Path, sampling: Any, device: str, dtype: str) -> None:
        content = hub.read_config(path)
        try:
            vision = content["vision_config"]
            net, vq = read_network(path, content, dtype).to(device).eval(), read_tokenizer(path, vision).to(device)
            text = XOmniText(path, content["mm_special_tokens"], content["vocab_size"], content["image_vocab_size"])
            fitting, part = Fitting.of(vision["transform"]), vision["decoder"]
            decoder = read_decoder(path / part["model_path"], flux, part, _dtype(vision), device)
        except KeyError as error:
            raise MmalignError(
                f"The config.json of {path} lacks {error}, which X-Omni's format needs. Download the folder again."
            ) from error
        if vq.codes != content["image_vocab_size"] or vq.patch != fitting.patch_size:
            raise MmalignError(
                f"The image tokenizer of {path} has {vq.codes} codes of {vq.patch} pixels; its config.json says "
                f"{content['image_vocab_size']} of {fitting.patch_size}. The folder mixes two checkpoints."
            )
        super().__init__(net, text, vq, fitting, decoder)
        self.path, self.flux, self.vision = path, flux, vision
        self.name, self.sampling_type = path.resolve().name, type(sampling)
        self.settings: Mapping[str, Any] = asdict(sampling)
        parts = [hub.fingerprint_weights(folder) for folder in (path, *(flux / name for name in PARTS))]
        self.fingerprint = digest(self.family, parts, dtype, REVISION)
        self.determinism = "bitwise" if self.device.type == "cpu" else "kernel"

    def policy(self, settings: Any) -> CutPolicy:
        return CutPolicy(settings.guidance, settings.temperature, min_p=settings.min_p, top_k=settings.top_k)

    def sized(self, size: tuple[int, int]) -> dict[str, Any]:
        return {"size": size}

    def render(self, prompts: Prompts, drawn: Trajectory, size: tuple[int, int] | None = None) -> torch.Tensor:
        """[B, 3, H, W] in [0, 1], of the size that the prompts were made for: FLUX sees their texts, and starts from the samples' seeds."""
        rows, columns = self.grid_of_prompts(prompts)
        return self.decode(drawn.actions, (rows * self.vq.patch, columns * self.vq.patch), prompts.texts, drawn.seeds)

    def wrong_size(self, size: tuple[int, int]) -> str:
        is_off = any(side % self.vq.patch or side < 1 for side in size)
        return f"draws sides of multiples of {self.vq.patch} pixels" if is_off else ""

    def wrong_picture(self, image_HWC: np.ndarray) -> str:
        return self.fitting.wrong(image_HWC.shape[:2])

    def save(self, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the official layout, FLUX's parts inside: `state` (the network's own if None); what does not change is linked or copied."""
        folder = Path(folder)
        copy_files(self.path, folder, (*TEXT_FILES, *MORE_FILES))
        tensors = (self.net.state_dict() if state is None else state).items()
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors}, folder / "model.safetensors", metadata={"format": "pt"})
        for file in (self.vision["encoder"]["siglip_path"], self.vision["encoder"]["projector_path"], self.vision["decoder"]["model_path"]):
            place(self.path / file, folder / file)
        for part in PARTS:
            place(self.flux / part, folder / "flux" / part)


def open_model(path: Path, sampling: Any, device: str, dtype: str, extra: Mapping[str, Path]) -> XOmniModel:
    """Read a checkpoint; an error says which folder, file, parameter or size is wrong."""
    if dtype not in DTYPES:
        raise UsageError(f"Unknown dtype '{dtype}'; X-Omni runs in {', '.join(DTYPES)}.")
    return XOmniModel(path, extra_folders(path, extra, NEEDED)["flux"], sampling, device, dtype)


def read_network(path: Path, content: Mapping[str, Any], dtype: str) -> Any:
    """The language model with the folder's weights: every parameter present, none left over. KeyError names what the config lacks."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    scaling = dict(content.get("rope_scaling") or {})
    rope = {"rope_type": scaling.pop("type", scaling.pop("rope_type", "default")), "rope_theta": content["rope_theta"], **scaling}
    settings = qwen2_config(content, rope)
    settings._attn_implementation = "sdpa"
    with torch.device("meta"):
        net = XOmniNet(settings, content["num_mm_adap_layers"], content["num_mm_head_layers"], content["mm_vocab_size"])
    tensors, expected = read_tensors(path), set(net.state_dict())
    check_names(expected - set(tensors), set(tensors) - expected, path)
    check_shapes(tensors, net, path)
    net.load_state_dict(tensors, assign=True)
    net.model.rotary_emb = Qwen2RotaryEmbedding(settings)  # its tables are no parameters, so they were made on no device
    return net.to(getattr(torch, dtype))


def read_tokenizer(path: Path, vision: Mapping[str, Any]) -> SiglipTokenizer:
    """The image tokenizer that vision_config names. KeyError names what the config lacks."""
    encoder = vision["encoder"]
    name = encoder.get("siglip_name")
    heads = encoder.get("heads", VISION_HEADS.get(name))
    if heads is None:
        raise MmalignError(
            f"The vision tower '{name}' of {path} is unknown, and no tensor shows how many heads it has. "
            f"Known: {', '.join(sorted(VISION_HEADS))}. Add `heads` to vision_config.encoder in config.json."
        )
    return read_siglip_tokenizer(path / encoder["siglip_path"], path / encoder["projector_path"], heads, _dtype(vision))


def _dtype(vision: Mapping[str, Any]) -> torch.dtype:
    return getattr(torch, vision["dtype"])
