"""Mask2Former as mmdet 2.x runs it: the image preparation, and the objects read from raw logits.

Source: mmdet 2.28.2, config mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco and MaskFormerFusionHead.instance_postprocess, whose
numbers GenEval's thresholds 0.3 and 0.9 are calibrated for. The processor of transformers is not used: it squashes to 384 x 384, thresholds
there and pads after normalising. Checked against mmdet's own classes: equal input pixels, boxes and masks; scores within 2e-7.

Shapes: Q queries, C classes, N objects; h, w mask logits; H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmalign.images import Size, normalise, resize
from mmalign.scorers._geneval_verdict import Detection

if TYPE_CHECKING:
    import numpy as np
    import torch

SHORT, LONG, DIVISOR, GREY = 800, 1333, 32, 128
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
CANDIDATES = 100  # query x class pairs kept per image
PIXELS_AT_ONCE = 2**25  # of masks at full size: a hundred large ones at once are gigabytes
MAY_LACK = ("swin.layernorm.", "criterion.")  # unused by the backbone; the loss's own buffer


@dataclass(frozen=True)
class Found:
    """One detection with the index of its class."""

    label: int
    detection: Detection


def fit(size: Size, short: int = SHORT) -> Size:
    """The size of an image [height, width] scaled to fit 1333 x 800 (long x short; `short` changes both), each side rounded half up."""
    scale = min(round(LONG * short / SHORT) / max(size), short / min(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def prepare(image_HWC: np.ndarray, short: int = SHORT) -> tuple[torch.Tensor, Size]:
    """The network's input [1, 3, H, W] (multiples of 32, grey padding before normalisation) and the size of its unpadded part."""
    import torch
    from torch.nn import functional

    height, width = fit(image_HWC.shape[:2], short)
    x_BCHW = torch.from_numpy(resize(image_HWC, (height, width), "opencv-bilinear")).permute(2, 0, 1)[None].float()
    x_BCHW = functional.pad(x_BCHW, (0, -width % DIVISOR, 0, -height % DIVISOR), value=GREY)
    return normalise(x_BCHW, MEAN, STD), (height, width)


def objects(
    class_logits_QC: torch.Tensor, mask_logits_Qhw: torch.Tensor, padded: Size, unpadded: Size, original: Size, floor: float = 0.0
) -> list[Found]:
    """The objects of one image, in no order: `objects_of_each` of a batch of one. FloatingPointError when a logit is NaN or infinite."""
    (found,) = objects_of_each(class_logits_QC[None], mask_logits_Qhw[None], padded, unpadded, original, floor)
    if isinstance(found, FloatingPointError):
        raise found
    return found


