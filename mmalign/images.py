"""Pixels: PNG in and out, named resizes, crops and pads. Every filter has a name, because a silent other one moves scores.

An image is a numpy uint8 RGB array [H, W, 3] (`image_HWC`); a batch for a network is a float tensor [B, 3, H, W] in [0, 1] (`x_BCHW`).
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmalign.types import MmalignError

if TYPE_CHECKING:
    import numpy as np
    import torch

Size = tuple[int, int]  # height, width
Filter = Literal["pil-nearest", "pil-bilinear", "pil-bicubic", "pil-lanczos", "pil-box", "opencv-bilinear"]
TensorFilter = Literal["bilinear", "bicubic"]

PIL_FILTERS = {"pil-nearest": "NEAREST", "pil-bilinear": "BILINEAR", "pil-bicubic": "BICUBIC", "pil-lanczos": "LANCZOS", "pil-box": "BOX"}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


class ImageError(MmalignError):
    """An image that cannot be read or is not what it should be; the text says which file and what is wrong with it."""


def encode_png(image_HWC: Any) -> bytes:
    """The PNG file of an image: lossless, without time stamps, so equal pixels give equal bytes on one machine."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(check_image(image_HWC)).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def decode_image(source: bytes | Path | str) -> np.ndarray:
    """The RGB pixels [H, W, 3] of an encoded image or of a file, turned upright as its EXIF tag says; transparency is dropped.

    ImageError when the file is absent, damaged, cut short, of absurd size, or holds more than 8 bits a channel (which PIL would clip).
    """
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    where = f"{len(source)} bytes in memory" if isinstance(source, bytes) else str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            if opened.mode not in EIGHT_BIT_MODES:
                raise ImageError(f"The image ({where}) has mode {opened.mode}; expected 8 bits a channel. Save it as an 8-bit RGB PNG.")
            return np.array(ImageOps.exif_transpose(opened).convert("RGB"))
    except FileNotFoundError as error:
        raise ImageError(f"There is no image at {where}.") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"This is no image, or a damaged one: {where}. Generate it again, or delete the file.") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"The image ({where}) claims an absurd size: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what PIL raises on cut or corrupt streams
        raise ImageError(f"The image cannot be decoded ({where}): {error}. Generate it again, or delete the file.") from error


def content_sha(data: bytes) -> str:
    """sha256 (64 hex digits) of an encoded image: its name in the store."""
    return hashlib.sha256(data).hexdigest()


def check_image(image_HWC: Any) -> np.ndarray:
    """The same array when it is a non-empty uint8 [H, W, 3]; ImageError with what it is otherwise."""
    import numpy as np

    if not isinstance(image_HWC, np.ndarray) or image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3:
        got = f"{image_HWC.dtype} {list(image_HWC.shape)}" if isinstance(image_HWC, np.ndarray) else type(image_HWC).__name__
        raise ImageError(f"An image is a uint8 array [H, W, 3]; got {got}.")
    if not image_HWC.size:
        raise ImageError(f"The image is empty: {list(image_HWC.shape)}.")
    return np.ascontiguousarray(image_HWC)


def short_side(size: Size, target: int) -> Size:
    """The size whose short side is `target`; the long side is truncated, as torchvision's and CLIP's Resize do."""
    height, width = size
    return (target, max(1, int(target * width / height))) if height <= width else (max(1, int(target * height / width)), target)


def long_side(size: Size, target: int) -> Size:
    """The size whose long side is `target`; the short side is rounded half to even, as open_clip's ResizeMaxSize (HPSv2) does."""
    scale = target / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def resize(image_HWC: np.ndarray, size: Size, method: Filter) -> np.ndarray:
    """The image at `size`, in 8 bits; any aspect ratio, so this is also the squash. PIL antialiases when it shrinks, OpenCV never does."""
    import numpy as np
    from PIL import Image

    check_image(image_HWC)
    if method == "opencv-bilinear":
        return _opencv_bilinear(image_HWC, size)
    if method not in PIL_FILTERS:
        raise MmalignError(f"There is no resize '{method}'; there are {', '.join([*PIL_FILTERS, 'opencv-bilinear'])}.")
    return np.array(Image.fromarray(image_HWC).resize((size[1], size[0]), Image.Resampling[PIL_FILTERS[method]]))


