"""What masked training saves, in seconds on a CPU: `pytest tests/bench_ht_grpo.py -s`.

Not collected by default (the name starts with bench_). The fully hidden state once for each prompt, beside once for each sample, and the
output layer at MMaDA's vocabulary on what is needed, beside whole. Values and gradients are compared, not only times.
"""

import json
import time
from statistics import median

import pytest
import torch
from helpers.tiny_masked import make_mmada

from mmalign.models import mmada
from mmalign.models.layers.linear import head_slice
from mmalign.models.layers.masked import cosine, make_plan
from mmalign.trajectory import Policy

GROUP, PROMPTS, ROUNDS = 9, 2, 5
WIDTH, VOCABULARY, OFFSET, CODES = 4096, 134656, 126349, 8192  # Gen-Verse/MMaDA-8B
ROW, TOKENS, STEPS = 1080, 1024, 15  # a row of a short prompt and a 512 x 512 image


def in_turns(first, second, rounds=ROUNDS):
    """Median seconds of the processor that both take, in turns, and what they give: on one thread other processes do not count."""
    first(), second()
    seconds = ([], [])
    for _ in range(rounds):
        for taken, compute in zip(seconds, (first, second), strict=True):
            started = time.process_time()
            compute()
            taken.append(time.process_time() - started)
    return median(seconds[0]), median(seconds[1]), first(), second()


@pytest.fixture
def one_core():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_hidden_state_once_for_a_prompt(tmp_path, one_core, capsys):
    folder = make_mmada(tmp_path / "mmada", width=128, layers=4)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_vq_tokens": 256}))
    model = mmada.load(folder)
    texts = ["a red circle", "two small blue squares to the left of a large green triangle"]
    prompts = model.encode_prompts(texts)
    repeated = prompts.select([row for row in range(PROMPTS) for _ in range(GROUP)])
    drawn = model.sample(repeated, Policy(3.0, hidden=model.schedule(4)), list(range(PROMPTS * GROUP)))
    everything = torch.ones_like(drawn.step_of, dtype=torch.bool)
    parameters = list(model.trunk.parameters())

    def update(log_prob):
        loss = -log_prob.mean()
        return log_prob.detach(), torch.autograd.grad(loss, parameters)

    replicated, shared, one, other = in_turns(
        lambda: update(model.log_prob_given(repeated, drawn, everything, which="cond")),
        lambda: update(model.log_prob_blank(prompts, drawn, which="cond")),
    )
    value = float((one[0] - other[0]).abs().max())
    gradient = max(float((first - second).abs().max()) for first, second in zip(one[1], other[1], strict=True))
    with capsys.disabled():
        print(  # noqa: T201  the figures are what a benchmark is for
            f"\nratio and gradient, {PROMPTS} prompts x {GROUP} samples x {model.tokens} tokens: for each sample {replicated:.2f} s, "
            f"for each prompt {shared:.3f} s, {replicated / shared:.1f} times less; "
            f"largest difference: values {value:.0e}, gradients {gradient:.0e}"
        )
    assert value < 1e-5 and gradient < 1e-6


def test_the_head_on_hidden_codes(one_core, capsys):
    stream = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False, device="meta").to_empty(device="cpu").requires_grad_(False)
    head.weight.uniform_(-(WIDTH**-0.5), WIDTH**-0.5, generator=stream)
    rows = torch.randn(ROW, WIDTH, generator=stream)
    part = head_slice(head, OFFSET, OFFSET + CODES)
    started = time.process_time()
    every = head(rows)[:TOKENS, OFFSET : OFFSET + CODES]
    whole = time.process_time() - started
    plan = make_plan(TOKENS, cosine(STEPS), 1.0, fades=True, holds_last=True)
    for name, tokens in (("training in the hidden state", TOKENS), ("an average step of drawing", sum(plan.slots) // STEPS)):
        started = time.process_time()
        needed = part(rows[:tokens])
        short = time.process_time() - started
        largest = float((every[:tokens] - needed).abs().max())
        with capsys.disabled():
            print(  # noqa: T201
                f"\noutput layer, {name}: whole {whole:.2f} s, {tokens} of {ROW} tokens on {CODES} codes {short:.2f} s, "
                f"{whole / short:.0f} times less; largest difference {largest:.0e}"
            )
        assert largest < 1e-5
