"""How the tiny masked models learn to draw: codes hidden at random, guessed from the others and the text.

It trains through the interface that a family serves with (`encode_prompts`, `log_prob_given`), so that what is trained is what is run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from mmalign.models.layers.generation import write_settings
from mmalign.models.layers.magvit import Magvit
from mmalign.models.layers.masked import random_masks
from mmalign.testbed import corpus, magvit
from mmalign.testbed.build_janus import PATCH
from mmalign.testbed.magvit import CODES, FIRST, QUARTERS, SIDE, TOKENS, codes_of
from mmalign.testbed.render import CELL, MARGIN, render
from mmalign.testbed.training import fit
from mmalign.testbed.world import COLORS, SHAPES, SIZES
from mmalign.testbed.world import SIDE as BOARD
from mmalign.trajectory import Policy, Prompts, Trajectory

GUIDANCE = 1.0
STEPS = 64  # one code at a time: things drawn in one step do not know of each other
TEXTS = 800  # of each sort that the tokenizer learns from; all words of the world are among them
LENGTHS = 2  # groups of similar length that a batch is cut into, so that short texts carry less padding


@dataclass(frozen=True)
class Stage:
    """A stretch of training with its own warm-up and cosine. `wrong` is the share of drawings with one thing wrong, `planned` that of
    drawings whose text carries a plan; where a text leaves it open, the corpus' painter decides where things stand.

    `thing_weight` is that of a place with a thing in the loss, where an empty one weighs 1: more than 1 learns faster and draws too many
    things, so a last stage has 1. `by_cell` is the share of pictures of which whole cells are hidden, not single patches. `answers`:
    questions about pictures in a step, for a model that reads.
    """

    steps: int
    learning_rate: float
    drawings: int
    wrong: float
    planned: float
    thing_weight: float
    by_cell: float
    answers: int = 0


@dataclass(frozen=True)
class Recipe:
    """Sizes and lengths of a build."""

    stages: tuple[Stage, ...]
    seed: int = 0
    width: int = 160
    layers: int = 4
    heads: int = 5
    picture: magvit.Recipe = magvit.Recipe()


class SharedAttributes(nn.Module):
    """Adds to the rows of codes what their patches have in common: colour, and shape with size and quarter.

    A code's embedding is then its own part plus those of its attributes, as MAGVIT-v2's paper proposes to factorise its tokens: red is
    learned once for all things and not 32 times. `parametrize` folds it into plain weights when training is over.
    """

    attributes_CA: Tensor

    def __init__(self, offset: int, width: int, seed: int) -> None:
        super().__init__()
        self.offset = offset
        self.register_buffer("attributes_CA", code_attributes(), persistent=False)
        number = self.attributes_CA.shape[1]
        self.rows = nn.Parameter(0.02 * torch.randn(number, width, generator=torch.Generator().manual_seed(seed)))

    def forward(self, weight_VE: Tensor) -> Tensor:
        end = self.offset + CODES
        shared = self.attributes_CA @ self.rows
        return torch.cat([weight_VE[: self.offset], weight_VE[self.offset : end] + shared, weight_VE[end:]])


def code_attributes() -> Tensor:
    """[512, 42] with ones where a code has an attribute: 32 parts of things, 8 colours, empty, unused."""
    parts = len(SHAPES) * len(SIZES) * QUARTERS
    table = torch.zeros(CODES, parts + len(COLORS) + 2)
    table[0, -2] = 1
    table[1:FIRST, -1] = 1
    for number in range(CODES - FIRST):
        rest, quarter = divmod(number, QUARTERS)
        rest, size = divmod(rest, len(SIZES))
        shape, color = divmod(rest, len(COLORS))
        table[FIRST + number, (shape * len(SIZES) + size) * QUARTERS + quarter] = 1
        table[FIRST + number, parts + color] = 1
    return table


def share_attributes(net: Any, offset: int, seed: int) -> None:
    """Lets the codes' input embeddings and output rows share what their patches share, until `unshare_attributes`."""
    for number, layer in enumerate((net.get_input_embeddings(), net.lm_head)):
        parametrize.register_parametrization(layer, "weight", SharedAttributes(offset, layer.weight.shape[1], seed + number))


def unshare_attributes(net: Any) -> None:
    for layer in (net.get_input_embeddings(), net.lm_head):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def build(
    name: str,
    recipe: Recipe,
    make_model: Callable[[Recipe, Path, Magvit], tuple[Any, dict[str, Any]]],
    save: Callable[[Any, dict[str, Any], Path], None],
    out: Path,
    work: Path,
) -> None:
    """Trains the image tokenizer, then the trunk (each resumes where it was stopped), and writes the checkpoint."""
    vq = magvit.make_magvit(recipe.seed)
    magvit.train_magvit(vq, recipe.picture, work)
    out.mkdir(parents=True, exist_ok=True)
    model, config = make_model(recipe, out, vq)
    train(name, model, recipe.seed, recipe.stages, work)
    save(model, config, out)
    write_settings(out, GUIDANCE, STEPS)
    magvit.save_magvit(vq, out / "magvitv2")


