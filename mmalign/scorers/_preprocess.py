"""What a network sees of an image: CLIP's crop, HPSv2's pad and ViT's squash, each for an image and, differentiably, for a tensor.

`image` takes uint8 RGB [H, W, 3] and is exact: the original's filter, rounding and order; `images` gives the same for several of any
sizes, whose normalisation is then one operation. `tensor` takes floats [B, 3, H, W] in [0, 1] of
any size, lets gradients through and gives the same pixels where the original resizes tensors (HPSv2); where it resizes 8-bit images, the
tensor path lacks only the rounding to 256 levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from mmalign.images import CLIP_MEAN, CLIP_STD, Filter, Size, long_side, normalise, resize, resize_tensor, short_side, to_tensor

if TYPE_CHECKING:
    import numpy as np
    import torch

Triple = tuple[float, float, float]


class Preprocess(Protocol):
    """Pixels to network input [B, 3, S, S]; frozen dataclasses, so that their fields enter the scorer's fingerprint."""

    def image(self, image_HWC: np.ndarray) -> torch.Tensor: ...

    def images(self, images: Sequence[np.ndarray]) -> torch.Tensor: ...

    def tensor(self, x_BCHW: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class CropCentre:
    """CLIP's: short side to `side` by bicubic, central square, mean and deviation.

    `rounding` of an odd margin: "even" (half to even, torchvision's CenterCrop: OpenAI CLIP, ImageReward, aesthetic) or "down"
    (transformers' image processors: PickScore).
    """

    side: int = 224
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD
    rounding: Literal["even", "down"] = "even"

    def image(self, image_HWC: np.ndarray) -> torch.Tensor:
        return self.images([image_HWC])

    def images(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        return _normalised([self._cropped(image) for image in images], self.mean, self.std)

    def _cropped(self, image_HWC: np.ndarray) -> np.ndarray:
        height, width = short_side(_size(image_HWC), self.side)
        return resize(image_HWC, (height, width), "pil-bicubic")[self._window(height), self._window(width)]

    def tensor(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        height, width = size = short_side((x_BCHW.shape[-2], x_BCHW.shape[-1]), self.side)
        if size != tuple(x_BCHW.shape[-2:]):
            x_BCHW = resize_tensor(x_BCHW, size, "bicubic", antialias=True).clamp(0, 1)  # 8-bit images cannot overshoot
        return normalise(x_BCHW[..., self._window(height), self._window(width)], self.mean, self.std)

    def _window(self, length: int) -> slice:
        margin = length - self.side
        start = round(margin / 2) if self.rounding == "even" else margin // 2
        return slice(start, start + self.side)


@dataclass(frozen=True)
class PadSquare:
    """HPSv2's: long side to `side` by bicubic on the float tensor, black up to the square, and only then mean and deviation.

    Source: tgxs002/HPSv2 hpsv2/src/open_clip/transform.py at 866735e. torchvision antialiases this resize since 0.17; the environment that
    the published scores come from did not: `antialias` is the switch.
    """

    side: int = 224
    antialias: bool = True
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD

    def image(self, image_HWC: np.ndarray) -> torch.Tensor:
        return self.tensor(to_tensor(image_HWC))

    def images(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        import torch

        return torch.cat([self.image(image) for image in images])

    def tensor(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        height, width = size = long_side((x_BCHW.shape[-2], x_BCHW.shape[-1]), self.side)
        if size != tuple(x_BCHW.shape[-2:]):
            x_BCHW = resize_tensor(x_BCHW, size, "bicubic", self.antialias)
        top, left = (self.side - height) // 2, (self.side - width) // 2
        square = functional.pad(x_BCHW, (left, self.side - width - left, top, self.side - height - top))
        return normalise(square, self.mean, self.std)


@dataclass(frozen=True)
class Squash:
    """ViT's: the whole image to `size` whatever its aspect, by the filter that its processor's file names."""

    size: Size
    method: Filter
    mean: Triple
    std: Triple

    def image(self, image_HWC: np.ndarray) -> torch.Tensor:
        return self.images([image_HWC])

    def images(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        return _normalised([resize(image, self.size, self.method) for image in images], self.mean, self.std)

    def tensor(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        method: Literal["bilinear", "bicubic"] = "bicubic" if self.method == "pil-bicubic" else "bilinear"
        return normalise(resize_tensor(x_BCHW, self.size, method, antialias=True).clamp(0, 1), self.mean, self.std)


def _normalised(images: Sequence[np.ndarray], mean: Triple, std: Triple) -> torch.Tensor:
    """Network input [B, 3, H, W] of 8-bit images of one size."""
    import numpy as np
    import torch

    return normalise(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div(255), mean, std)


def _size(image_HWC: np.ndarray) -> Size:
    return image_HWC.shape[0], image_HWC.shape[1]
