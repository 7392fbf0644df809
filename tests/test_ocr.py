"""OCR accuracy: the definition on strings, and the real reader on rendered text. JPEG size beside it: no weights either."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.tiny_scorers import image, sample
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from mmalign.scorers import jpeg_size, ocr
from mmalign.types import Failure, Value


def written(text: str, size: int = 40) -> np.ndarray:
    """Black text on white, 128 x 320."""
    picture = Image.new("RGB", (320, 128), "white")
    ImageDraw.Draw(picture).text((20, 40), text, fill="black", font=ImageFont.load_default(size))
    return np.asarray(picture)


@pytest.mark.parametrize(
    "recognised,target,distance",
    [
        ("hello", "hello", 0),
        ("xxhelloyy", "hello", 0),
        ("helo", "hello", 1),
        ("", "hello", 5),
        ("abcdefghijkl", "hello", 5),
        ("hallo", "hello", 1),
    ],
)
def test_the_score_is_one_minus_edits_per_letter(recognised: str, target: str, distance: int) -> None:
    assert ocr.accuracy(recognised, target) == (1 - distance / len(target), distance)


def levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


@given(st.text("abc", max_size=8), st.text("abc", min_size=1, max_size=6))
def test_the_score_is_in_range_and_by_the_textbook_distance(recognised: str, target: str) -> None:
    share, _ = ocr.accuracy(recognised, target)
    expected = 0 if target in recognised else min(levenshtein(recognised, target), len(target))
    assert share == pytest.approx(1 - expected / len(target)) and 0 <= share <= 1


@pytest.mark.parametrize(
    "prompt,fixed,upstream",
    [
        ('a sign that says "Open Now"', "opennow", "opennow"),
        ("a sign that says “Open Now”", "opennow", ""),
        ("ein Schild: „Offen“", "offen", ""),
        ('first "one" then "two"', "one", "one"),
        ('nothing in ""', "", ""),
        ("nothing at all", "", ""),
        ('never "closed', "", "closed"),
    ],
)
def test_the_target_is_the_first_quoted_text(prompt: str, fixed: str, upstream: str) -> None:
    assert ocr.target_of(prompt) == fixed and ocr.target_of(prompt, "upstream") == upstream


def test_a_prompt_that_quotes_nothing_is_a_failure_and_a_broken_reader_too() -> None:
    def broken(picture: np.ndarray) -> SimpleNamespace:
        raise RuntimeError("no session")

    reader = ocr.OcrScorer(ocr.Config(), broken)
    quoteless, broke = reader.score([sample(0, "a cat"), sample(1, 'says "cat"')])
    assert isinstance(quoteless, Failure) and quoteless.kind == "missing" and "quotes no text" in quoteless.message
    assert isinstance(broke, Failure) and "no session" in broke.message
    (upstream,) = ocr.OcrScorer(ocr.Config(compat="upstream"), broken).score([sample(1, 'says "cat"')])
    assert isinstance(upstream, Value) and upstream.x == 0.0


def test_colours_reach_the_reader_in_its_own_order() -> None:
    seen = []

    def reader(picture: np.ndarray) -> SimpleNamespace:
        seen.append(picture[0, 0].tolist())
        return SimpleNamespace(txts=None)

    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 200
    for compat in ("fixed", "upstream"):
        (score,) = ocr.OcrScorer(ocr.Config(compat), reader).score([sample(0, 'says "cat"', red)])
        assert isinstance(score, Value) and score.x == 0.0
    assert seen == [[0, 0, 200], [200, 0, 0]]


def test_the_real_reader_reads() -> None:
    pytest.importorskip("rapidocr", reason="the extra 'ocr' carries the reader: pip install 'mmalign[ocr]'")
    scorer = ocr.load()
    right, wrong, blank = scorer.score(
        [
            sample(0, 'a sign that says "Hello World"', written("Hello World")),
            sample(1, 'a sign that says "Hello World"', written("Hello Word")),
            sample(2, 'a sign that says "Hello World"', np.full((64, 64, 3), 255, np.uint8)),
        ]
    )
    assert isinstance(right, Value) and isinstance(wrong, Value) and isinstance(blank, Value)
    assert right.x == 1.0 and "hello" in right.detail.lower()
    assert wrong.x == pytest.approx(0.9) and wrong.parts == {"distance": 1.0}
    assert blank.x == 0.0 and scorer.fingerprint == ocr.load().fingerprint


def test_jpeg_size_is_the_length_of_the_file() -> None:
    picture = image(0, 64, 80)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=95)
    kilobytes = len(buffer.getvalue()) / 1000
    (large,) = jpeg_size.load().score([sample(0, picture=picture)])
    (small,) = jpeg_size.load(jpeg_size.Config("small")).score([sample(0, picture=picture)])
    assert isinstance(large, Value) and large.x == kilobytes
    assert isinstance(small, Value) and small.x == pytest.approx(-kilobytes / 500) and small.parts == large.parts
    noise = np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)
    (noisy,) = jpeg_size.load().score([sample(0, picture=noise)])
    assert isinstance(noisy, Value) and noisy.x > 2 * large.x
