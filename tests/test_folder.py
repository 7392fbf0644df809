"""Images that exist already: the official layouts, and what is missing or broken."""

import numpy as np
import pytest

from mmalign.images import encode_png
from mmalign.models import folder as family
from mmalign.types import Failure, MmalignError, Prompt, Request, UsageError


def picture(value):
    return np.full((5, 4, 3), value, np.uint8)


def write(root, name, value=7):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(picture(value)))


@pytest.mark.parametrize(
    ("name", "prompt", "index"),
    [
        ("00007/samples/0002.png", Prompt("7", "a cat"), 2),
        ("00007/samples/00002.png", Prompt("geneval-7", "a cat", meta={"index": 7}), 2),
        ("00007/samples/2.png", Prompt("00007", "a cat"), 2),
        ("dog/1.png", Prompt("dog", "a dog"), 1),
        ("dog/0001.png", Prompt("dog", "a dog"), 1),
        ("dog_3.png", Prompt("dog", "a dog"), 3),
        ("dog-3.png", Prompt("dog", "a dog"), 3),
        ("dog.png", Prompt("dog", "a dog"), 0),
        ("12.png", Prompt("12", "a dog"), 0),
        ("a red book and a yellow vase_000004.png", Prompt("color/4", "a red book and a yellow vase"), 4),
    ],
)
def test_every_official_layout_is_found(tmp_path, name, prompt, index):
    write(tmp_path, name)
    write(tmp_path, "other/file.png", 9)
    model = family.load(tmp_path)
    (sample,) = model.generate([Request(prompt, index, 0)])
    assert not isinstance(sample, Failure) and (sample.image == 7).all() and sample.extra == {"file": name}


def test_a_missing_image_is_a_hole_and_not_another_image(tmp_path):
    write(tmp_path, "00001/samples/0000.png")
    model = family.load(tmp_path)
    found, absent, other = model.generate(
        [Request(Prompt("1", "x"), 0, 0), Request(Prompt("1", "x"), 1, 0), Request(Prompt("2", "x"), 0, 0)]
    )
    assert found.image.shape == (5, 4, 3)
    assert absent.kind == other.kind == "missing" and "image 1 of prompt '1'" in absent.message and "1/samples/0001.png" in absent.message


def test_an_unreadable_image_is_an_error(tmp_path):
    write(tmp_path, "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    results = family.load(tmp_path).generate([Request(Prompt(id, "x"), 0, 0) for id in ("a", "b")])
    assert results[0].image is not None and results[1].kind == "error" and "b.png" in results[1].message


def test_prompt_ids_cannot_leave_the_folder(tmp_path):
    write(tmp_path, "outside.png")
    write(tmp_path, "inside/a.png")
    model = family.load(tmp_path / "inside")
    for id in ("../outside", "/" + str(tmp_path / "outside"), "..\0x"):
        assert model.generate([Request(Prompt(id, "x"), 0, 0)])[0].kind == "missing"
    assert not any(".." in name for name in family.candidates(Request(Prompt("../../x", "../y"), 0, 0)))


def test_the_fingerprint_is_the_content(tmp_path):
    write(tmp_path / "one", "a.png", 1)
    write(tmp_path / "two", "a.png", 1)
    first, same = family.load(tmp_path / "one").fingerprint, family.load(tmp_path / "two").fingerprint
    assert first == same
    write(tmp_path / "two", "a.png", 2)
    changed = family.load(tmp_path / "two").fingerprint
    write(tmp_path / "one", "b.png", 1)
    assert len({first, changed, family.load(tmp_path / "one").fingerprint}) == 3


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no folder"):
        family.load(tmp_path / "absent")
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(MmalignError, match="no PNG file.*JPEG"):
        family.load(tmp_path)
