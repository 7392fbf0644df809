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
    """The objects of one image, in no order.

    Softmax over C classes and "no object" (dropped), the best 100 query-class pairs, mask logits upsampled to the padded input, cut to the
    unpadded part, resized to the original image and only then thresholded at 0. Score: class probability times the mean sigmoid inside the
    mask. Box: tight around the mask, right and bottom exclusive; all zero for an empty mask.
    `floor` leaves out pairs whose class probability alone is below it: their score cannot exceed it, and their masks are the costly part.
    FloatingPointError when a logit is NaN or infinite.
    """
    import torch
    from torch.nn import functional

    if not (torch.isfinite(class_logits_QC).all() and torch.isfinite(mask_logits_Qhw).all()):
        raise FloatingPointError("The detector's logits hold NaN or infinity")
    probabilities_QC = class_logits_QC.float().softmax(-1)[:, :-1]
    n_classes = probabilities_QC.shape[1]
    top_N, pairs_N = probabilities_QC.flatten().topk(min(CANDIDATES, probabilities_QC.numel()))
    pairs_N = pairs_N[top_N >= floor * 0.999]  # the mean sigmoid may exceed 1 by rounding
    queries = sorted({int(pair) // n_classes for pair in pairs_N})
    found = {}
    for query in queries:  # one mask at a time: a hundred at full size are gigabytes
        logits = mask_logits_Qhw[query].float()[None, None]
        logits = functional.interpolate(logits, size=padded, mode="bilinear", align_corners=False)[..., : unpadded[0], : unpadded[1]]
        logits_HW = functional.interpolate(logits, size=original, mode="bilinear", align_corners=False)[0, 0]
        mask_HW = logits_HW > 0
        quality = (logits_HW.sigmoid() * mask_HW).sum() / (mask_HW.sum() + 1e-6)
        found[query] = quality, mask_HW, _box(mask_HW)
    result = []
    for pair in pairs_N.tolist():
        quality, mask_HW, box = found[pair // n_classes]
        score = float(probabilities_QC.flatten()[pair] * quality)
        result.append(Found(pair % n_classes, Detection(box, score, mask_HW.cpu().numpy())))
    return result


def _box(mask_HW: torch.Tensor) -> np.ndarray:
    import numpy as np

    columns, rows = mask_HW.any(0).nonzero()[:, 0].tolist(), mask_HW.any(1).nonzero()[:, 0].tolist()
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if columns else [0, 0, 0, 0], np.float32)


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
                for row, index in enumerate(chunk):
                    logits = out.class_queries_logits[row], out.masks_queries_logits[row]
                    try:
                        results[index] = objects(*logits, padded, prepared[row][1], size, floor)
                    except FloatingPointError as error:
                        results[index] = error
    return [results[index] for index in range(len(images))]