def _opencv_bilinear(image_HWC: np.ndarray, size: Size) -> np.ndarray:
    """OpenCV's INTER_LINEAR for 8 bits, to the bit: 11-bit weights, two truncating shifts; plain bilinear misses one pixel in 8 by 1."""
    import numpy as np

    left, right, left_weight, right_weight = _opencv_taps(image_HWC.shape[1], size[1], clear_edges=True)
    upper, lower, upper_weight, lower_weight = _opencv_taps(image_HWC.shape[0], size[0], clear_edges=False)
    wide = image_HWC.astype(np.int32)
    across = (wide[:, left] * left_weight[:, None] + wide[:, right] * right_weight[:, None]) >> 4
    down = (across[upper] * upper_weight[:, None, None] >> 16) + (across[lower] * lower_weight[:, None, None] >> 16)
    return (down + 2 >> 2).clip(0, 255).astype(np.uint8)


def _opencv_taps(n_in: int, n_out: int, clear_edges: bool) -> tuple[np.ndarray, ...]:
    """Both neighbours of each output position and their weights in 1/2048; OpenCV gives outer columns, but not rows, to one neighbour."""
    import numpy as np

    position = ((np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5).astype(np.float32)
    first = np.floor(position).astype(np.int64)
    fraction = (position - first).astype(np.float32)
    if clear_edges:
        fraction[(first < 0) | (first >= n_in - 1)] = 0
    weights = [np.rint(part * np.float32(2048)).astype(np.int32) for part in (1 - fraction, fraction)]
    return first.clip(0, n_in - 1), (first + 1).clip(0, n_in - 1), *weights


def resize_tensor(x_BCHW: torch.Tensor, size: Size, method: TensorFilter, antialias: bool) -> torch.Tensor:
    """The batch at `size` by torch, as torchvision >= 0.17 does with antialias on. Bicubic may leave [0, 1]: it is not clamped.

    `antialias` has no default: HPSv2's environment of 2023 had it off, today's library has it on.
    """
    from torch.nn import functional

    return functional.interpolate(x_BCHW, size=size, mode=method, antialias=antialias, align_corners=False)


def centre_crop(image_HWC: np.ndarray, side: int) -> np.ndarray:
    """The central square; a smaller image is first padded with black. Odd margins round half to even, as torchvision's CenterCrop."""
    import numpy as np

    height, width = image_HWC.shape[:2]
    if height < side or width < side:
        tall, wide = max(side, height), max(side, width)
        canvas = np.zeros((tall, wide, 3), np.uint8)
        top, left = (tall - height) // 2, (wide - width) // 2
        canvas[top : top + height, left : left + width] = image_HWC
        image_HWC, height, width = canvas, tall, wide
    top, left = round((height - side) / 2), round((width - side) / 2)
    return np.ascontiguousarray(image_HWC[top : top + side, left : left + side])


def pad_square(image_HWC: np.ndarray, fill: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    """The image in the middle of the smallest square that holds it; an odd margin has its extra pixel at the bottom or right."""
    import numpy as np

    height, width = image_HWC.shape[:2]
    side = max(height, width)
    canvas = np.empty((side, side, 3), np.uint8)
    canvas[:] = fill
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = image_HWC
    return canvas


def to_tensor(image_HWC: np.ndarray) -> torch.Tensor:
    """[1, 3, H, W] float32 in [0, 1]."""
    import torch

    return torch.from_numpy(check_image(image_HWC).copy()).permute(2, 0, 1)[None].float().div(255)


def normalise(x_BCHW: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """(x - mean) / std, per channel."""
    import torch

    column = [-1, 1, 1]
    return (x_BCHW - torch.tensor(mean).view(column).to(x_BCHW)) / torch.tensor(std).view(column).to(x_BCHW)


def clip_pixels(image_HWC: np.ndarray, side: int = 224) -> torch.Tensor:
    """CLIP's own preprocessing, [1, 3, side, side]: short side by PIL bicubic, centre crop, CLIP mean and deviation (open_clip, OpenAI)."""
    small = resize(image_HWC, short_side(image_HWC.shape[:2], side), "pil-bicubic")
    return normalise(to_tensor(centre_crop(small, side)), CLIP_MEAN, CLIP_STD)


def hps_pixels(image_HWC: np.ndarray, side: int = 224, antialias: bool = True) -> torch.Tensor:
    """HPSv2's preprocessing, [1, 3, side, side]: long side by tensor bicubic, black pad to the square, then mean and deviation.

    Source: tgxs002/HPSv2 src/open_clip/transform.py at 866735e (ToTensor comes first there, so the resize runs on floats).
    """
    from torch.nn import functional

    height, width = long_side(image_HWC.shape[:2], side)
    small = resize_tensor(to_tensor(image_HWC), (height, width), "bicubic", antialias)
    top, left = (side - height) // 2, (side - width) // 2
    square = functional.pad(small, (left, side - width - left, top, side - height - top))
    return normalise(square, CLIP_MEAN, CLIP_STD)
