"""VQAScore: how probable CLIP-FlanT5 finds the answer "Yes" to 'Does this figure show "{prompt}"?' (0 to 1).

Paper: Lin et al., arXiv 2404.01291; linzhiqiu/t2v_metrics at 10d549b (its last version with CLIP-FlanT5). The score is exp of the mean
log-probability of the two answer tokens, that is the square root of P(Yes) P(</s> | Yes), and not P(Yes) as the paper's equation says:
parts hold both factors. T5's tokenizer ends each piece of text with </s>, so one stands before the image. The image is padded to a square
with CLIP's mean colour. Changed: rows are run in groups of equal length, where the original pads and masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mmalign.images import pad_square
from mmalign.scorers import _folders, _weights
from mmalign.scorers._clip import Dtype
from mmalign.scorers._preprocess import CropCentre
from mmalign.scorers._rows import buckets, token_ids
from mmalign.scorers._samples import Item, cut_note, score_in_batches
from mmalign.types import Sample, Score, Value, digest

if TYPE_CHECKING:
    from mmalign.scorers._clip_t5 import ClipT5

NEEDS = ("weights: zhiqiulin/clip-flant5-xl", "weights: openai/clip-vit-large-patch14-336")
VERSION = 1
CONTEXT = 2048
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
FILL = (122, 116, 104)  # CLIP's mean colour, truncated to 8 bits as the original does


@dataclass(frozen=True)
class Config:
    """`model`: folder or hub id of CLIP-FlanT5; `vision`: of its image tower; `tokenizer`: of its T5; question and answer templates."""

    model: str = "zhiqiulin/clip-flant5-xl"
    vision: str = "openai/clip-vit-large-patch14-336"
    tokenizer: str = "google/flan-t5-xl"
    question: str = 'Does this figure show "{}"? Please answer yes or no.'
    answer: str = "Yes"
    batch_size: int = 8
    dtype: Dtype = "bfloat16"


def load(config: Config = Config(), device: str = "cpu") -> VqaScore:
    from mmalign.scorers import _clip_t5

    path = _folders.folder(config.model, "vqascore.model")
    model = _clip_t5.load(path, config.vision, "vqascore", device, config.dtype)
    return VqaScore(config, model, _weights.tokenizer(config.tokenizer, "vqascore.tokenizer"))


class VqaScore:
    """The loaded scorer. Parts: `yes`, the probability of the answer's first token, and `end`, of the end after it."""

    name = "vqascore"
    range = (0.0, 1.0)

    def __init__(self, config: Config, model: ClipT5, words: Any) -> None:
        self.config, self.model, self.words = config, model, words
        self.preprocess = CropCentre(model.vision.config.image_size, rounding="down")
        settings = {key: value for key, value in asdict(config).items() if key in ("question", "answer", "dtype")}
        self.fingerprint = digest("vqascore", VERSION, settings, _weights.fingerprint_tensors(model), _weights.fingerprint_tokenizer(words))

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One value or failure per sample, in order."""
        return score_in_batches(samples, self.config.batch_size, self._measure)

    def _measure(self, items: Sequence[Item]) -> list[Score]:
        import torch

        before, answer = self.words(f"{SYSTEM} USER: ").input_ids, self.words(self.config.answer).input_ids
        room = CONTEXT - len(before) - 1  # the image counts as one token
        asked = token_ids(self.words, [f"\n{self.config.question.replace('{}', item.text)} ASSISTANT: " for item in items])
        scores: list[Score] = [Value(0.0)] * len(items)
        device = next(self.model.projector.parameters()).device
        with torch.no_grad():
            pixels = self.preprocess.images([pad_square(item.pixels, FILL) for item in items])
            images_BPD = self.model.encode_images(pixels)
            for group in buckets([min(len(ids), room) for ids in asked], self.config.batch_size):
                rows = len(group)
                log_BL = self.model.log_prob(
                    images_BPD[group],
                    torch.tensor([before] * rows, device=device),
                    torch.tensor([asked[position][:room] for position in group], device=device),
                    torch.tensor([answer] * rows, device=device),
                )
                means, factors = log_BL.mean(-1).exp().tolist(), log_BL.exp().tolist()
                for position, mean, (yes, *rest) in zip(group, means, factors, strict=True):
                    note = cut_note(len(before) + 1 + len(asked[position]), CONTEXT)
                    scores[position] = Value(mean, {"yes": yes, "end": rest[-1] if rest else yes}, detail=note)
        return scores