def objects_of_each(
    class_logits_BQC: torch.Tensor, mask_logits_BQhw: torch.Tensor, padded: Size, unpadded: Size, original: Size, floor: float = 0.0
) -> list[list[Found] | FloatingPointError]:
    """The objects of each image, in no order; images of one size. An image with a logit that is NaN or infinite gives the error.

    Softmax over C classes and "no object" (dropped), the best 100 query-class pairs, mask logits upsampled to the padded input, cut to the
    unpadded part, resized to the original image and only then thresholded at 0. Score: class probability times the mean sigmoid inside the
    mask. Box: tight around the mask, right and bottom exclusive; all zero for an empty mask.
    `floor` leaves out pairs whose class probability alone is below it: their score cannot exceed it, and their masks are the costly part.
    """
    import torch

    finite_B = torch.isfinite(class_logits_BQC).flatten(1).all(1) & torch.isfinite(mask_logits_BQhw).flatten(1).all(1)
    probabilities_BQC = class_logits_BQC.float().softmax(-1)[:, :, :-1]
    n_classes = probabilities_BQC.shape[2]
    best = probabilities_BQC.flatten(1).topk(min(CANDIDATES, probabilities_BQC[0].numel()))
    pairs: list[list[tuple[int, int, float]]] = []  # of each image: query, class, probability
    for is_finite, values, indices in zip(finite_B.tolist(), best.values.tolist(), best.indices.tolist(), strict=True):
        kept = [(index, value) for index, value in zip(indices, values, strict=True) if value >= floor * 0.999]  # a mean sigmoid may pass 1
        pairs.append([(index // n_classes, index % n_classes, value) for index, value in kept] if is_finite else [])
    queries = [(row, query) for row, own in enumerate(pairs) for query in sorted({query for query, _, _ in own})]
    masks: dict[tuple[int, int], tuple[float, np.ndarray, np.ndarray]] = {}
    size = max(1, PIXELS_AT_ONCE // (max(padded[0], original[0]) * max(padded[1], original[1])))
    for start in range(0, len(queries), size):
        some = queries[start : start + size]
        rows, own = zip(*some, strict=True)
        masks |= dict(zip(some, _masks(mask_logits_BQhw[list(rows), list(own)], padded, unpadded, original), strict=True))
    found: list[list[Found] | FloatingPointError] = []
    for row, (is_finite, some_pairs) in enumerate(zip(finite_B.tolist(), pairs, strict=True)):
        objects_of_row = []
        for query, label, probability in some_pairs:
            quality, mask_HW, box = masks[row, query]
            objects_of_row.append(Found(label, Detection(box, probability * quality, mask_HW)))
        found.append(objects_of_row if is_finite else FloatingPointError("The detector's logits hold NaN or infinity"))
    return found


def _masks(logits_Phw: torch.Tensor, padded: Size, unpadded: Size, original: Size) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """Of each query its mean sigmoid inside its mask, the mask [H, W] and its box [4]."""
    import numpy as np
    from torch.nn import functional

    logits = functional.interpolate(logits_Phw.float()[None], size=padded, mode="bilinear", align_corners=False)
    logits = logits[..., : unpadded[0], : unpadded[1]]
    logits_PHW = functional.interpolate(logits, size=original, mode="bilinear", align_corners=False)[0]
    mask_PHW = logits_PHW > 0
    quality_P = (logits_PHW.sigmoid() * mask_PHW).flatten(1).sum(1) / (mask_PHW.flatten(1).sum(1) + 1e-6)
    (left, right), (top, bottom) = (_extent(mask_PHW.any(axis)) for axis in (1, 2))
    boxes = np.array([left, top, right, bottom], np.float32).T
    return list(zip(quality_P.tolist(), mask_PHW.cpu().numpy(), boxes, strict=True))


def _extent(any_PL: torch.Tensor) -> tuple[list[int], list[int]]:
    """Of each row the first index that holds and one past the last; 0 and 0 where none does."""
    length, is_any = any_PL.shape[1], any_PL.any(1)
    first, last = any_PL.int().argmax(1), length - any_PL.flip(1).int().argmax(1)
    return (first * is_any).tolist(), (last * is_any).tolist()


def detect(
    model: Any, images: Sequence[np.ndarray], batch_size: int, floor: float = 0.0, short: int = SHORT
) -> list[list[Found] | FloatingPointError]:
    """The objects of each image, in the order given; an image whose logits are not finite gives the error in its place.

    Only images of one size share a batch, so that padding, and with it the result, depends on the image alone.
    """
    import torch

    parameter = next(model.parameters())
    by_size: dict[Size, list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(image.shape[:2], []).append(index)
    results: dict[int, list[Found] | FloatingPointError] = {}
    for size, indices in by_size.items():
        for start in range(0, len(indices), batch_size):
            chunk = indices[start : start + batch_size]
            prepared = [prepare(images[index], short) for index in chunk]
            x_BCHW = torch.cat([pixels for pixels, _ in prepared]).to(parameter.device, parameter.dtype)
            padded = x_BCHW.shape[2], x_BCHW.shape[3]
            with torch.inference_mode():
                out = model(pixel_values=x_BCHW, output_auxiliary_logits=False)
                logits = out.class_queries_logits, out.masks_queries_logits
                results |= zip(chunk, objects_of_each(*logits, padded, prepared[0][1], size, floor), strict=True)
    return [results[index] for index in range(len(images))]
