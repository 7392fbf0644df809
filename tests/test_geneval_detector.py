"""Mask2Former as mmdet runs it: preparation, objects from raw logits, and the conversion of mmdet's checkpoints."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from mmalign.scorers import _mask2former, _mmdet
from mmalign.types import MmalignError

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "mmdet_mask2former.json").read_text())


@pytest.mark.parametrize(
    ("size", "fitted"),
    [((512, 512), (800, 800)), ((768, 512), (1200, 800)), ((97, 641), (202, 1333)), ((33, 7), (1333, 283)), ((1, 1), (800, 800))],
)
def test_sizes_are_those_of_mmdet(size, fitted):
    assert _mask2former.fit(size) == fitted


def test_padding_is_grey_before_normalisation():
    pixels, unpadded = _mask2former.prepare(np.zeros((97, 641, 3), np.uint8))
    assert unpadded == (202, 1333) and pixels.shape == (1, 3, 224, 1344)
    grey = [(128 - mean) / std for mean, std in zip(_mask2former.MEAN, _mask2former.STD, strict=True)]
    black = [-mean / std for mean, std in zip(_mask2former.MEAN, _mask2former.STD, strict=True)]
    assert pixels[0, :, -1, -1].tolist() == pytest.approx(grey, abs=1e-6)
    assert pixels[0, :, 201, 1332].tolist() == pytest.approx(black, abs=1e-6)


def naive_objects(class_logits, mask_logits, padded, unpadded, original):
    """The recipe word by word: every pair, every mask at full size."""
    classes = class_logits.softmax(-1)[:, :-1]
    masks = functional.interpolate(mask_logits[None], size=padded, mode="bilinear", align_corners=False)[0]
    masks = functional.interpolate(masks[None, :, : unpadded[0], : unpadded[1]], size=original, mode="bilinear", align_corners=False)[0]
    pairs = sorted(((float(classes[q, c]), q, c) for q in range(classes.shape[0]) for c in range(classes.shape[1])), reverse=True)[:100]
    found = []
    for probability, query, label in pairs:
        on = masks[query] > 0
        quality = masks[query].sigmoid()[on].sum() / (on.sum() + 1e-6)
        ys, xs = np.nonzero(on.numpy())
        box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(xs) else [0, 0, 0, 0]
        found.append((label, box, probability * float(quality), on.numpy()))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_objects_equal_a_naive_implementation(seed):
    draw = torch.Generator().manual_seed(seed)
    class_logits = 3 * torch.randn(9, 21, generator=draw)
    mask_logits = functional.interpolate(4 * torch.randn(1, 9, 3, 4, generator=draw), size=(16, 20), mode="bilinear")[0]
    mask_logits[2] = -5  # an empty mask
    sizes = (64, 80), (60, 75), (30, 38)
    found = _mask2former.objects(class_logits, mask_logits, *sizes)
    expected = naive_objects(class_logits, mask_logits, *sizes)
    assert len(found) == len(expected) == 100
    order = sorted(found, key=lambda item: (-item.detection.score, item.label))
    for item, (label, box, score, mask) in zip(order, sorted(expected, key=lambda row: (-row[2], row[0])), strict=True):
        assert item.detection.score == pytest.approx(score, abs=1e-6)
        assert score == 0 or (item.label == label and item.detection.box.tolist() == box and (item.detection.mask == mask).all())


def test_a_floor_only_leaves_out_what_could_not_pass():
    draw = torch.Generator().manual_seed(9)
    logits = 4 * torch.randn(9, 21, generator=draw), torch.randn(9, 16, 16, generator=draw)
    sizes = (64, 64), (64, 64), (32, 32)
    everything, some = (_mask2former.objects(*logits, *sizes, floor) for floor in (0.0, 0.3))
    above = [[(item.label, item.detection.score) for item in found if item.detection.score > 0.3] for found in (everything, some)]
    assert above[0] == above[1] and len(above[0]) >= 1 and len(some) < len(everything)


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(FloatingPointError):
        _mask2former.objects(torch.full((3, 5), torch.nan), torch.zeros(3, 4, 4), (8, 8), (8, 8), (8, 8))
    with pytest.raises(FloatingPointError):
        _mask2former.objects(torch.zeros(3, 5), torch.full((3, 4, 4), torch.nan), (8, 8), (8, 8), (8, 8))


# The conversion. The goldens are outputs of mmdet 2.28.2's own classes for weights and input drawn by numpy from named seeds.


def mmdet_state():
    state = {}
    for name, shape in GOLDEN["shapes"].items():
        if name.endswith("relative_position_index"):
            state[name] = torch.zeros(shape, dtype=torch.long)
            continue
        values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        scaled = values / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.2 * values + name.endswith("weight")
        state[name] = torch.from_numpy(scaled.astype(np.float32))
    return state


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("mmdet") / "mask2former.pth"
    torch.save({"meta": {"CLASSES": ("person", "bicycle"), "mmdet_version": "2.25.0", "epoch": 50}, "state_dict": mmdet_state()}, path)
    return path


def test_a_converted_checkpoint_computes_what_mmdet_computes(checkpoint):
    model = _mmdet.load_checkpoint(checkpoint, "cpu", "float32")
    pixels = torch.from_numpy(np.random.default_rng(7).standard_normal((1, 3, 128, 160)).astype(np.float32))
    with torch.inference_mode():
        out = model(pixel_values=pixels)
    assert out.class_queries_logits[0, :, :8].tolist() == [pytest.approx(row, abs=2e-4) for row in GOLDEN["class_logits"]]
    assert out.masks_queries_logits[0, :, 5, ::5].tolist() == [pytest.approx(row, abs=2e-4) for row in GOLDEN["mask_logits"]]
    found = _mask2former.objects(out.class_queries_logits[0], out.masks_queries_logits[0], (128, 160), (120, 150), (60, 75))
    best = sorted(found, key=lambda item: -item.detection.score)[:30]
    for item, (label, *box, score, n_pixels) in zip(best, GOLDEN["objects"], strict=True):
        assert (item.label, item.detection.box.tolist()) == (label, box)
        assert item.detection.score == pytest.approx(score, abs=2e-5)
        assert abs(int(item.detection.mask.sum()) - n_pixels) <= 2


def test_the_architecture_is_read_from_the_official_shapes():
    """GenEval's own checkpoint: Swin-S, 100 queries, nine decoder layers (transformers counts the input as a tenth), 80 classes."""
    shapes = {
        "backbone.patch_embed.projection.weight": (96, 3, 4, 4),
        "panoptic_head.cls_embed.weight": (81, 256),
        "panoptic_head.query_feat.weight": (100, 256),
        "panoptic_head.pixel_decoder.mask_feature.weight": (256, 256, 1, 1),
        **{f"panoptic_head.pixel_decoder.encoder.layers.{layer}.ffns.0.layers.0.0.weight": (1024, 256) for layer in range(6)},
        "panoptic_head.pixel_decoder.encoder.layers.0.attentions.0.sampling_offsets.weight": (192, 256),
        **{f"panoptic_head.transformer_decoder.layers.{layer}.ffns.0.layers.0.0.weight": (2048, 256) for layer in range(9)},
    }
    for stage, (depth, heads) in enumerate(((2, 3), (2, 6), (18, 12), (2, 24))):
        for block in range(depth):
            shapes[f"backbone.stages.{stage}.blocks.{block}.attn.w_msa.relative_position_bias_table"] = (169, heads)
    config = _mmdet.config_of({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    swin = config.backbone_config
    assert (swin.embed_dim, list(swin.depths), list(swin.num_heads), swin.window_size) == (96, [2, 2, 18, 2], [3, 6, 12, 24], 7)
    assert (config.num_queries, config.encoder_layers, config.decoder_layers, config.num_attention_heads) == (100, 6, 10, 8)
    assert (config.encoder_feedforward_dim, config.dim_feedforward, config.num_labels, config.hidden_dim) == (1024, 2048, 80, 256)


def test_checkpoints_that_do_not_fit_are_named(tmp_path):
    other = tmp_path / "other.pth"
    torch.save({"state_dict": {"fc.weight": torch.zeros(2, 2)}}, other)
    with pytest.raises(MmalignError, match="other.pth is no mmdet 2.x Mask2Former .*743b7d99"):
        _mmdet.load_checkpoint(other, "cpu", "float32")
    state = mmdet_state()
    torch.save({"state_dict": {**state, "panoptic_head.surprise.weight": torch.zeros(1)}}, other)
    with pytest.raises(MmalignError, match="panoptic_head.surprise.weight"):
        _mmdet.load_checkpoint(other, "cpu", "float32")
    del state["panoptic_head.query_embed.weight"]
    torch.save({"state_dict": state}, other)
    with pytest.raises(MmalignError, match="queries_embedder.weight"):
        _mmdet.load_checkpoint(other, "cpu", "float32")


def test_only_the_named_file_is_official(checkpoint, tmp_path):
    renamed = tmp_path / _mmdet.OFFICIAL_FILE
    renamed.write_bytes(checkpoint.read_bytes())
    assert not _mmdet.is_official(renamed)  # its content is what counts
