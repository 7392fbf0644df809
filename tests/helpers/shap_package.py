"""The `shap` package as the reference: its partition explainer on a grid of cells, and its image masker as its users call it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from mmalign.attribution.game import Game


def explain_grid(game: Game, evaluations: int, batch: int) -> tuple[np.ndarray, int]:
    """Values [h, w] over cells of the game's first picture, and the number of evaluations. The masker hands the mask itself on."""
    import shap

    class Cells(shap.maskers.Image):
        def __call__(self, mask, x):
            return (np.asarray(mask).reshape(1, *game.grid),)

        def mask_shapes(self, x):
            return [game.grid]

    counted = [0]

    def model(masks: np.ndarray) -> np.ndarray:
        counted[0] += len(masks)
        rows = torch.from_numpy(masks.astype(bool))[:, None]
        return game.rows(torch.zeros(len(rows), dtype=torch.long), rows).numpy()

    masker = Cells(np.zeros((*game.grid, 1)))
    explainer = shap.PartitionExplainer(model, masker)
    found = explainer(np.zeros((1, *game.grid, 1)), max_evals=evaluations, batch_size=batch, silent=True)
    return np.asarray(found.values).reshape(game.grid), counted[0]


def image_explainer(score: Callable[[torch.Tensor], torch.Tensor], height: int, width: int, kernel: int):
    """`explain(image [H, W, 3] float32, evaluations, batch)` -> values [H, W] summed over channels, by the package's own blur masker."""
    import shap

    def model(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return score(torch.from_numpy(np.ascontiguousarray(images, np.float32)).permute(0, 3, 1, 2)).double().numpy()

    explainer = shap.PartitionExplainer(model, shap.maskers.Image(f"blur({kernel},{kernel})", (height, width, 3)))

    def explain(image: np.ndarray, evaluations: int, batch: int) -> np.ndarray:
        found = explainer(image[None].astype(np.float32), max_evals=evaluations, batch_size=batch, silent=True)
        return np.asarray(found.values).reshape(height, width, 3).sum(2)

    return explain
