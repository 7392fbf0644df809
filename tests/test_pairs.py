"""Image-text pairs: three layouts give the same pairs, every draw is its position's, and what cannot be read is named, never fatal."""

import io
import json
import tarfile

import numpy as np
import pytest

from mmalign import distributed
from mmalign.images import encode_png
from mmalign.pairs import Pairs, exchange_of, open_pairs, open_source
from mmalign.types import MmalignError, UsageError

NUMBER = 7


def picture(number, side=8):
    return np.full((side, side, 3), 10 * number, np.uint8)


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "folder"
    (made / "deeper").mkdir(parents=True)
    for number in range(NUMBER):
        place = made / ("deeper" if number % 2 else ".") / f"{number:03d}.png"
        place.write_bytes(encode_png(picture(number)))
        place.with_suffix(".txt").write_text(f"picture {number}\n")
    return made


@pytest.fixture
def lines(tmp_path):
    made = tmp_path / "lines"
    made.mkdir()
    rows = []
    for number in range(NUMBER):
        (made / f"{number}.png").write_bytes(encode_png(picture(number)))
        rows.append(json.dumps({("image", "file_name")[number % 2]: f"{number}.png", ("text", "caption")[number % 2]: f"picture {number}"}))
    (made / "rows.jsonl").write_text("\n".join(rows) + "\n\n")
    return made


@pytest.fixture
def shards(tmp_path):
    made = tmp_path / "shards"
    made.mkdir()
    for shard, numbers in enumerate((range(3), range(3, NUMBER))):
        with tarfile.open(made / f"s-{shard:03d}.tar", "w") as tar:
            for number in numbers:
                add(tar, f"part/{number:04d}.png", encode_png(picture(number)))
                if number % 2:
                    add(tar, f"part/{number:04d}.json", json.dumps({"prompt": f"picture {number}", "text": ""}).encode())
                else:
                    add(tar, f"part/{number:04d}.txt", f"picture {number}\n".encode())
                    add(tar, f"part/{number:04d}.cls", b"3")
    return made


def texts(pairs, positions):
    return [pairs.at(position)[0].prompt.text for position in positions]


def test_every_layout_gives_the_same_pairs(folder, lines, shards):
    for place in (folder, lines, lines / "rows.jsonl", shards, shards / "s-{000..001}.tar"):
        pairs = open_pairs(str(place), 3)
        assert len(pairs) == NUMBER
        found = {pair.prompt.text: pair.image for pair, skipped in map(pairs.at, range(NUMBER)) if not skipped}
        assert sorted(found) == [f"picture {number}" for number in range(NUMBER)]
        assert all((found[f"picture {number}"] == picture(number)).all() for number in range(NUMBER))


def test_an_epoch_holds_every_pair_once_and_the_next_one_in_another_order(folder):
    pairs = open_pairs(str(folder), 3)
    epochs = [texts(pairs, range(epoch * NUMBER, (epoch + 1) * NUMBER)) for epoch in range(4)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) > 1
    assert texts(open_pairs(str(folder), 4), range(NUMBER)) != epochs[0]


def test_a_run_that_continues_sees_the_samples_it_would_have_seen(shards):
    whole = open_pairs(str(shards), 3)
    steps = [[pair.prompt.text for pair in whole.draw(step, 2)[0]] for step in range(6)]
    again = open_pairs(str(shards), 3)
    assert [[pair.prompt.text for pair in again.draw(step, 2)[0]] for step in (4, 5)] == steps[4:]
    assert [text for step in steps for text in step] == texts(again, range(12))


def test_processes_share_a_step(folder, monkeypatch):
    together = [pair.prompt.text for pair in open_pairs(str(folder), 3).draw(1, 4)[0]]
    monkeypatch.setattr(distributed, "world", lambda: 2)
    found = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found += [pair.prompt.text for pair in open_pairs(str(folder), 3).draw(1, 4)[0]]
    assert found == together
    with pytest.raises(MmalignError, match="5 pairs in a step cannot be divided among 2"):
        open_pairs(str(folder), 3).draw(0, 5)


def test_what_cannot_be_read_is_named_and_moves_nothing_else(folder):
    before = texts(open_pairs(str(folder), 3), range(NUMBER))
    (folder / "002.png").write_bytes((folder / "002.png").read_bytes()[:48])
    (folder / "deeper" / "003.txt").unlink()
    (folder / "004.png").write_bytes(b"")
    pairs = open_pairs(str(folder), 3)
    after, named = [], {}
    for pair, skipped in map(pairs.at, range(NUMBER)):
        after.append(pair.prompt.text)
        named.update({item.name: item.reason for item in skipped})
    assert set(named) == {"002.png", "deeper/003.png", "004.png"}
    assert "002.png" in named["002.png"] and "no 003.txt beside it" in named["deeper/003.png"]
    bad = {f"picture {number}" for number in (2, 3, 4)}
    good = [text for text in before if text not in bad]
    assert [text for place, text in enumerate(after) if before[place] not in bad] == good
    for place, text in enumerate(before):
        if text in bad:  # the next good one of the order stands in
            following = [other for other in before[place:] + before[:place] if other not in bad]
            assert after[place] == following[0]


