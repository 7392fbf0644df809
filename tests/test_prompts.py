"""Prompts to train on: files, suites, and mixtures with stated shares."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign.prompts import mixed, prompts_of_file, read_prompts
from mmalign.types import Prompt, UsageError


def made(name: str, number: int) -> list[Prompt]:
    return [Prompt(f"{place}", f"{name} {place}") for place in range(number)]


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.05, 0.95))
def test_every_source_has_its_share_and_every_prompt_a_place(first, second, share):
    found = mixed({"a": (share, made("a", first)), "b": (1 - share, made("b", second))})
    assert len({prompt.id for prompt in found}) == len(found), "seeds come from ids"
    assert {prompt.text for prompt in found} == {prompt.text for prompt in made("a", first) + made("b", second)}
    of_a = sum(prompt.text.startswith("a") for prompt in found)
    assert abs(of_a - share * len(found)) <= 1


def test_unsafe_prompts_are_mixed_with_safe_ones(tmp_path):
    unsafe, safe = tmp_path / "unsafe.jsonl", tmp_path / "safe.txt"
    unsafe.write_text('{"prompt": "a red circle", "kind": "unsafe"}\n')
    safe.write_text("a cat\na dog\n\na bird\n")
    found = read_prompts(f"{unsafe}=1,{safe}=3", (), {})
    assert [prompt.text for prompt in found] == ["a red circle", "a cat", "a dog", "a bird"] and found[0].meta == {"kind": "unsafe"}
    half = read_prompts(f"{unsafe}=0.5, shapes=0.5", (), {})
    assert sum(prompt.text == "a red circle" for prompt in half) == len(half) / 2 > 100
    odd = tmp_path / "a=1.txt"
    odd.write_text("a cat\n")
    assert read_prompts(str(odd), (), {})[0].text == "a cat", "a file may be named like a share"


@pytest.mark.parametrize("source", ["shapes=0", "shapes=x", "=1", "shapes=0.5,shapes=0.5", "shapes=0.5,safe"])
def test_a_mixture_that_makes_no_sense_is_refused(source):
    with pytest.raises(UsageError, match="expected SOURCE=SHARE"):
        read_prompts(source, (), {})


def test_a_file_says_where_it_is_wrong(tmp_path):
    with pytest.raises(UsageError, match="There is no prompt file"):
        read_prompts("nowhere.txt", (), {})
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"text": "a cat"}\n{"words": 1}\n')
    with pytest.raises(UsageError, match="line 2: expected a JSON object with 'text' or 'prompt'"):
        prompts_of_file(file)
    file.write_text("\n")
    with pytest.raises(UsageError, match="holds no prompt"):
        prompts_of_file(file)
