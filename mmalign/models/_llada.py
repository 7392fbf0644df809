"""What MMaDA and Lumina-DiMOO share: LLaDA's trunk, a Llama that sees both ways, read from its own names; and text in both ways.

Suffixes: B samples, R rows, L tokens of a row, A tokens of an answer, K slots, V vocabulary, E model width.
Sources: Gen-Verse/MMaDA at 3cdb870, Alpha-VLLM/Lumina-DiMOO at 81344e6 (models/modeling_llada.py of both). Changed: padding is masked
out and takes no part, so that batches of any prompts are those of the prompts alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.models._masked import MaskedImages, Pictures
from mmalign.models.layers import masked_text
from mmalign.models.layers.lanes import lanes, padded_lengths
from mmalign.models.layers.masked import HIDDEN, LogitsAt, first_slots
from mmalign.models.layers.masked_text import Estimator
from mmalign.models.layers.noise import uniforms
from mmalign.models.layers.rows import pad_left, pad_right
from mmalign.models.layers.weights import check_names, check_shapes, read_tensors
from mmalign.trajectory import Embedding, TextTrajectory
from mmalign.types import MmalignError, UsageError

# LLaDA's names and Llama's; `#` stands for the number of a block.
RENAMES = (
    ("model.transformer.wte.", "model.embed_tokens."),
    ("model.transformer.ln_f.", "model.norm."),
    ("model.transformer.ff_out.", "lm_head."),
    ("model.transformer.blocks.#.attn_norm.", "model.layers.#.input_layernorm."),
    ("model.transformer.blocks.#.q_proj.", "model.layers.#.self_attn.q_proj."),
    ("model.transformer.blocks.#.k_proj.", "model.layers.#.self_attn.k_proj."),
    ("model.transformer.blocks.#.v_proj.", "model.layers.#.self_attn.v_proj."),
    ("model.transformer.blocks.#.attn_out.", "model.layers.#.self_attn.o_proj."),
    ("model.transformer.blocks.#.ff_norm.", "model.layers.#.post_attention_layernorm."),
    ("model.transformer.blocks.#.ff_proj.", "model.layers.#.mlp.gate_proj."),
    ("model.transformer.blocks.#.up_proj.", "model.layers.#.mlp.up_proj."),
    ("model.transformer.blocks.#.ff_out.", "model.layers.#.mlp.down_proj."),
)
REQUIRED = {"block_type": "llama", "activation_type": "silu", "include_bias": False}  # what this trunk is


def renamed(tensors: Mapping[str, Tensor], to_llama: bool = True) -> dict[str, Tensor]:
    """The tensors under Llama's names, or back under LLaDA's; a name that no rule knows stays."""
    pairs = RENAMES if to_llama else tuple((new, old) for old, new in RENAMES)
    rules = [(re.compile("^" + re.escape(old).replace(r"\#", r"(\d+)")), new.replace("#", r"\1")) for old, new in pairs]
    found = {}
    for name, tensor in tensors.items():
        for pattern, target in rules:
            changed, count = pattern.subn(target, name)
            if count:
                name = changed
                break
        found[name] = tensor
    return found


def read_llada(path: Path, config: Mapping[str, Any], dtype: str) -> Any:
    """A LlamaForCausalLM with the folder's weights, sizes from its config.json and tensors: nothing missing, nothing left over."""
    from transformers import LlamaConfig, LlamaForCausalLM

    differing = [f"{name} {config[name]!r}" for name, value in REQUIRED.items() if config.get(name, value) != value]
    if differing:
        raise MmalignError(f"{path} is a LLaDA of another build ({', '.join(differing)}); supported is {REQUIRED}.")
    tensors = renamed(read_tensors(path))
    try:
        settings = LlamaConfig(
            vocab_size=len(tensors["model.embed_tokens.weight"]),
            hidden_size=config["d_model"],
            intermediate_size=config["mlp_hidden_size"],
            num_hidden_layers=config["n_layers"],
            num_attention_heads=config["n_heads"],
            num_key_value_heads=config.get("n_kv_heads") or config["n_heads"],
            rms_norm_eps=config["rms_norm_eps"],
            max_position_embeddings=config["max_sequence_length"],
            rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
            tie_word_embeddings=bool(config.get("weight_tying")),
        )
        settings._attn_implementation = "sdpa"
    except KeyError as error:
        raise MmalignError(f"The checkpoint {path} lacks {error}, which every LLaDA has. Download the whole folder again.") from error
    with torch.device("meta"):
        shell = LlamaForCausalLM(settings)
    expected = set(shell.state_dict()) - ({"lm_head.weight"} if settings.tie_word_embeddings else set())
    check_names(expected - set(tensors), set(tensors) - expected, path)
    check_shapes(tensors, shell, path)
    return LlamaForCausalLM.from_pretrained(None, config=settings, state_dict=tensors, dtype=getattr(torch, dtype))