def test_rows_and_members_that_are_damaged_are_skipped(lines, shards):
    rows = (lines / "rows.jsonl").read_text().splitlines()
    rows[1], rows[2], rows[3] = "{broken", json.dumps({"text": "no picture"}), json.dumps({"image": "absent.png", "text": "x"})
    (lines / "rows.jsonl").write_text("\n".join(rows[:NUMBER]))
    with tarfile.open(shards / "s-001.tar", "a") as tar:
        add(tar, "part/lonely.png", encode_png(picture(1)))
        add(tar, "part/bad.png", b"no picture")
        add(tar, "part/bad.txt", b"text")
    for place, expected in ((lines, {"JSON", "names no picture", "no image at"}), (shards, {"no text", "damaged"})):
        pairs = open_pairs(str(place), 0)
        reasons = [item.reason for _, skipped in map(pairs.at, range(len(pairs))) for item in skipped]
        assert all(any(words in reason for reason in reasons) for words in expected), reasons


def test_data_without_a_readable_pair_stops_and_says_why(folder):
    for file in folder.rglob("*.png"):
        file.write_bytes(b"no picture")
    with pytest.raises(MmalignError, match=r"7 pairs in a row could not be read, the last of them .*\.png"):
        open_pairs(str(folder), 3).at(0)


def test_questions_come_from_fields_or_conversations(lines):
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}, {"from": "human", "value": "Sure?"}]
    assert exchange_of({"conversations": turns}) == ("What is it?", "A square.")
    assert exchange_of({"question": "how many?", "answer": 2}) == ("how many?", "2") and exchange_of({"conversations": []}) == ("", "")
    (lines / "rows.jsonl").write_text(json.dumps({"image": "0.png", "conversations": turns}) + "\n")
    pair, _ = Pairs(open_source(str(lines)), 0, needs="answer").at(0)
    assert (pair.question, pair.answer, pair.prompt.text) == ("What is it?", "A square.", "")
    with pytest.raises(MmalignError, match="no text"):
        open_pairs(str(lines), 0).at(0)


def test_what_is_no_data_is_told(tmp_path, folder, lines, shards):
    (lines / "second.jsonl").write_text("{}\n")
    whole = (shards / "s-000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "empty").mkdir()
    for place, words in (
        (lines, "2 .jsonl files"),
        (tmp_path / "absent", "no pairs at"),
        (shards / "s-{000..002}.tar", r"no pairs at .*s-002\.tar"),
        (tmp_path / "cut.tar", r"cut\.tar is no whole, uncompressed tar"),
        (tmp_path / "empty", "holds no picture"),
    ):
        with pytest.raises((UsageError, MmalignError), match=words):
            open_pairs(str(place), 0)


def test_other_data_has_another_fingerprint(folder, lines, shards):
    before = [open_source(str(place)).fingerprint for place in (folder, lines, shards)]
    (folder / "new.png").write_bytes(encode_png(picture(1)))
    with (lines / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"image": "0.png", "text": "again"}) + "\n")
    with tarfile.open(shards / "s-001.tar", "a") as tar:
        add(tar, "part/9999.png", encode_png(picture(1)))
    after = [open_source(str(place)).fingerprint for place in (folder, lines, shards)]
    assert len({*before, *after}) == 6


def test_the_worlds_corpus_is_wrong_in_its_share_and_its_questions_are_right(tmp_path):
    from mmalign.testbed import oracle, pairs
    from mmalign.testbed.world import KINDS, sample_prompts, strict, text_of

    pairs.main(["--out", str(tmp_path / "corpus"), "--number", "300", "--wrong", "0.2", "--questions", "40"])
    clauses = {text_of(found): found for _, (_, found, _) in zip(range(4000), sample_prompts("train", KINDS, pairs.SEED), strict=False)}
    stream = open_pairs(str(tmp_path / "corpus"), 0)
    shown = [stream.load(number) for number in range(300)]
    read = oracle.read(np.stack([pair.image for pair in shown]))
    right = [strict(clauses[pair.prompt.text], reading.scene) for pair, reading in zip(shown, read, strict=True)]
    assert 0.72 < np.mean(right) < 0.88
    asked = open_pairs(str(tmp_path / "corpus" / "questions"), 0, "answer")
    counts = [pair for pair, _ in map(asked.at, range(40)) if pair.question == "Describe the image."]
    assert len(counts) > 8 and all(strict(clauses[pair.answer], oracle.read(pair.image[None])[0].scene) for pair in counts)
