"""Janus' layouts on disk: names there and back, and sentences for folders that are wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmalign.models import janus as family
from mmalign.models._janus_layout import original_config, to_hugging_face, to_original
from mmalign.testbed.tiny import make_janus, make_original_janus
from mmalign.types import MmalignError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_janus(tmp_path_factory.mktemp("janus"), seed=1)


@pytest.fixture
def folder(source, tmp_path):
    return shutil.copytree(source, tmp_path / "copy")


def test_names_go_there_and_back(source):
    tensors = load_file(source / "model.safetensors")
    original = to_original(tensors)
    again = to_hugging_face(original)
    assert set(again) == set(tensors) and all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert not set(original) & set(tensors)
    prefixes = {name.split(".")[0] for name in original}
    assert prefixes == {"vision_model", "aligner", "gen_vision_model", "gen_embed", "gen_aligner", "gen_head", "language_model"}
    assert "vision_model.vision_tower.blocks.0.attn.qkv.weight" in original and "gen_vision_model.decoder.mid.1.q.weight" in original


def test_sizes_are_read_from_the_tensors(source, tmp_path):
    made = make_original_janus(source, tmp_path / "original")
    tensors = to_hugging_face(torch.load(made / "pytorch_model.bin", weights_only=True))
    sizes = original_config(json.loads((made / "config.json").read_text()), tensors)
    content = json.loads((source / "config.json").read_text())
    for part, key in (("vision", "vision_config"), ("vq", "vq_config")):
        for name, value in sizes[part].items():
            assert content[key][name] == value, name


def test_a_released_vision_tower_is_known_by_its_name(source):
    tensors = load_file(source / "model.safetensors")
    config = {
        "vision_config": {"params": {"model_name": "siglip_large_patch16_384", "image_size": 384}},
        "language_config": {"vocab_size": 8},
    }
    sizes = original_config(config, tensors)
    assert sizes["vision"]["num_attention_heads"] == 16 and sizes["vision"]["image_size"] == 384
    config["vision_config"]["params"]["model_name"] = "vit_unheard_of"
    with pytest.raises(MmalignError, match="'vit_unheard_of'.*heads"):
        original_config(config, tensors)


def test_differing_head_and_embeddings_are_not_tied(folder):
    """The composite config ties by default; tying would overwrite the input embeddings with the head."""
    content = json.loads((folder / "config.json").read_text())
    content.pop("tie_word_embeddings")
    (folder / "config.json").write_text(json.dumps(content))
    net, tensors = family.load(folder).net, load_file(folder / "model.safetensors")
    assert torch.equal(net.get_input_embeddings().weight, tensors["model.language_model.embed_tokens.weight"])
    assert torch.equal(net.lm_head.weight, tensors["lm_head.weight"])


def test_a_file_without_head_is_tied(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    net = family.load(folder).net
    assert torch.equal(net.lm_head.weight, net.get_input_embeddings().weight)
    assert torch.equal(net.lm_head.weight, tensors["model.language_model.embed_tokens.weight"])


def test_missing_and_unexpected_parameters_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.aligner.fc9.weight"] = tensors.pop("model.aligner.fc1.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        MmalignError, match=r"1 parameters are missing \(model.aligner.fc1.weight\) and 1 are unexpected \(model.aligner.fc9"
    ):
        family.load(folder)


def test_a_tensor_of_another_size_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(MmalignError, match=r"lm_head.weight is \[\d+, 48\], expected \[\d+, 48\]"):
        family.load(folder)


def test_absent_weights_are_a_sentence(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(MmalignError, match="no weights in .*expected model.safetensors"):
        family.load(folder)


def test_an_absent_part_of_the_weights_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    half = len(names) // 2
    parts = {"model-1.safetensors": names[:half], "model-2.safetensors": names[half:]}
    for file, members in parts.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    index = {"weight_map": {name: file for file, members in parts.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    assert family.load(folder).tokens == 16
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(MmalignError, match="lacks 1 of the 2 weight files.*model-2.safetensors"):
        family.load(folder)


def test_a_cut_weight_file_is_a_sentence(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(MmalignError, match="model.safetensors cannot be read"):
        family.load(folder)


class Payload:
    def __reduce__(self):
        return (print, ("run",))


def test_a_pickle_that_is_more_than_tensors_is_refused(source, tmp_path, capsys):
    made = make_original_janus(source, tmp_path / "original")
    torch.save({"weight": Payload()}, made / "pytorch_model.bin")
    with pytest.raises(MmalignError, match="refused because such a file can run code"):
        family.load(made)
    assert "run" not in capsys.readouterr().out


def test_an_absent_tokenizer_is_a_sentence(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(MmalignError, match="no tokenizer.json"):
        family.load(folder)


def test_other_models_are_not_recognised(tmp_path):
    assert not family.recognises(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert not family.recognises(tmp_path)
    with pytest.raises(MmalignError, match="model_type.*'llama'.*expected janus or multi_modality"):
        family.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert not family.recognises(tmp_path)
