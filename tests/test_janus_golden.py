"""Janus against the official implementation: every tensor of the golden fixture, read through the original layout's loader."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmalign.models._janus import Janus
from mmalign.models._janus_codes import CodeWriter
from mmalign.models._janus_serve import read_network
from mmalign.models._janus_text import Pixels
from mmalign.models.layers.cached import Cache, CachedTrunk

SHARED = os.environ.get("MMALIGN_SHARED")
pytestmark = pytest.mark.skipif(not SHARED, reason="$MMALIGN_SHARED, the folder with goldens/janus_fixture.pt, is not set")


@pytest.fixture(scope="module")
def fixture():
    return torch.load(Path(str(SHARED)) / "goldens" / "janus_fixture.pt", weights_only=True)


@pytest.fixture(scope="module")
def janus(fixture, tmp_path_factory):
    """The fixture's weights as an original checkpoint on disk, loaded as any other; its sizes come from the tensors."""
    folder = tmp_path_factory.mktemp("original")
    sizes = fixture["config"]
    vision = {"image_size": sizes["vision"]["image_size"], "model_name": "fixture", "heads": sizes["vision"]["num_attention_heads"]}
    content = {"model_type": "multi_modality", "vision_config": {"params": vision}, "language_config": sizes["text"]}
    (folder / "config.json").write_text(json.dumps(content))
    torch.save(fixture["sd"], folder / "pytorch_model.bin")
    chat = SimpleNamespace(pad=0)
    with torch.no_grad():
        yield Janus(read_network(folder, "float32").eval(), chat, Pixels(sizes["vision"]["image_size"]))


def close(found, reference):
    """The fixture's tolerance: 1e-5 times the largest reference value, or 1."""
    assert found.shape == reference.shape
    assert (found - reference).abs().max() <= 1e-5 * max(1.0, float(reference.abs().max()))


def test_golden_sizes_come_from_the_tensors(janus, fixture):
    config = janus.net.config
    for part, found in (("vision", config.vision_config), ("vq", config.vq_config)):
        for name, value in fixture["config"][part].items():
            assert getattr(found, name) == value, name


def test_golden_understanding_features(janus, fixture):
    close(janus.image_features((fixture["x"] + 1) / 2), fixture["vision"])


def test_golden_codes_of_pictures(janus, fixture):
    assert janus.encode_image((fixture["x"] + 1) / 2).flatten().tolist() == fixture["enc"].tolist()


def test_golden_pixels_of_codes(janus, fixture):
    close(janus.net.model.vqmodel.decode(fixture["t"]), fixture["dec"])
    scale = max(1.0, float(fixture["dec"].abs().max()))
    found = janus.decode(fixture["t"])
    assert (found - ((fixture["dec"] + 1) / 2).clamp(0, 1)).abs().max() <= 1e-5 * scale / 2


def test_golden_language_model_in_one_forward(janus, fixture):
    ids = fixture["ids"]
    hidden = janus._hidden(janus.net.get_input_embeddings()(ids), torch.ones_like(ids, dtype=torch.bool))
    close(janus.net.lm_head(hidden), fixture["lm"])


@pytest.mark.parametrize("padding", [0, 3])
def test_golden_language_model_through_the_cache_token_by_token(janus, fixture, padding):
    ids = fixture["ids"]
    embeds = janus.net.get_input_embeddings()(torch.nn.functional.pad(ids, (padding, 0)))
    trunk = CachedTrunk(janus.trunk, len(ids))
    mask = torch.ones(len(ids), padding + 3, dtype=torch.bool)
    mask[:, :padding] = False
    prefix = trunk.prefill(embeds[:, : padding + 3], mask)
    cache = Cache(prefix, len(ids), ids.shape[1] - 3, block=3)
    states = [cache.begin(prefix, torch.arange(len(ids)))] + [
        trunk.step(embeds[:, slot], cache) for slot in range(padding + 3, padding + ids.shape[1])
    ]
    close(janus.net.lm_head(torch.stack(states, 1)), fixture["lm"][:, 2:])


def test_golden_image_head_and_code_embedding(janus, fixture):
    codes = fixture["t"]
    close(janus.net.prepare_embeddings_for_image_generation(codes), fixture["ge"])
    close(janus.net.model.generation_head(fixture["hs"]), fixture["gh"])
    writer = CodeWriter(janus, len(fixture["hs"]), is_guided=False)
    close(writer.logits(fixture["hs"]), fixture["gh"])
    close(writer.embed(codes[:, 0]), fixture["ge"][:, 0])
