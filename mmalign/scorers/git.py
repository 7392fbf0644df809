"""GIT reward: the mean over a prompt's attributed nouns of P(yes) that GIT gives to "{noun}?" (0 to 1), as in T2I-R1.

CaraJ7/T2I-R1 src/t2i-r1/src/utils/reward_git.py at 2d9d4d1, model microsoft/git-large-vqav2. A question is [CLS] and its tokens without
[SEP]; P(yes) is taken against P(no) at its last position. Prompts of the task types spatial and numeracy score 0 (the detector's reward
judges those), prompts that name nothing score 1. Changed: an image is encoded once for all its nouns, and an empty list of attributed nouns
means the plain nouns, where the original takes the mean of nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mmalign.scorers import _phrases, _weights
from mmalign.scorers._clip import Dtype, preprocess_of
from mmalign.scorers._rows import Row, answer, token_ids
from mmalign.scorers._samples import Item, score_in_batches
from mmalign.scorers._whole import load_whole
from mmalign.types import Failure, Sample, Score, Value, digest

if TYPE_CHECKING:
    import torch

NEEDS = ("weights: microsoft/git-large-vqav2",)
VERSION = 1
OTHER_JUDGES = ("spatial", "numeracy")


@dataclass(frozen=True)
class Config:
    """`model`: hub id or folder; `parser`: where nouns come from when a prompt's metadata has none."""

    model: str = "microsoft/git-large-vqav2"
    parser: _phrases.Parser = "rule"
    batch_size: int = 16
    dtype: Dtype = "float32"


def load(config: Config = Config(), device: str = "cpu") -> GitReward:
    from transformers import GitForCausalLM

    model = load_whole(GitForCausalLM, config.model, device, config.dtype, "git.model").requires_grad_(False)
    return GitReward(config, model, _weights.tokenizer(config.model, "git.model"))


class GitReward:
    """The loaded scorer. A value's parts are P(yes) by noun."""

    name = "git"
    range = (0.0, 1.0)

    def __init__(self, config: Config, model: Any, words: Any) -> None:
        self.config, self.model, self.words = config, model, words
        self.yes, self.no = words.convert_tokens_to_ids("yes"), words.convert_tokens_to_ids("no")
        self.preprocess = preprocess_of(config.model, model, "git.model", rounding="down")
        settings = {"parser": config.parser, "dtype": config.dtype, "preprocess": asdict(self.preprocess)}
        chunks = _phrases.spacy_version() if config.parser == "spacy" else "rule"
        self.fingerprint = digest(
            "git", VERSION, settings, chunks, _weights.fingerprint_tensors(model), _weights.fingerprint_tokenizer(words)
        )

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One value or failure per sample, in order."""
        return score_in_batches(samples, self.config.batch_size, self._measure)

    def _measure(self, items: Sequence[Item]) -> list[Score]:
        import torch

        asked = [self._nouns(item) for item in items]
        pairs = [(at, noun) for at, nouns in enumerate(asked) for noun in nouns]
        questions = token_ids(self.words, [f"{noun}?" for _, noun in pairs], add_special_tokens=False)
        rows = [Row(at, (self.words.cls_token_id, *ids)) for (at, _), ids in zip(pairs, questions, strict=True)]
        limit = self.model.config.max_position_embeddings
        with torch.no_grad():
            weight = self.model.git.visual_projection.visual_projection[0].weight
            pixels_BCHW = self.preprocess.images([item.pixels for item in items]).to(weight.device, weight.dtype)
            visual_BND = self.model.git.visual_projection(self.model.git.image_encoder(pixels_BCHW).last_hidden_state)
            short = [row for row in rows if len(row.ids) <= limit]
            answers = iter(answer(short, self.config.batch_size, lambda group: self._yes(visual_BND, group)))
        numbers = iter([next(answers) if len(row.ids) <= limit else None for row in rows])
        return [self._score(item, nouns, [next(numbers) for _ in nouns]) for item, nouns in zip(items, asked, strict=True)]

    def _nouns(self, item: Item) -> list[str]:
        meta = item.sample.request.prompt.meta
        if meta.get("task_type") in OTHER_JUDGES or ("nouns" in meta and not meta["nouns"] and not meta.get("attr_nouns")):
            return []
        return _phrases.phrases(item.sample.request.prompt, self.config.parser, ("attr_nouns", "nouns"))

    def _yes(self, visual_BND: torch.Tensor, rows: Sequence[Row]) -> list[float]:
        """P(yes) against P(no) of questions of one length: GIT from its encoded image on.

        Image tokens see each other, text tokens see the image and what precedes them (transformers' GitModel, whose forward would encode
        the image again for every noun).
        """
        import torch

        ids = torch.tensor([row.ids for row in rows], device=visual_BND.device)
        visual = visual_BND[[row.image for row in rows]]
        hidden = torch.cat([visual, self.model.git.embeddings(input_ids=ids)], dim=1)
        n_image, n_all = visual.shape[1], hidden.shape[1]
        sees = torch.ones(n_all, n_all, dtype=torch.bool, device=ids.device).tril()
        sees[:n_image, :n_image] = True
        mask = torch.zeros(len(rows), 1, n_all, n_all, dtype=hidden.dtype, device=ids.device).masked_fill(
            ~sees, torch.finfo(hidden.dtype).min
        )
        logits = self.model.output(self.model.git.encoder(hidden, attention_mask=mask).last_hidden_state[:, -1])
        return logits.float()[:, [self.yes, self.no]].softmax(-1)[:, 0].tolist()

    def _score(self, item: Item, nouns: Sequence[str], yes: Sequence[float | None]) -> Score:
        task = item.sample.request.prompt.meta.get("task_type")
        if task in OTHER_JUDGES:
            return Value(0.0, detail=f"not judged: the task is {task}")
        if not nouns:
            return Value(1.0, detail="the prompt names no thing")
        read = [number for number in yes if number is not None]
        if len(read) < len(nouns):
            return Failure(
                "score", "error", f"A noun of {item.sample.request.id} is longer than GIT's context; give short `nouns` in its metadata."
            )
        return Value(sum(read) / len(read), dict(zip(nouns, read, strict=True)))
