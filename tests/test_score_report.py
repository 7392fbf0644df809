"""The page of a scored folder: its table, its gallery, heat maps over the images, and that nothing of a prompt becomes markup."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_questions as tiny
from helpers.browser import Page, Visitor

from mmalign.images import encode_png
from mmalign.score_report import write_score_report
from mmalign.scoring import Scored, Scores
from mmalign.types import Failure, MmalignError, Prompt, Request, Sample, Score, Value, digest
from mmalign.worker import Description

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"quoted\" & 'single'"
BROKEN = Failure("score", "error", "This is no image <b>at all</b>.")


def described(name: str) -> Description:
    return Description(name, f"fingerprint-of-{name}", {"range": (0.0, 1.0)}, {"model": "tiny", "empty": ""}, {}, {"device": "cpu"})


def scored(folder: Path, count: int = 12) -> Scores:
    """`count` images in two folders, two scorers that disagree on them; the last image is damaged and its prompt hostile."""
    rows = []
    for number in range(count):
        name, prompt = f"{'a b' if number % 2 else 'c#d'}/{number}.png", f"a thing of number {number}"
        path, is_bad = folder / name, number == count - 1
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"none" if is_bad else encode_png(tiny.picture(number, 300, 200)))
        good: Mapping[str, Score] = {"bright": Value(number / 10, {"part": 1.0}, detail="seen"), "sharp": Value(-float(number % 3))}
        sample = Sample(Request(Prompt(name, HOSTILE if is_bad else prompt), number, number), image_sha=digest(name))
        rows.append(Scored(name, path, sample, {"bright": BROKEN, "sharp": BROKEN} if is_bad else good))
    return Scores(rows, {name: described(name) for name in ("bright", "sharp")})


def with_maps(scores: Scores, folder: Path) -> dict[tuple[str, str], Path]:
    """A red square for every value of `bright`."""
    maps = {}
    for row in scores.rows[:-1]:
        maps[row.name, "bright"] = path = folder / f"{row.name}.bright.shap.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(np.full((20, 20, 3), (255, 30, 0), np.uint8)))
    return maps


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shown")
    scores, out = scored(root / "images"), root / "images" / "scores.report"
    return write_score_report(scores, out, with_maps(scores, out / "maps"), "shap")


def test_the_table_holds_what_the_terminal_prints_and_who_measured(shown: Path) -> None:
    page = Page(shown)
    text = " ".join(" ".join(page.text).split())
    assert "Scorers scorer mean least greatest images failed bright 0.5 0 1 11 1 error sharp -0.9091 -2 0 11 1 error" in text
    assert "bright, sharp: 22 values, 2 failures. Heat maps by shap: red is what earned the score." in text
    assert "fingerprint-of-bright" in text and "model tiny" in text and "empty" not in text


def test_each_image_links_to_its_file_its_thumbnail_and_its_maps(shown: Path) -> None:
    items = Page(shown).data["items"]
    assert [item["id"] for item in items[:2]] == ["c#d/0.png", "a b/1.png"]
    for item in items[:-1]:
        (cell,) = item["cells"]
        assert cell["source"] == "../" + item["id"].replace(" ", "%20").replace("#", "%23")
        assert list(cell["maps"]) == ["bright"] and cell["maps"]["bright"].startswith("maps/")
        assert (shown.parent / "thumbnails" / cell["sha"][:2] / f"{cell['sha']}.webp").is_file()
        assert cell["size"] == "200 × 300" and set(cell["scores"]) == {"bright", "sharp"} and "spread" in item
    (broken,) = items[-1]["cells"]
    assert "maps" not in broken and "cannot be read" in broken["lost"] and len(broken["failures"]) == 2


def test_a_prompt_never_becomes_markup(shown: Path) -> None:
    page = Page(shown)
    assert page.data["items"][-1]["prompt"] == HOSTILE
    assert len(page.named("script")) == 2 and not page.named("img") and "onerror" not in str(page.elements)
    assert "default-src 'none'" in str(page.named("meta"))


def test_without_maps_there_is_no_switch_for_them(tmp_path: Path) -> None:
    page = Page(write_score_report(scored(tmp_path / "images", 3), tmp_path / "page"))
    assert not [attributes for attributes in page.named("input") if attributes.get("id") == "maps"]
    assert "Heat maps" not in page.content and all("maps" not in item["cells"][0] for item in page.data["items"])


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(MmalignError, match="Could not use .*taken"):
        write_score_report(scored(tmp_path / "images", 2), tmp_path / "taken")


# -- in a browser ----------------------------------------------------------------------------------------------------------------------

SOURCES = "return [...document.querySelectorAll('.card img')].map(image => image.getAttribute('src').split('/')[0])"


def test_the_gallery_shows_maps_filters_sorts_and_enlarges(browser, shown: Path) -> None:
    page = Visitor(browser, shown)
    assert page.count == "1–12 of 12" and page.all_images_load()
    assert page.run(SOURCES) == ["maps"] * 11
    page.choose("scorer", "sharp")
    assert page.run(SOURCES) == ["thumbnails"] * 11, "sharp has no maps"
    page.choose("scorer", "bright")
    page.click("#maps")
    assert page.run(SOURCES) == ["thumbnails"] * 11 and page.all_images_load()
    page.choose("order", "best")
    assert page.cards[:2] == ["c#d/10.png", "a b/9.png"]
    page.click("[data-view=failed]")
    assert page.cards == ["a b/11.png"]
    page.click("[data-view=all]")
    page.click(".card")
    assert page.enlarged is not None and "a thing of number 10" in page.enlarged and "bright 1.000" in page.enlarged
    assert page.run("return document.querySelectorAll('dialog img').length") == 2
    images = "return [...document.querySelectorAll('dialog img')].map(image => image.naturalWidth)"
    assert page.all_images_load() and page.run(images) == [200, 20], "the original and its map"
    page.assert_quiet()


def test_a_hostile_prompt_is_shown_as_written(browser, shown: Path) -> None:
    page = Visitor(browser, shown, "#a%20b%2F11.png")
    assert page.enlarged is not None and HOSTILE in page.enlarged and "<b>at all</b>" in page.enlarged
    page.assert_quiet()