class Llada(MaskedImages):
    """A LLaDA that draws and writes. A family adds its rows: `question_row`, `answer_row`, `tail`, `text_of`, `is_text`."""

    ends: frozenset[int]  # tokens after which an answer is over
    tail: tuple[int, ...] = ()  # what follows the hidden tokens of an answer that is to be written

    def __init__(self, net: Any) -> None:
        self.net, self.trunk, self.head = net, net.model, net.lm_head
        self.trainable = {"language": self.trunk, "text_head": self.head}

    def answer_row(self, text: str) -> list[int]:
        """Token ids of an answer with its end."""
        raise NotImplementedError

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids."""
        raise NotImplementedError

    def shard_units(self) -> list[Any]:
        """The modules that are called directly, inner ones first: what FSDP2 must gather one by one."""
        return [*self.trunk.layers, self.net.get_input_embeddings(), self.head, self.trunk]

    # Writing text

    @torch.no_grad()
    def generate_text(
        self,
        texts: Sequence[str],
        images: Pictures,
        seeds: Sequence[int],
        temperature: float = 1.0,
        max_tokens: int = 128,
        steps: int | None = None,
        block: int | None = None,
    ) -> TextTrajectory:
        """Answers to questions. Temperature 0 takes the most probable tokens (their log-probs are then those of temperature 1).

        All of `max_tokens` is written, in `steps` steps (default: one per token) by blocks (default: one); ids and mask end with the first
        end token. `log_prob` is each token's when it was decided: it belongs to the order in which the answer was written.
        """
        if temperature < 0:
            raise UsageError(f"Text needs a temperature >= 0; got {temperature}.")
        steps, block = steps or max_tokens, block or max_tokens
        masked_text.rounds_of(max_tokens, block, steps)
        rows = self._questions(texts, images)
        ids = torch.zeros(len(rows), max_tokens, dtype=torch.long, device=self.device)
        log_prob = torch.zeros(ids.shape, device=self.device)
        for lane in lanes(padded_lengths([len(row) for row in rows], self.width is not None), self.width):
            noise = uniforms([seeds[row] for row in lane.rows], steps * block).to(self.device)
            logits_at = self._answer_logits([rows[row] for row in lane.rows], max_tokens, lane.key)
            written = masked_text.write(logits_at, len(lane.rows), max_tokens, block, steps, temperature, noise, self.device)
            ids[lane.real], log_prob[lane.real] = written.ids[: lane.n_real], written.log_prob[: lane.n_real]
        is_end = torch.isin(ids, torch.tensor(sorted(self.ends), device=self.device))
        mask = is_end.cumsum(1) - is_end.long() == 0
        longest = int(mask.sum(-1).max()) if len(rows) else 0
        ids, mask, log_prob = ids[:, :longest], mask[:, :longest], (log_prob * mask)[:, :longest]
        answers = tuple(self.text_of(row[real].tolist()) for row, real in zip(ids, mask, strict=True))
        return TextTrajectory(answers, ids, mask, log_prob, temperature, tuple(seeds))

    def is_whole(self, ids: Tensor) -> bool:
        return bool(set(ids.tolist()) & self.ends)

    def text_log_prob(
        self,
        texts: Sequence[str],
        images: Pictures,
        answers: Sequence[str],
        estimator: Estimator = "one_step",
        seeds: Sequence[int] | None = None,
        draws: int = 4,
    ) -> tuple[Tensor, Tensor]:
        """[B, A] estimates (float32, with gradients) for each answer's tokens and its end, and the mask of real ones; 0 elsewhere.

        A masked model has no exact log-probability of a text: see `masked_text.contexts` for what one_step and mc are.
        """
        ids, mask = (tensor.to(self.device) for tensor in pad_right([self.answer_row(answer) for answer in answers], self.pad_id))
        return self.text_tokens_log_prob(texts, images, ids, mask, 1.0, estimator, seeds, draws), mask

    def text_tokens_log_prob(
        self,
        texts: Sequence[str],
        images: Pictures,
        ids: Tensor,
        mask: Tensor,
        temperature: float = 1.0,
        estimator: Estimator = "one_step",
        seeds: Sequence[int] | None = None,
        draws: int = 4,
    ) -> Tensor:
        """[B, A] estimates for given token ids after the questions; 0 where the mask is False. One forward per context."""
        logits_at = self._answer_logits(self._questions(texts, images), ids.shape[1], None, mask)
        total = torch.zeros(ids.shape, device=self.device)
        for hidden, weight in masked_text.contexts(mask, estimator, seeds, draws):
            slots = first_slots(hidden, int(hidden.sum(1).max()))
            log_prob = (logits_at(ids.masked_fill(hidden, HIDDEN), slots) / (temperature or 1.0)).log_softmax(-1)
            picked = log_prob.gather(-1, ids.gather(1, slots)[..., None])[..., 0]
            total = total + torch.zeros_like(total).scatter(1, slots, picked * weight.gather(1, slots))
        return total

    def embed(self, texts: Sequence[str], images: Pictures = None) -> Embedding:
        """Last hidden states of question-formatted texts with their pictures, for grounding maps; picture slots are in raster order."""
        ids, mask = (tensor.to(self.device) for tensor in pad_left(self._questions(texts, images), self.pad_id))
        is_image = mask & (ids >= self.offset) & (ids < self.offset + self.codes)
        return Embedding(self._hidden(ids, mask), mask, mask & self.is_text(ids), is_image)

    def is_text(self, ids: Tensor) -> Tensor:
        """Which ids are of the text's own vocabulary."""
        raise NotImplementedError

    # Inside

    def _hidden(self, ids_RL: Tensor, mask_RL: Tensor) -> Tensor:
        length = ids_RL.shape[1]
        seen = mask_RL[:, None, None, :].expand(-1, 1, length, -1)
        position = torch.arange(length, device=ids_RL.device)[None]
        embeds = self.net.get_input_embeddings()(ids_RL)
        return self.trunk(inputs_embeds=embeds, attention_mask=seen, position_ids=position, use_cache=False).last_hidden_state

    def _answer_logits(self, rows: Sequence[list[int]], tokens: int, width: int | None, mask_BA: Tensor | None = None) -> LogitsAt:
        """The function from answers with HIDDEN and slots to float32 logits [B, K, V]. Without a mask the family's tail closes the row."""
        prompt, real = (tensor.to(self.device) for tensor in pad_left(rows, self.pad_id, width))
        tail = torch.tensor(self.tail if mask_BA is None else (), dtype=torch.long, device=self.device).expand(len(rows), -1)
        answer = torch.ones(len(rows), tokens, dtype=torch.bool, device=self.device) if mask_BA is None else mask_BA
        seen = torch.cat([real, answer, torch.ones_like(tail, dtype=torch.bool)], 1)
        start = prompt.shape[1]

        def logits_at(ids_BA: Tensor, slots_BK: Tensor) -> Tensor:
            whole = torch.cat([prompt, ids_BA.masked_fill(ids_BA == HIDDEN, self.mask_id), tail], 1)
            hidden = self._hidden(whole, seen)[:, start : start + tokens]
            picked = hidden.gather(1, slots_BK[..., None].expand(-1, -1, hidden.shape[-1]))
            return self.head(picked).float()

        return logits_at
