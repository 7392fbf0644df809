"""The KL autoencoder of latent diffusion in CompVis' own layout: kl16.ckpt of MAR (LTH14/mar) and Harmon, ae.safetensors of FLUX and BAGEL.

Pictures become the means of a Gaussian, 16 or 8 pixels per side to one latent. Sizes come from the tensors, the attention of a level from
its being there. It runs in float32 always: half precision leaves visible bands in flat colours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmalign.models.layers.ldm import decoder_for, encoder_for
from mmalign.models.layers.weights import check_names, check_shapes
from mmalign.types import MmalignError

UNUSED = re.compile(r"loss\.")  # the discriminator that training scripts keep beside the autoencoder


class KlAutoencoder(nn.Module):
    """Encoder and decoder. `channels` of a latent, `stride` pixels per side of one."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, channels: int, stride: int) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.channels, self.stride = channels, stride

    @torch.no_grad()
    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, c, h, w] means of pixels in [0, 1], whose sides are multiples of `stride`."""
        return self.encoder(pixels_BCHW.float() * 2 - 1)[:, : self.channels]

    def decode(self, z_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] pixels, about [0, 1] and not clipped, of latents."""
        return (self.decoder(z_BCHW.float()) + 1) / 2

    def original_state(self) -> dict[str, Tensor]:
        """The tensors under the names of the file."""
        return {_moved(name, back=True): value for name, value in self.state_dict().items()}


def kl_autoencoder(tensors: Mapping[str, Tensor], where: object, projects: bool = True) -> KlAutoencoder:
    """The autoencoder of the tensors, every parameter present and none left over; MmalignError says what is wrong.

    `projects`: 1 x 1 convolutions stand at the latents (FLUX's has none).
    """
    given = {_moved(name): value.float() for name, value in tensors.items() if not UNUSED.match(name)}
    parts = {
        part: {name.removeprefix(f"{part}."): value for name, value in given.items() if name.startswith(f"{part}.")}
        for part in ("encoder", "decoder")
    }
    try:
        with torch.device("meta"):
            encoder, decoder = encoder_for(parts["encoder"], projects), decoder_for(parts["decoder"], projects)
        model = KlAutoencoder(encoder, decoder, parts["decoder"]["conv_in.weight"].shape[1], 2 ** (len(encoder.down) - 1))
    except (KeyError, IndexError) as error:
        raise MmalignError(f"{where} holds no KL autoencoder: it lacks {error}. Give the right file, or download it again.") from error
    expected = set(model.state_dict())
    check_names(expected - set(given), set(given) - expected, where)
    check_shapes(given, model, where)
    model.load_state_dict(given, assign=True)
    return model.eval().requires_grad_(False)


def _moved(name: str, back: bool = False) -> str:
    """The 1 x 1 convolutions at the latents stand beside encoder and decoder in the file, inside them here."""
    for ours, theirs in (("encoder.quant_conv.", "quant_conv."), ("decoder.post_quant_conv.", "post_quant_conv.")):
        old, new = (ours, theirs) if back else (theirs, ours)
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
