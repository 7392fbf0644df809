"""Images per second of the own sampler against transformers' `model.generate` on the same prompts: `pytest tests/bench_generation.py -s`.

Not collected by default (the name starts with bench_). Uses the bundled tiny-janus, or an untrained model of its size where there is none.
"""

import os
import time
from statistics import median

import pytest
import torch

from mmalign import hub
from mmalign.models import janus as family
from mmalign.testbed.tiny import make_janus
from mmalign.types import Prompt, Request

BATCH, ROUNDS = 64, 5
KINDS = ("circle", "square", "triangle", "star")
COLOURS = ("red", "blue", "green", "yellow")
TEXTS = [
    f"a {one} {kind} and a {two} {other}"
    for one in COLOURS
    for two in COLOURS
    for kind, other in zip(KINDS, KINDS[1:] + KINDS[:1], strict=True)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if "tiny-janus" in hub.bundled_names():
        return hub.CHECKPOINTS / "tiny-janus"
    return make_janus(tmp_path_factory.mktemp("janus"), side=32, width=192, layers=4, vocabulary=448)


@pytest.mark.parametrize("threads", sorted({1, os.cpu_count() or 1}))
def test_images_per_second(folder, benchmark, threads, capsys):
    from transformers import AutoProcessor, JanusForConditionalGeneration

    torch.set_num_threads(threads)
    model = family.load(folder)
    network = JanusForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    chats = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in TEXTS[:BATCH]]
    requests = [Request(Prompt(str(row), text), 0, row) for row, text in enumerate(TEXTS[:BATCH])]

    def theirs():
        texts = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=texts, generation_mode="image", padding=True, return_tensors="pt")
        codes = network.generate(**inputs, generation_mode="image", do_sample=True, top_k=0, guidance_scale=5.0)
        with torch.no_grad():
            return ((network.decode_image_tokens(codes) + 1) * 127.5).clamp(0, 255).to(torch.uint8).numpy()

    def ours():
        return model.generate(requests)

    pairs = []
    theirs(), ours()
    for _ in range(ROUNDS):  # in turns, so that a busy machine slows both
        started = time.perf_counter()
        theirs()
        between = time.perf_counter()
        ours()
        pairs.append((between - started, time.perf_counter() - between))
    benchmark.pedantic(ours, rounds=1)
    reference, own = median(first for first, _ in pairs), median(second for _, second in pairs)
    with capsys.disabled():
        print(  # noqa: T201  the figures are what a benchmark is for
            f"\n{threads} threads, batch {BATCH}: transformers {BATCH / reference:.1f} images/s, mmalign {BATCH / own:.1f} images/s, "
            f"ratio {median(first / second for first, second in pairs):.2f}"
        )
