"""The judge's client against a real local server that replays answers: good ones, faults that pass, faults that stay, refusals."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from helpers import tiny_questions as tiny
from helpers.replay import Answer, Replay, said

from mmalign.config import Secret
from mmalign.judge import Endpoint, Judge, Question, Reply, json_in, read
from mmalign.scorers import orm, unifiedreward
from mmalign.types import Failure, MmalignError, Value


@pytest.fixture
def replay() -> Iterator[Callable[[Answer], Replay]]:
    opened: list[Replay] = []

    def open_one(answer: Answer) -> Replay:
        opened.append(Replay(answer))
        return opened[-1]

    yield open_one
    for server in opened:
        server.close()


def judge(server: Replay, **options: Any) -> Judge:
    return Judge(Endpoint(**{"model": "judge", "base_url": server.url, "pause": 0.01, "retries": 2, "timeout": 30.0} | options))


def ask_one(server: Replay, **options: Any) -> Reply | Failure:
    return judge(server, **options).ask([Question("how good?")])[0]


def test_a_reply_carries_text_model_and_tokens_and_the_request_is_as_written(replay):
    server = replay(lambda body, number: said("fine"))
    asked = judge(server, extra={"chat_template_kwargs": {"enable_thinking": False}}, max_tokens=7)
    (reply,) = asked.ask([Question("how good?", (tiny.picture(1),), system="be brief")])
    assert reply == Reply("fine", "judge-2026-01-01", 11, 5, False, 1)
    (body,) = server.requests
    assert body["temperature"] == 0 and body["max_tokens"] == 7 and body["chat_template_kwargs"] == {"enable_thinking": False}
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    image, text = body["messages"][1]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,iVBOR") and text == {"type": "text", "text": "how good?"}
    assert (asked.usage.questions, asked.usage.prompt_tokens, asked.usage.answer_tokens) == (1, 11, 5)
    assert asked.usage.models == {"judge-2026-01-01": 1}


def test_many_questions_keep_their_order_and_run_at_once(replay):
    barrier = threading.Barrier(4, timeout=20)

    def answer(body: dict[str, Any], number: int) -> tuple[int, Any, float]:
        if number <= 4:
            barrier.wait()  # passes only when four questions are under way together
        return said(body["messages"][-1]["content"][-1]["text"])

    server = replay(answer)
    replies = judge(server, concurrency=4).ask([Question(f"question {number}") for number in range(9)])
    assert [reply.text for reply in replies] == [f"question {number}" for number in range(9)]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_fault_is_retried(replay, status):
    server = replay(lambda body, number: (status, {"error": {"message": "busy"}}, 0.0) if number < 3 else said("fine"))
    reply = ask_one(server)
    assert isinstance(reply, Reply) and reply.attempts == 3


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        ((429, {"error": {"message": "busy"}}, 0.0), "error", r"answered 429 \(3 attempts\)"),
        ((500, b"<html>broken</html>", 0.0), "error", r"answered 500 \(3 attempts\)"),
        ((200, b'{"choices": [', 0.0), "parse", "no chat completion"),
        ((200, {"object": "chat.completion", "choices": []}, 0.0), "parse", "no choices"),
        (said(""), "parse", "empty reply"),
        (said(None), "parse", "empty reply"),
        (said(None, refusal="No."), "refusal", "declined: No."),
        (said("I", finish="content_filter"), "refusal", "filter"),
        ((400, {"error": {"code": "content_policy_violation", "message": "no"}}, 0.0), "refusal", "filtered the question"),
        ((400, {"error": {"message": "too long"}}, 0.0), "error", "answered 400"),
    ],
)
def test_a_lasting_fault_is_typed(replay, answer, kind, words):
    failure = ask_one(replay(lambda body, number: answer))
    assert isinstance(failure, Failure) and failure.kind == kind
    assert re.search(words, failure.message), failure.message


def test_a_slow_judge_costs_its_own_question_only(replay):
    def answer(body: dict[str, Any], number: int) -> tuple[int, Any, float]:
        text = body["messages"][-1]["content"][-1]["text"]
        return (*said(text)[:2], 30.0 if text == "slow" else 0.0)

    quick, slow = judge(replay(answer), timeout=0.5, retries=1).ask([Question("quick"), Question("slow")])
    assert isinstance(quick, Reply) and isinstance(slow, Failure)
    assert slow.kind == "timeout" and "within 0.5 s (2 attempts)" in slow.message


def test_an_absent_server_is_a_failure_per_question(replay):
    server = replay(lambda body, number: said("x"))
    server.close()
    failures = judge(server, retries=1).ask([Question("a"), Question("b")])
    assert [failure.kind for failure in failures] == ["error", "error"] and "cannot be reached (2 attempts)" in failures[0].message


@pytest.mark.parametrize("status", [401, 404])
def test_what_no_retry_mends_ends_the_run(replay, status):
    server = replay(lambda body, number: (status, {"error": {"message": "no such model"}}, 0.0))
    with pytest.raises(MmalignError, match=f"refuses: {status}"):
        judge(server).ask([Question("x")])
    assert len(server.requests) == 1


def test_the_key_is_sent_when_there_is_one_and_is_needed_for_openai(replay, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SOME_KEY", raising=False)
    server = replay(lambda body, number: said("x"))
    ask_one(server, key=Secret("SOME_KEY"))
    monkeypatch.setenv("SOME_KEY", "abc-123-secret")
    ask_one(server, key=Secret("SOME_KEY"))
    assert server.keys == ["Bearer none", "Bearer abc-123-secret"]
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(MmalignError, match="SOME_KEY is not set"):
        Judge(Endpoint("gpt-4o", key=Secret("SOME_KEY"))).ask([Question("x")])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("I'm sorry, but I can't assist with that request.", "refusal"),
        ("I cannot evaluate this image as it shows harm", "refusal"),
        ("The score is high", "parse"),
        ('{"score": 3', "parse"),
    ],
)
def test_what_cannot_be_read_keeps_the_raw_reply(text, kind):
    failure = read(Reply(text, "m", is_cut=True), lambda reply: json_in(reply)["score"])
    assert isinstance(failure, Failure) and failure.kind == kind and text in failure.message
    assert kind == "refusal" or "cut at max_tokens" in failure.message


@pytest.mark.parametrize("text", ['{"a": 1}', 'Sure:\n```json\n{"a": 1}\n```', 'I think {"a": 1} it is', '```\n{"a": 1}```'])
def test_json_is_found_where_judges_put_it(text):
    assert json_in(text) == {"a": 1}


GOOD_JSON = '{"score": 3, "reason": "a {red} cat"}'


@pytest.mark.parametrize(
    ("answers", "outcome"),
    [
        ([said(GOOD_JSON)], 3),
        ([said(f"The cat is there and it is red.\n```json\n{GOOD_JSON}\n```")], 3),
        ([said(f'<think>Of {{cat, dog}} perhaps {{"score": 1}}?</think>\n{GOOD_JSON}')], 3),
        ([said('<think>Perhaps {"score": 1}, but then', finish="length")], "parse"),
        ([said(GOOD_JSON[:25], finish="length")], "parse"),
        ([said('{"score": ')], "parse"),
        ([said("I'm sorry, but I can't help with rating this image.")], "refusal"),
        ([said(None, refusal="I won't.")], "refusal"),
        ([said("")], "parse"),
        ([(429, {"error": {"message": "slow down"}}, 0.0), said(GOOD_JSON)], 3),
        ([(500, {"error": {"message": "oops"}}, 0.0), (500, b"", 0.0), said(GOOD_JSON)], 3),
        ([(500, {"error": {"message": "oops"}}, 0.0)], "error"),
        ([(429, {"error": {"message": "slow down"}}, 0.0)], "error"),
        ([(*said(GOOD_JSON)[:2], 30.0)], "timeout"),
        ([(*said(GOOD_JSON)[:2], 30.0), said(GOOD_JSON)], 3),
    ],
)
def test_recorded_replies(replay, answers, outcome):
    """What came back from the server, in order (the last one for ever), and the score or kind of failure that it is worth."""
    server = replay(lambda body, number: answers[min(number, len(answers)) - 1])
    found = read(ask_one(server, timeout=0.5 if answers[0][2] else 30.0), lambda text: json_in(text)["score"])
    assert found == outcome or (isinstance(found, Failure) and found.kind == outcome), found


def test_read_passes_values_and_failures_through():
    assert read(Reply("7", "m"), int) == 7
    hole = Failure("score", "timeout", "x")
    assert read(hole, int) is hole


# -- UnifiedReward


def scorer(server: Replay, **options: Any) -> unifiedreward.UnifiedReward:
    return unifiedreward.load(unifiedreward.Config(**{"base_url": server.url, "retries": 1, "pause": 0.01, "timeout": 30.0} | options))


GOOD = "Alignment Score (1-5): 2.694700002670288\nCoherence Score (1-5): 2.5\nStyle Score (1-5): 4"


def test_unifiedreward_2_reads_three_ratings(replay):
    server = replay(lambda body, number: said(GOOD))
    (value,) = scorer(server).score([tiny.sample("a {red} car", 1)])
    assert value.parts == {"alignment": 2.694700002670288, "coherence": 2.5, "style": 4.0}
    assert value.x == pytest.approx((2.694700002670288 + 2.5 + 4) / 15) and value.detail.startswith("judge-2026-01-01: ")
    (body,) = server.requests
    assert body["model"] == "UnifiedReward" and body["temperature"] == 0 and body["max_tokens"] == 4096
    image, text = body["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,") and text["text"].endswith("Text Caption: [a {red} car]")
    assert scorer(server, rating="style").score([tiny.sample()])[0].x == 0.8


def test_unifiedreward_1_reads_the_final_score(replay):
    server = replay(lambda body, number: said("car (object): 1\nFinal Score: 4.25"))
    (value,) = scorer(server, version="1.5").score([tiny.sample("a car", 1)])
    assert value.x == pytest.approx(0.85) and value.parts == {"final": 4.25}
    assert server.requests[0]["messages"][0]["content"][1]["text"].startswith(
        "You are given a text caption and a generated image based on that"
    )


def test_unifiedreward_failures_are_typed_and_in_place(replay):
    replies = {
        "good": said(GOOD),
        "half": said("Alignment Score (1-5): 3\nCoherence Sc", finish="length"),
        "wild": said(GOOD.replace("4", "9")),
        "sorry": said("I'm sorry, I can't help with evaluating this."),
        "down": (500, {"error": {"message": "x"}}, 0.0),
    }

    def answer(body: dict[str, Any], number: int) -> tuple[int, Any, float]:
        text = body["messages"][0]["content"][1]["text"]
        return next(reply for word, reply in replies.items() if f"[{word}]" in text)

    samples = [tiny.sample(word, number) for number, word in enumerate(replies)] + [
        tiny.sample("", 9),
        tiny.sample("x", 10, image=np.zeros((1, 1, 3), np.uint8)),
    ]
    scores = scorer(replay(answer)).score(samples)
    assert isinstance(scores[0], Value)
    assert [score.kind for score in scores[1:]] == ["parse", "parse", "refusal", "error", "missing", "error"]
    assert "cut at max_tokens" in scores[1].message and "Coherence Sc" in scores[1].message


# -- ORM behind an endpoint


def likely(**logs: float) -> tuple[int, Any, float]:
    status, body, wait = said("yes")
    tops = [{"token": token, "logprob": log, "bytes": None} for token, log in logs.items()]
    body["choices"][0]["logprobs"] = {"content": [{"token": "yes", "logprob": -0.1, "bytes": None, "top_logprobs": tops}]}
    return status, body, wait


@pytest.mark.parametrize(
    ("logs", "odds"),
    [({"yes": -0.5, "no": -2.0}, 1.5), ({"Yes": -0.5, "yes": -3.0, "No": -2.0}, 1.5), ({"no": -1.0, "maybe": -4.0}, -3.0)],
)
def test_orm_reads_the_first_tokens_log_probabilities(replay, logs, odds):
    server = replay(lambda body, number: likely(**logs))
    asked = orm.load(orm.Config(model="yes-no", base_url=server.url, temperature=0.5))
    (value,) = asked.score([tiny.sample("a red car", 1)])
    assert value.x == pytest.approx(1 / (1 + math.exp(-odds / 0.5)))
    (body,) = server.requests
    assert body["logprobs"] is True and body["top_logprobs"] == 20 and body["max_tokens"] == 1
    assert body["messages"][0]["content"][1]["text"].startswith("This image is generated by a prompt: a red car. Does this")


def test_orm_without_either_answer_is_a_failure_and_upstream_needs_local_weights(replay):
    server = replay(lambda body, number: likely(perhaps=-0.1))
    (failure,) = orm.load(orm.Config(base_url=server.url)).score([tiny.sample()])
    assert failure.kind == "parse" and "neither yes nor no" in failure.message
    with pytest.raises(ValueError, match="fixed form only"):
        orm.Config(base_url="http://x", compat="upstream")
