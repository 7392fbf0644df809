"""What families that write masked text promise, as functions of a loaded tiny model."""

import pytest
import torch
from helpers.masked_contract import QUESTIONS, picture

from mmalign.types import UsageError

PICTURES = [picture(1), None, picture(2, 40, 16)]


def texts_are_alone_what_they_are_in_company(model):
    settings = {"temperature": 1.0, "max_tokens": 8, "steps": 6, "block": 4}
    together = model.generate_text(QUESTIONS, PICTURES, [1, 2, 3], **settings)
    for row, question in enumerate(QUESTIONS):
        alone = model.generate_text([question], [PICTURES[row]], [row + 1], **settings)
        assert alone.texts[0] == together.texts[row]
        assert alone.ids[0][alone.mask[0]].tolist() == together.ids[row][together.mask[row]].tolist()
        assert torch.equal(alone.log_prob[0][alone.mask[0]], together.log_prob[row][together.mask[row]])


def written_in_one_step_the_estimate_is_the_writers(model):
    """All tokens are then drawn from the fully hidden answer, which is what one_step scores."""
    model_tail, model.tail = model.tail, ()
    try:
        written = model.generate_text(QUESTIONS, PICTURES, [1, 2, 3], temperature=1.0, max_tokens=6, steps=1)
        everything = torch.ones(3, 6, dtype=torch.bool)
        ids = torch.zeros(3, 6, dtype=torch.long)
        ids[:, : written.ids.shape[1]] = written.ids
        scored = model.text_tokens_log_prob(QUESTIONS, PICTURES, ids, everything)
    finally:
        model.tail = model_tail
    width = written.ids.shape[1]
    assert ((scored[:, :width] - written.log_prob) * written.mask).abs().max() < 1e-4 and scored.requires_grad


def mc_estimates_share_their_contexts_by_seed(model):
    answers = ["two", "two red circles and a star"]
    asked = (QUESTIONS[:2], PICTURES[:2], answers)
    first, mask = model.text_log_prob(*asked, estimator="mc", seeds=[1, 2], draws=3)
    again, _ = model.text_log_prob(*asked, estimator="mc", seeds=[1, 2], draws=3)
    other, _ = model.text_log_prob(*asked, estimator="mc", seeds=[3, 4], draws=3)
    assert torch.equal(first, again) and not torch.allclose(first, other) and (first[~mask] == 0).all()
    alone, alone_mask = model.text_log_prob(QUESTIONS[:1], PICTURES[:1], answers[:1], estimator="mc", seeds=[1], draws=3)
    assert alone_mask.sum() == mask[0].sum()
    with pytest.raises(UsageError, match="seed"):
        model.text_log_prob(*asked, estimator="mc")
    with pytest.raises(UsageError, match="one_step and mc"):
        model.text_log_prob(*asked, estimator="exact")


def one_step_hides_the_whole_answer(model):
    """So each token's estimate depends on the answer's length, and not on its other words."""
    log_prob, mask = model.text_log_prob(["how many"] * 2, [picture(1)] * 2, ["two", "red"])
    ids = torch.tensor([[5, 6, 7], [5, 9, 7]]) + 20
    everything = torch.ones(2, 3, dtype=torch.bool)
    scored = model.text_tokens_log_prob(["how many"] * 2, [picture(1)] * 2, ids, everything)
    assert torch.allclose(scored[0, [0, 2]], scored[1, [0, 2]], atol=1e-6) and (log_prob[mask] < 0).all()


def blocks_must_divide(model):
    for settings in ({"max_tokens": 6, "block": 4}, {"max_tokens": 8, "block": 4, "steps": 3}):
        with pytest.raises(UsageError, match="blocks of"):
            model.generate_text(["how many"], None, [1], **settings)


def embeddings_say_what_is_text_and_what_is_picture(model):
    found = model.embed(QUESTIONS[:2], [picture(1, 16, 16), None])
    assert found.is_image.sum(1).tolist() == [model.tokens, 0] and not (found.is_text & found.is_image).any()
    assert (found.is_text.sum(1) > 3).all() and not (found.is_text & ~found.mask).any()


TEXT_CONTRACT = [
    texts_are_alone_what_they_are_in_company,
    written_in_one_step_the_estimate_is_the_writers,
    mc_estimates_share_their_contexts_by_seed,
    one_step_hides_the_whole_answer,
    blocks_must_divide,
    embeddings_say_what_is_text_and_what_is_picture,
]