def train(name: str, model: Any, seed: int, stages: Sequence[Stage], work: Path, no_text: float = 0.1) -> None:
    """Trains a family's loaded model stage by stage; each resumes where it was stopped."""
    share_attributes(model.net, model.offset, seed)
    before = 0
    for number, stage in enumerate(stages, 1):

        def loss_of(step: int, stage: Stage = stage, before: int = before) -> tuple[Tensor, dict[str, float]]:
            with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # twice as fast on a CPU as the fused kernel
                losses = {"draw": drawing_loss(model, seed, stage, before + step, no_text)}
                if stage.answers:
                    losses["answer"] = answering_loss(model, seed, stage, before + step)
            return sum(losses.values(), torch.zeros(())), {key: round(float(value.detach()), 4) for key, value in losses.items()}

        fit(f"{name}-{number}", work, model.net.parameters(), {"net": model.net}, loss_of, stage.steps, stage.learning_rate, warmup=200)
        before += stage.steps
    unshare_attributes(model.net)


def drawing_loss(model: Any, seed: int, stage: Stage, step: int, no_text: float) -> Tensor:
    """Cross-entropy of hidden codes: cos(pi / 2 u) of a picture's for a uniform u, as the families train; `no_text` of the texts are empty
    ones, for guidance."""
    examples = corpus.drawings(20_000_000 + seed + step, stage.drawings, stage.wrong, stage.planned, True)
    stream = torch.Generator().manual_seed(1_000_003 * seed + step)
    hidden_BN = hidden_codes(torch.rand(len(examples), TOKENS + 1, generator=stream), round(stage.by_cell * len(examples)))
    blank_B = torch.rand(len(examples), generator=stream) < no_text
    order = sorted(range(len(examples)), key=lambda row: len(examples[row].text))
    codes_BN = codes_of([example.scene for example in examples])
    weight_BN = hidden_BN * (1 + (stage.thing_weight - 1) * (codes_BN != 0))
    total = torch.zeros(())
    for rows in np.array_split(order, LENGTHS):
        prompts = without_text(model.encode_prompts([examples[row].text for row in rows]), blank_B[rows])
        codes = codes_BN[rows]
        shown = Trajectory("masked", codes, torch.zeros(codes.shape), Policy(guidance=1.0), tuple(range(len(rows))))
        log_prob = model.log_prob_given(prompts, shown, hidden_BN[rows], which="cond")
        total = total - (log_prob * weight_BN[rows]).sum()
    return total / weight_BN.sum()


def hidden_codes(uniform_BN: Tensor, by_cell: int) -> Tensor:
    """bool [B, N] codes to hide for training; in the first `by_cell` pictures a cell's four are hidden together, or none.

    A sampler that keeps what it is surest of leaves the things for the end: whole cells are then hidden, all around them is known, and
    what is left to decide is how many things there are. Single patches hidden at random leave such states out: four of one cell are
    hardly ever hidden when most of the picture is shown.
    """
    single = random_masks(uniform_BN, TOKENS)
    unit_N = units()
    whole = random_masks(uniform_BN[:by_cell, : int(unit_N.max()) + 2], int(unit_N.max()) + 1)
    return torch.cat([whole[:, unit_N], single[by_cell:]])


def units() -> Tensor:
    """[N] numbers of what is hidden together: 0 to 8 the cells, then each patch of the margin by itself."""
    numbers = torch.zeros(SIDE, SIDE, dtype=torch.long)
    margin, patches = MARGIN // PATCH, CELL // PATCH
    cells = torch.arange(BOARD**2).view(BOARD, BOARD).repeat_interleave(patches, 0).repeat_interleave(patches, 1)
    is_margin = torch.ones_like(numbers, dtype=torch.bool)
    is_margin[margin:-margin, margin:-margin] = False
    numbers[~is_margin] = cells.flatten()
    numbers[is_margin] = BOARD**2 + torch.arange(int(is_margin.sum()))
    return numbers.flatten()


def answering_loss(model: Any, seed: int, stage: Stage, step: int) -> Tensor:
    """Cross-entropy of right answers about pictures, which the model reads by their codes."""
    examples = corpus.questions(30_000_000 + seed + step, stage.answers)
    pictures = list(render([example.scene for example in examples]))
    log_prob, mask = model.text_log_prob([e.question for e in examples], pictures, [e.answer for e in examples])
    return -log_prob.sum() / mask.sum()


def without_text(prompts: Prompts, blank_B: Tensor) -> Prompts:
    """The prompts with those True in `blank_B` replaced by their unconditional twins."""
    blank = blank_B[:, None]
    ids, mask = torch.where(blank, prompts.uncond_ids, prompts.ids), torch.where(blank, prompts.uncond_mask, prompts.mask)
    return replace(prompts, ids=ids, mask=mask)


def train_tokenizer(special: Sequence[str], size: int, **roles: str) -> Any:
    """A byte-level BPE of the world's texts with these special tokens first; `roles` name those of begin, end and padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(sorted(set(corpus.vocabulary_texts(TEXTS))), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **roles)
