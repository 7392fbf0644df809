"""What a model's name means, and fingerprints of checkpoints."""

import json

import pytest

from mmalign import hub
from mmalign.types import MmalignError, UsageError

JANUS = {"model_type": "janus"}


def make(folder, config=JANUS, weights=b"12345678"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(weights)
    return folder


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "CHECKPOINTS", tmp_path / "checkpoints")
    return make(tmp_path / "checkpoints" / "tiny-janus")


def test_a_bundled_name(bundled):
    spec = hub.resolve_model("tiny-janus")
    assert (spec.name, spec.family, spec.path) == ("tiny-janus", "janus", bundled)
    assert "family janus" in spec.how and "bundled" in spec.how


def test_a_folder_is_recognised_by_its_config(tmp_path):
    assert hub.resolve_model(str(make(tmp_path / "mine"))).family == "janus"
    original = hub.resolve_model(str(make(tmp_path / "original", {"model_type": "multi_modality"})))
    assert (original.name, original.family) == ("original", "janus")


def test_a_family_before_the_folder(tmp_path):
    spec = hub.resolve_model(f"folder:{tmp_path}")
    assert (spec.family, spec.path, spec.name) == ("folder", tmp_path, tmp_path.name)
    with pytest.raises(UsageError, match="no folder .*absent"):
        hub.resolve_model("folder:absent")
    with pytest.raises(UsageError, match="Unknown model family 'janos'.*'janus'"):
        hub.resolve_model(f"janos:{tmp_path}")


def test_a_folder_without_config_is_a_sentence_with_the_way_out(tmp_path):
    with pytest.raises(MmalignError, match="has no config.json.*folder:"):
        hub.resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(MmalignError, match="cannot be read as JSON"):
        hub.resolve_model(str(tmp_path))


def test_an_unknown_family_lists_the_known(tmp_path):
    with pytest.raises(UsageError, match="No model family recognises .*'gpt2'.*folder, harmon, janus"):
        hub.resolve_model(str(make(tmp_path, {"model_type": "gpt2"})))


def test_a_misspelt_name_gets_a_suggestion(bundled):
    with pytest.raises(UsageError, match="no model 'tiny-janis'.*'tiny-janus'"):
        hub.resolve_model("tiny-janis")
    with pytest.raises(UsageError, match="is a file"):
        hub.resolve_model(str(bundled / "config.json"))


def test_a_hub_id_offline_says_what_to_do(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        MmalignError, match="'nobody/nothing' at revision abc.*cannot be downloaded: HF_HUB_OFFLINE is set.*hf download nobody/nothing"
    ):
        hub.resolve_model("nobody/nothing@abc")


def test_the_fingerprint_changes_with_any_byte_and_not_with_the_place(tmp_path):
    first = hub.fingerprint_weights(make(tmp_path / "a"))
    assert first == hub.fingerprint_weights(make(tmp_path / "b"))
    changed = {
        hub.fingerprint_weights(make(tmp_path / "b", weights=b"12345679")),
        hub.fingerprint_weights(make(tmp_path / "b", {"model_type": "janus", "x": 1})),
        first,
    }
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    assert len(changed | {hub.fingerprint_weights(tmp_path / "a")}) == 4


def test_a_large_file_is_sampled_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "WHOLE", 1000)
    monkeypatch.setattr(hub, "BLOCK", 10)
    monkeypatch.setattr(hub, "BLOCKS", 5)
    content = bytearray(2000)
    file = tmp_path / "w.bin"
    digests = set()
    for place in (None, 0, 1999, 500, 50):
        file.write_bytes(content if place is None else content[:place] + b"x" + content[place + 1 :])
        digests.add(hub.sample_file(file))
    assert len(digests) == 4  # byte 50 lies between the blocks


def test_hidden_files_and_logs_do_not_count(tmp_path):
    make(tmp_path)
    before = hub.fingerprint_weights(tmp_path)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.json").write_text("1")
    (tmp_path / "train.log").write_text("1")
    assert hub.fingerprint_weights(tmp_path) == before
    with pytest.raises(MmalignError, match="no folder"):
        hub.fingerprint_weights(tmp_path / "absent")
