"""Pixels: PNG round trips, typed errors for what cannot be read, and every named resize against golden values."""

import hashlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmalign import images
from mmalign.types import MmalignError

NOISE = np.random.default_rng(3).integers(0, 256, (37, 53, 3), dtype=np.uint8)
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))


def sha(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


@settings(deadline=None, max_examples=40)
@given(size=SIZES, seed=st.integers(0, 1000))
def test_png_is_lossless_and_repeatable(size, seed):
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    data = images.encode_png(image)
    assert np.array_equal(images.decode_image(data), image)
    assert images.content_sha(images.encode_png(image.copy())) == images.content_sha(data) == hashlib.sha256(data).hexdigest()


def test_a_view_that_is_not_contiguous_keeps_its_pixels():
    assert np.array_equal(images.decode_image(images.encode_png(NOISE[::-1, ::2])), NOISE[::-1, ::2])


def saved(picture: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_other_modes_become_rgb_and_exif_is_obeyed():
    grey = saved(Image.fromarray(NOISE[..., 0]))
    assert np.array_equal(images.decode_image(grey), np.repeat(NOISE[..., :1], 3, axis=2))
    with_alpha = saved(Image.fromarray(np.dstack([NOISE, np.zeros(NOISE.shape[:2], np.uint8)])))
    assert np.array_equal(images.decode_image(with_alpha), NOISE)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn anticlockwise
    assert np.array_equal(images.decode_image(saved(Image.fromarray(NOISE), exif=exif)), np.rot90(NOISE, -1))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no image"),
        (b"not an image at all", "no image"),
        (images.encode_png(NOISE)[:2000], "cannot be decoded"),
        (images.encode_png(NOISE)[:20], "decoded|no image"),
        (saved(Image.fromarray(NOISE[..., 0].astype(np.uint16) * 256)), "mode I.*8 bits"),
    ],
)
def test_unreadable_data_is_a_typed_error(data, words, tmp_path):
    with pytest.raises(images.ImageError, match=words):
        images.decode_image(data)
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    with pytest.raises(images.ImageError, match=str(path)):
        images.decode_image(path)


def test_an_absent_file_and_an_absurd_size_are_typed_errors(tmp_path, monkeypatch):
    with pytest.raises(images.ImageError, match="no image at .*absent.png"):
        images.decode_image(tmp_path / "absent.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(images.ImageError, match="absurd size"):
        images.decode_image(images.encode_png(NOISE))


@pytest.mark.parametrize("wrong", [None, NOISE.astype(np.float32), NOISE[..., 0], NOISE[..., :2], NOISE[:0], [[1, 2, 3]]])
def test_only_uint8_rgb_is_an_image(wrong):
    with pytest.raises(images.ImageError, match="uint8 array|empty"):
        images.encode_png(wrong)


@pytest.mark.parametrize(
    ("method", "golden"),
    [
        ("pil-nearest", "636f7318a51f8f78"),
        ("pil-bilinear", "96f88ecea4dfddf0"),
        ("pil-bicubic", "51d280c55f1c6aa6"),
        ("pil-lanczos", "21bd5877898b1455"),
    ],
)
def test_pil_resizes_are_the_named_ones(method, golden):
    assert sha(images.resize(NOISE, (24, 30), method)) == golden


@pytest.mark.parametrize(
    ("size", "golden"),
    [((80, 115), "500f943416a58c38"), ((20, 31), "4266c912a45c14a6"), ((37, 53), sha(NOISE)), ((18, 26), "812cd47832abbf8c")],
)
def test_the_opencv_resize_equals_opencv(size, golden):
    assert sha(images.resize(NOISE, size, "opencv-bilinear")) == golden  # of cv2.resize(..., INTER_LINEAR), OpenCV 5.0


@pytest.mark.parametrize(
    ("method", "antialias", "golden"),
    [
        ("bilinear", True, [0.472993, 0.557552, 0.521843]),
        ("bilinear", False, [0.474910, 0.596103, 0.622745]),
        ("bicubic", True, [0.466188, 0.563396, 0.519770]),
        ("bicubic", False, [0.504502, 0.621654, 0.649940]),
    ],
)
def test_tensor_resizes_are_the_named_ones(method, antialias, golden):
    small = images.resize_tensor(images.to_tensor(NOISE), (24, 30), method, antialias)
    assert small[0, :, 3, 4].tolist() == pytest.approx(golden, abs=1e-5)


def test_bicubic_on_tensors_is_not_clamped():
    small = images.resize_tensor(images.to_tensor(NOISE), (24, 30), "bicubic", antialias=False)
    assert small.min() < 0 and small.max() > 1


def test_an_unknown_filter_is_refused_with_the_known_ones():
    with pytest.raises(MmalignError, match="no resize 'bicubic'; .*pil-bicubic.*opencv-bilinear"):
        images.resize(NOISE, (4, 4), "bicubic")


def test_side_rules():
    assert images.short_side((100, 151), 224) == (224, 338)  # truncated, not rounded
    assert images.short_side((151, 100), 224) == (338, 224)
    assert images.short_side((3, 1000), 2) == (2, 666)
    assert images.long_side((100, 151), 224) == (148, 224)
    assert images.long_side((1, 1000), 224) == (1, 224)


@given(size=SIZES, side=st.integers(1, 40))
def test_crop_and_pad_have_the_size_asked_for_and_keep_the_middle(size, side):
    image = np.full((*size, 3), 255, np.uint8)
    cropped = images.centre_crop(image, side)
    assert cropped.shape == (side, side, 3)
    assert (cropped == 255).all(2).sum() == min(side, size[0]) * min(side, size[1])
    padded = images.pad_square(image)
    assert padded.shape == (max(size), max(size), 3) and (padded == 255).all(2).sum() == size[0] * size[1]


def test_odd_margins():
    ramp = np.repeat(np.arange(7, dtype=np.uint8)[:, None, None], 3, axis=2).repeat(4, axis=1)
    assert images.centre_crop(ramp, 4)[:, 0, 0].tolist() == [2, 3, 4, 5]  # margin 1.5 is rounded to 2
    assert images.pad_square(ramp[:4, :3])[0, :, 0].tolist() == [0, 0, 0, 0]
    assert (images.pad_square(ramp[1:5, :3], (9, 9, 9))[:, -1] == 9).all()


def test_network_inputs():
    clip, hps = images.clip_pixels(NOISE, 24), images.hps_pixels(NOISE, 24)
    assert clip.shape == hps.shape == (1, 3, 24, 24)
    assert clip[0, :, 12, 12].tolist() == pytest.approx([0.704068, 0.484060, -0.399495], abs=1e-5)
    assert hps[0, :, 12, 12].tolist() == pytest.approx([0.156063, 1.035631, 0.650544], abs=1e-5)
    black = [-mean / std for mean, std in zip(images.CLIP_MEAN, images.CLIP_STD, strict=True)]
    assert hps[0, :, 0, 0].tolist() == pytest.approx(black, abs=1e-5)  # padding comes before normalisation
    assert not images.hps_pixels(NOISE, 24, antialias=False).equal(hps)
