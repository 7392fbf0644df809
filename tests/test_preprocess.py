"""Preprocessing is exact: equal to PIL, to transformers' processors and to HPSv2's steps, and its tensor form is the same function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.tiny_scorers import image
from PIL import Image

from mmalign.images import CLIP_MEAN, CLIP_STD
from mmalign.scorers._preprocess import CropCentre, PadSquare, Squash

MEAN, STD = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
SHAPES = [(48, 48), (40, 75), (75, 40), (224, 224), (20, 90), (31, 64)]


def to_unit(x_BCHW: torch.Tensor) -> torch.Tensor:
    return x_BCHW * STD + MEAN


@pytest.mark.parametrize("shape", SHAPES)
def test_the_crop_is_that_of_clip(shape: tuple[int, int]) -> None:
    picture = Image.fromarray(image(0, *shape))
    width, height = picture.size
    size = (32, int(32 * height / width)) if width <= height else (int(32 * width / height), 32)
    small = np.asarray(picture.resize(size, Image.Resampling.BICUBIC), np.float32) / 255
    top, left = int(round((size[1] - 32) / 2.0)), int(round((size[0] - 32) / 2.0))
    expected = (small[top : top + 32, left : left + 32] - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    got = CropCentre(32).image(image(0, *shape))
    assert got.shape == (1, 3, 32, 32)
    np.testing.assert_allclose(got[0].permute(1, 2, 0).numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_down_is_that_of_transformers(shape: tuple[int, int]) -> None:
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = processor(Image.fromarray(image(1, *shape)), return_tensors="pt").pixel_values
    torch.testing.assert_close(CropCentre(32, rounding="down").image(image(1, *shape)), expected, atol=2e-6, rtol=0)


def test_the_two_roundings_differ_where_the_margin_is_odd() -> None:
    picture = image(2, 32, 35)  # margin 3: half to even starts at 2, down at 1
    even, down = CropCentre(32).image(picture), CropCentre(32, rounding="down").image(picture)
    assert torch.equal(even[..., :-1], down[..., 1:]) and not torch.equal(even, down)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("shape", [(48, 48), (40, 75), (90, 20)])
def test_hpsv2_resizes_floats_then_pads_with_black_then_normalises(shape: tuple[int, int], antialias: bool) -> None:
    picture = image(3, *shape)
    floats = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    scale = 32 / max(shape)
    height, width = round(shape[0] * scale), round(shape[1] * scale)
    small = torch.nn.functional.interpolate(floats, (height, width), mode="bicubic", antialias=antialias)
    square = torch.zeros(1, 3, 32, 32)
    top, left = (32 - height) // 2, (32 - width) // 2
    square[..., top : top + height, left : left + width] = small
    torch.testing.assert_close(PadSquare(32, antialias).image(picture), (square - MEAN) / STD, atol=1e-6, rtol=0)


@pytest.mark.parametrize("number,name", [(2, "pil-bilinear"), (3, "pil-bicubic")])
def test_the_squash_is_that_of_vit(number: int, name: str) -> None:
    from transformers import ViTImageProcessorPil

    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, resample=number, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    expected = processor(Image.fromarray(image(4, 50, 75)), return_tensors="pt").pixel_values
    got = Squash((32, 32), name, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)).image(image(4, 50, 75))
    torch.testing.assert_close(got, expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("preprocess", [CropCentre(32), CropCentre(32, rounding="down"), PadSquare(32)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_tensor_form_differs_by_rounding_only(preprocess: CropCentre | PadSquare, shape: tuple[int, int]) -> None:
    picture = image(5, *shape)
    floats = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    difference = (to_unit(preprocess.image(picture)) - to_unit(preprocess.tensor(floats))).abs()
    assert difference.max() < (1.6 / 255 if isinstance(preprocess, CropCentre) else 1e-6)  # two passes of 8-bit rounding in PIL


@pytest.mark.parametrize("preprocess", [CropCentre(16), PadSquare(16), Squash((16, 16), "pil-bilinear", CLIP_MEAN, CLIP_STD)])
def test_gradients_flow_through_the_tensor_form(preprocess: CropCentre | PadSquare | Squash) -> None:
    pixels = (0.25 + 0.5 * torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(0))).double().requires_grad_()
    weight = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    (weight * preprocess.tensor(pixels)).sum().backward()
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(2)).double()
    step = 1e-4
    with torch.no_grad():
        ahead, behind = ((weight * preprocess.tensor(pixels + sign * step * direction)).sum() for sign in (1, -1))
    assert pixels.grad is not None
    assert float((pixels.grad * direction).sum()) == pytest.approx(float(ahead - behind) / (2 * step), rel=1e-5)
