"""Cached decoding against the trunk's own forward, also with grouped keys, biases and a cache that grows."""

import pytest
import torch
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

from mmalign.models.layers import linear
from mmalign.models.layers.cached import Cache, CachedTrunk
from mmalign.testbed.tiny import randomise

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def make(kind, key_heads):
    torch.manual_seed(0)
    trunk = (LlamaModel if kind == "llama" else Qwen2Model)(
        (LlamaConfig if kind == "llama" else Qwen2Config)(**SIZES, num_key_value_heads=key_heads)
    ).eval()
    randomise(trunk, 0)
    return trunk


@pytest.mark.parametrize(("kind", "key_heads"), [("llama", 4), ("llama", 2), ("qwen2", 2)])
@torch.no_grad()
def test_steps_give_the_states_of_one_forward(kind, key_heads):
    trunk = make(kind, key_heads)
    embeds = torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, :4] = False
    position = (mask.long().cumsum(-1) - 1).clamp(min=0)
    expected = trunk(inputs_embeds=embeds, attention_mask=mask.long(), position_ids=position).last_hidden_state
    cached = CachedTrunk(trunk, 3)
    prefix = cached.prefill(embeds[:, :6], mask[:, :6])
    cache = Cache(prefix, 3, 3, block=2)
    states = [cache.begin(prefix, torch.arange(3))]
    for slot in range(6, 12):
        if cache.is_full:
            cache.widen(2)
        states.append(cached.step(embeds[:, slot], cache))
    assert torch.allclose(torch.stack(states, 1), expected[:, 5:], atol=2e-5)


@torch.no_grad()
def test_a_cache_used_again_remembers_nothing_and_shares_prefixes():
    trunk = make("llama", 4)
    cached = CachedTrunk(trunk, 3)
    embeds = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(1))
    prefix = cached.prefill(embeds[:, :5], torch.ones(3, 5, dtype=torch.bool))
    cache = Cache(prefix, 3, 2, block=8)
    cache.begin(prefix, torch.arange(3))
    first = cached.step(embeds[:, 5], cache)
    cached.step(embeds[:, 4], cache)
    assert cache.is_full
    chosen = torch.tensor([2, 0, 2])
    assert torch.equal(cache.begin(prefix, chosen), prefix.hidden_RE[chosen])
    assert torch.equal(cached.step(embeds[:, 5][chosen], cache), first[chosen])


@torch.no_grad()
def test_packed_and_plain_linear_layers_agree():
    modules = [torch.nn.Linear(24, 40), torch.nn.Linear(24, 8, bias=False)]
    x = torch.randn(16, 24)
    expected = torch.cat([module(x) for module in modules], -1)
    for pack in (True, False):
        if pack and not linear.can_pack(modules[0]):
            continue
        assert torch.allclose(linear.fused(modules, 16, pack)(x), expected, atol=1e-5)
    assert not linear.can_pack(torch.nn.Linear(2, 2, dtype=torch.bfloat16))
