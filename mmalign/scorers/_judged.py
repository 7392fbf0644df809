"""Scorers that put a question about each image to a VLM judge: options, asking again, and what becomes of the replies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mmalign.config import Secret
from mmalign.judge import Endpoint, ImageKind, Judge, Question, Reply, read
from mmalign.scorers._samples import Item, TextSource, score_in_batches
from mmalign.types import Deviation, Failure, Sample, Score, Value, digest

KEPT = 500  # characters of a reply that a value's detail keeps
WIRING = ("base_url", "key", "concurrency", "timeout", "retries", "pause")  # options that change no value


@dataclass(frozen=True)
class JudgeOptions:
    """`base_url` "" is OpenAI's own. `question`: "official", or a text file of your own. `tries`: replies asked for until one can be read.

    `extra`: further fields of the request's body, such as {"chat_template_kwargs": {"enable_thinking": false}}.
    """

    model: str = "gpt-4o"
    base_url: str = ""
    key: Secret = field(default_factory=lambda: Secret("OPENAI_API_KEY"))
    question: str = "official"
    temperature: float = 0.0
    max_tokens: int = 1024
    image: ImageKind = "png"
    tries: int = 3
    extra: dict[str, Any] = field(default_factory=dict)
    concurrency: int = 16
    timeout: float = 120.0
    retries: int = 6
    pause: float = 1.0

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise ValueError(f"tries is at least 1, got {self.tries}")

    def judge(self) -> Judge:
        """The connection; nothing is asked before the first question."""
        names = ("model", "base_url", "key", "temperature", "max_tokens", "image", "extra", "concurrency", "timeout", "retries", "pause")
        return Judge(Endpoint(**{name: getattr(self, name) for name in names}))


class Judged:
    """The scorer. `ask` gives a sample's questions (or why there can be none), `value` makes the measurement of their parsed replies.

    Where `ask` has no question, `value` is given no reply. `hole` may make something else of a failure, as a protocol's defaults do.
    `reads_image` False: the item holds no picture, and `ask` reads the sample's answer. A value's detail names the model that answered
    and ends with what it said. Parts lie in the scorer's range, because bounds fill them.
    """

    def __init__(
        self,
        name: str,
        version: int,
        options: JudgeOptions,
        wording: object,
        ask: Callable[[Item], Mapping[str, Question] | Failure],
        parse: Callable[[str], Any],
        value: Callable[[Item, Mapping[str, Any]], Value],
        range: tuple[float, float] = (0.0, 1.0),
        deviations: tuple[Deviation, ...] = (),
        metric_name: str = "",
        hole: Callable[[Failure], Score] = lambda failure: failure,
        reads_image: bool = True,
    ) -> None:
        self.name, self.options, self.range, self.deviations = name, options, range, deviations
        self.metric_name = metric_name or name
        self.judge = options.judge()
        self._ask, self._parse, self._value, self._hole, self._reads_image = ask, parse, value, hole, reads_image
        kept = {key: item for key, item in asdict(options).items() if key not in (*WIRING, "question")}
        self.fingerprint = digest(name, version, kept, wording)

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One value or failure per sample, in order; all questions of a batch are under way at once."""
        text: TextSource | None = "prompt" if self._reads_image else None
        return score_in_batches(samples, max(1, len(samples)), self._measure, image=self._reads_image, text=text)

    def _measure(self, items: Sequence[Item]) -> list[Score]:
        asked = [self._ask(item) for item in items]
        flat = [(at, name, question) for at, one in enumerate(asked) if not isinstance(one, Failure) for name, question in one.items()]
        answers = self._answers([question for _, _, question in flat])
        said: list[dict[str, Any]] = [{} for _ in items]
        words = [""] * len(items)
        holes: dict[int, Failure] = {at: one for at, one in enumerate(asked) if isinstance(one, Failure)}
        for (at, name, _), answer in zip(flat, answers, strict=True):
            if isinstance(answer, Failure):
                holes.setdefault(at, answer)
            else:
                said[at][name], reply = answer
                words[at] = f"{reply.model}: {reply.text.strip()[-KEPT:]}"
        return [self._hole(holes[at]) if at in holes else self._measured(item, said[at], words[at]) for at, item in enumerate(items)]

    def _answers(self, questions: Sequence[Question]) -> list[tuple[Any, Reply] | Failure]:
        """What each question's reply says, asked again while it cannot be read."""
        answers: list[tuple[Any, Reply] | Failure] = [Failure("score", "error", "not asked")] * len(questions)
        open_ones = list(range(len(questions)))
        for _ in range(self.options.tries):
            for at, reply in zip(open_ones, self.judge.ask([questions[at] for at in open_ones]), strict=True):
                found = read(reply, self._parse)
                answers[at] = found if isinstance(found, Failure) or isinstance(reply, Failure) else (found, reply)
            open_ones = [at for at in open_ones if _is_unread(answers[at])]
            if not open_ones:
                break
        return answers

    def _measured(self, item: Item, said: Mapping[str, Any], words: str) -> Value:
        value = self._value(item, said)
        return Value(value.x, value.parts, detail="; ".join(part for part in (value.detail, words) if part))


def _is_unread(answer: object) -> bool:
    return isinstance(answer, Failure) and answer.kind in ("parse", "refusal")
