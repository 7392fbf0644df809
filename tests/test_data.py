"""Benchmark data: only the pinned file is ever accepted, and a missing one is explained with the command that brings it."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import yaml

from mmalign import data
from mmalign.types import MmalignError, UsageError

CONTENT = b'{"prompt": "a photo of a lamp"}\n{"prompt": "a photo of a drum"}\n'
UNPUBLISHED = {"gqa", "mmmu", "seed_bench"}  # no checksum is named where these are published
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MMALIGN_DATA", str(tmp_path / "home"))
    return tmp_path / "home"


def card(tmp_path, url="http://127.0.0.1:9/owner/name/commit/prompts/lamps.jsonl", name="lamps", sha256=SHA):
    path = tmp_path / f"{name}.yaml"
    source = {"name": name, "file": "lamps.jsonl", "url": url, "sha256": sha256, "licence": "MIT"}
    path.write_text(yaml.safe_dump({"name": name, "data": [source]}))
    return path


def test_add_copies_the_pinned_file_and_data_path_finds_it(tmp_path, home):
    cards = [card(tmp_path)]
    (tmp_path / "lamps.jsonl").write_bytes(CONTENT)
    place = data.add("lamps", tmp_path / "lamps.jsonl", cards)
    assert place == home / "lamps" / "lamps.jsonl" and place.read_bytes() == CONTENT
    assert data.data_path("lamps", cards) == place
    assert [path.name for path in place.parent.iterdir()] == ["lamps.jsonl"]  # no temporary file is left


def test_add_takes_a_folder_or_a_checkout(tmp_path):
    cards = [card(tmp_path, url="https://raw.githubusercontent.com/owner/name/commit/prompts/list_of_lamps.jsonl")]
    checkout = tmp_path / "checkout" / "prompts"
    checkout.mkdir(parents=True)
    (checkout / "list_of_lamps.jsonl").write_bytes(CONTENT)
    assert data.add("lamps", tmp_path / "checkout", cards).read_bytes() == CONTENT
    with pytest.raises(MmalignError, match="no file .*nowhere.*Give the path of lamps.jsonl"):
        data.add("lamps", tmp_path / "nowhere", cards)


def test_another_file_is_refused_and_nothing_is_kept(tmp_path, home):
    cards = [card(tmp_path)]
    (tmp_path / "other.jsonl").write_bytes(CONTENT + b"\n")
    with pytest.raises(MmalignError, match=f"expected sha256 {SHA}, got .*mmalign data add lamps --from PATH"):
        data.add("lamps", tmp_path / "other.jsonl", cards)
    assert not (home / "lamps").exists()


def test_a_file_changed_after_it_was_added_is_refused(tmp_path, home):
    cards = [card(tmp_path)]
    (tmp_path / "lamps.jsonl").write_bytes(CONTENT)
    data.add("lamps", tmp_path / "lamps.jsonl", cards).write_bytes(CONTENT.replace(b"drum", b"DRUM"))
    with pytest.raises(MmalignError, match="is not the pinned data 'lamps'"):
        data.data_path("lamps", cards)
    assert states(cards)["lamps"] == "wrong"


def test_offline_says_exactly_what_to_do(tmp_path, home):
    with pytest.raises(MmalignError) as caught:
        data.data_path("lamps", [card(tmp_path)])
    text = str(caught.value)
    assert "http://127.0.0.1:9/owner/name/commit/prompts/lamps.jsonl" in text and str(home / "lamps") in text
    assert f"lamps.jsonl (sha256 {SHA})" in text and text.endswith("mmalign data add lamps --from PATH")


@pytest.fixture
def served():
    """An address whose one file has the right or a wrong content, as the test says."""
    body = {"content": CONTENT}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body["content"])

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/lamps.jsonl", body
    server.shutdown()
    server.server_close()


def test_fetch_keeps_the_right_file_and_drops_a_wrong_one(tmp_path, home, served):
    url, body = served
    cards = [card(tmp_path, url=url)]
    body["content"] = b"an error page"
    with pytest.raises(MmalignError, match=f"not the pinned 'lamps': expected sha256 {SHA}.*Nothing was kept"):
        data.data_path("lamps", cards)
    assert states(cards)["lamps"] == "absent"
    body["content"] = CONTENT
    assert data.data_path("lamps", cards).read_bytes() == CONTENT


def states(cards):
    return {item.source.name: item.state for item in data.listing(cards)}


def test_listing_states(tmp_path):
    cards = [card(tmp_path)]
    assert states(cards)["lamps"] == "absent" and "geneval" in states(cards)
    (tmp_path / "lamps.jsonl").write_bytes(CONTENT)
    data.add("lamps", tmp_path / "lamps.jsonl", cards)
    assert states(cards)["lamps"] == "ready"


def test_unknown_name_and_clashing_cards(tmp_path):
    with pytest.raises(UsageError, match="Unknown data 'genevall'. Did you mean 'geneval'?"):
        data.data_path("genevall")
    (tmp_path / "other").mkdir()
    with pytest.raises(MmalignError, match="different data under the name 'lamps'"):
        data.sources([card(tmp_path), card(tmp_path / "other", sha256="0" * 64)])
    assert data.sources([card(tmp_path), card(tmp_path / "other")])["lamps"].sha256 == SHA


def test_a_card_with_a_malformed_source_is_named(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("data:\n  - name: lamps\n    colour: red\n")
    with pytest.raises(MmalignError, match="bad.yaml cannot be read"):
        data.sources([path])


def test_every_built_in_source_is_pinned():
    for source in data.sources().values():
        assert source.url.startswith("https://") and source.licence, source
        assert (source.sha256 == "") == (source.name in UNPUBLISHED), source
        if source.sha256:
            assert len(source.sha256) in (64, 40, 32) and set(source.sha256) <= set("0123456789abcdef"), source
            names_commit = any(len(part) == 40 for part in source.url.split("/"))
            assert names_commit or len(source.sha256) == 32, f"{source.url} names no commit"


def test_lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes("one\n\nthree \u2028 half".encode())
    assert data.load_lines(path) == ["one", "", "three \u2028 half"]
    path.write_bytes(b"")
    assert data.load_lines(path) == []
    path.write_bytes(CONTENT)
    assert [row["prompt"] for row in data.load_json_lines(path)] == ["a photo of a lamp", "a photo of a drum"]
    path.write_bytes(CONTENT + b"{broken\n")
    with pytest.raises(MmalignError, match="lines.txt, line 3: not JSON"):
        data.load_json_lines(path)
    path.write_bytes(b"[1]\n")
    with pytest.raises(MmalignError, match="line 1: expected a JSON object, got list"):
        data.load_json_lines(path)


def test_an_md5_pins_where_a_publisher_names_no_other(tmp_path):
    cards = [card(tmp_path, sha256=hashlib.md5(CONTENT).hexdigest())]
    (tmp_path / "lamps.jsonl").write_bytes(CONTENT)
    assert data.add("lamps", tmp_path / "lamps.jsonl", cards) == data.data_path("lamps", cards)
    (tmp_path / "lamps.jsonl").write_bytes(CONTENT[1:])
    with pytest.raises(MmalignError, match="expected md5"):
        data.add("lamps", tmp_path / "lamps.jsonl", cards)


def test_without_a_published_checksum_what_was_added_pins_itself(tmp_path, home):
    cards = [card(tmp_path, sha256="")]
    with pytest.raises(MmalignError, match="No checksum of it is published, so it is not fetched: take lamps.jsonl from http"):
        data.data_path("lamps", cards)
    assert states(cards)["lamps"] == "absent"
    (tmp_path / "renamed.jsonl").write_bytes(CONTENT)
    place = data.add("lamps", tmp_path / "renamed.jsonl", cards)
    assert place == home / "lamps" / "lamps.jsonl" == data.data_path("lamps", cards)
    assert (home / "lamps" / data.NOTED).read_text() == f"{SHA}  lamps.jsonl\n"
    place.write_bytes(CONTENT[1:])
    with pytest.raises(MmalignError, match="is not what was added as 'lamps'.*mmalign data add lamps --from PATH"):
        data.data_path("lamps", cards)
    assert states(cards)["lamps"] == "wrong"
    data.add("lamps", place, cards)  # where it lies already
    assert states(cards)["lamps"] == "ready" and place.read_bytes() == CONTENT[1:]


def test_a_source_of_many_files_is_a_folder(tmp_path, home):
    cards = [card(tmp_path, sha256="")]
    cards[0].write_text(cards[0].read_text().replace("lamps.jsonl\n", "'*/part-*.jsonl'\n", 1))
    clone = tmp_path / "clone"
    for name in ("red/part-1.jsonl", "blue/part-1.jsonl", "blue/other.jsonl"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text(name)
    assert data.add("lamps", clone, cards) == home / "lamps" == data.data_path("lamps", cards)
    assert sorted(str(path.relative_to(home / "lamps")) for path in (home / "lamps").rglob("*.jsonl")) == [
        "blue/part-1.jsonl",
        "red/part-1.jsonl",
    ]
    (home / "lamps" / "red" / "part-2.jsonl").write_text("more")
    assert states(cards)["lamps"] == "wrong", "a file that was not added"
    (clone / "red" / "part-1.jsonl").unlink()
    data.add("lamps", clone, cards)
    assert states(cards)["lamps"] == "ready" and not list((home / "lamps" / "red").glob("*.jsonl"))
    with pytest.raises(MmalignError, match=r"holds no \*/part-\*.jsonl to add as 'lamps'"):
        data.add("lamps", tmp_path, cards)
