"""Config: text to typed options and back, suggestions, fingerprints that move with every option, secrets that never show."""

import json
import pickle
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign import config
from mmalign.config import Secret
from mmalign.types import MmalignError, UsageError


@dataclass(frozen=True)
class Inner:
    depth: int = 1


@dataclass(frozen=True)
class Options:
    count: int = 3
    ratio: float = 0.5
    name: str = "x"
    is_on: bool = False
    mode: Literal["fast", "exact"] = "exact"
    limit: int | None = None
    either: float | str = "auto"
    path: Path = Path("a")
    shape: tuple[int, int] = (1, 2)
    weights: tuple[float, ...] = ()
    table: Mapping[str, float] = field(default_factory=dict)
    inner: Inner = Inner()
    key: Secret = Secret("OPENAI_API_KEY")
    constant: ClassVar[int] = 7


@pytest.mark.parametrize(
    ("option", "typed", "value"),
    [
        ("count", "4", 4),
        ("ratio", "1e-3", 0.001),
        ("ratio", 2, 2.0),
        ("name", "4", "4"),
        ("name", 4, "4"),
        ("is_on", "yes", True),
        ("is-on", "0", False),
        ("mode", "fast", "fast"),
        ("limit", "none", None),
        ("limit", "7", 7),
        ("either", "0.5", 0.5),
        ("either", "best", "best"),
        ("path", "b/c", Path("b/c")),
        ("shape", "3,4", (3, 4)),
        ("shape", [3, 4], (3, 4)),
        ("weights", "", ()),
        ("weights", "1,2.5", (1.0, 2.5)),
        ("table", "a:1,b:2", {"a": 1.0, "b": 2.0}),
        ("inner", {"depth": "5"}, Inner(5)),
    ],
)
def test_text_becomes_what_the_annotation_says(option: str, typed: Any, value: Any) -> None:
    got = getattr(config.build(Options, {option: typed}, "thing"), option.replace("-", "_"))
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("option", "typed", "sentence"),
    [
        ("count", "4.5", "thing.count must be a whole number, got '4.5'."),
        ("count", 4.0, "thing.count must be a whole number, got '4.0'."),
        ("count", True, "thing.count must be a whole number, got 'True'."),
        ("ratio", "half", "thing.ratio must be a number, got 'half'."),
        ("is_on", "maybe", "thing.is_on must be true or false, got 'maybe'."),
        ("mode", "fats", "thing.mode must be one of fast, exact, got 'fats'."),
        ("limit", "few", "thing.limit must be a whole number, got 'few'."),
        ("shape", "3", "thing.shape must be 2 comma-separated values, got '['3']'."),
        ("table", "a=1", "thing.table must be a mapping such as name:value,name:value, got 'a=1'."),
        ("cuont", "4", "Unknown option 'cuont' of thing. Did you mean 'count'?"),
        ("constant", "4", "Unknown option 'constant' of thing. Did you mean 'count'?"),
    ],
)
def test_wrong_options_are_sentences(option: str, typed: Any, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        config.build(Options, {option: typed}, "thing")
    assert str(caught.value) == sentence


def test_sets_are_grouped_by_owner() -> None:
    assert config.parse_sets(["geneval.detector=a=b", "Sampling.top-k=3", "geneval.threshold=0.3"]) == {
        "geneval": {"detector": "a=b", "threshold": "0.3"},
        "sampling": {"top_k": "3"},
    }
    for wrong in ("geneval", "geneval=3", ".a=3", "geneval.=3"):
        with pytest.raises(UsageError, match="expected ROOT.OPTION=VALUE"):
            config.parse_sets([wrong])
    with pytest.raises(UsageError, match="given twice, as '1' and as '2'"):
        config.parse_sets(["a.b=1", "a.b=2"])
    with pytest.raises(UsageError, match="nothing here is called 'genevall'. Did you mean 'geneval'?"):
        config.check_roots({"genevall": {"a": "1"}}, ["geneval", "sampling"])


@given(
    st.builds(
        Options,
        count=st.integers(-(10**9), 10**9),
        ratio=st.floats(allow_nan=False, allow_infinity=False),
        name=st.text(st.characters(exclude_categories=["Cs", "Cc"])),
        is_on=st.booleans(),
        mode=st.sampled_from(["fast", "exact"]),
        limit=st.none() | st.integers(0, 9),
        weights=st.lists(st.floats(0, 1)).map(tuple),
        inner=st.builds(Inner, st.integers(0, 5)),
    )
)
def test_yaml_round_trip(options: Options) -> None:
    import yaml

    shown = yaml.safe_load(config.show(options))
    del shown["key"]
    assert config.build(Options, shown, "thing") == options


def test_fingerprint_moves_with_every_option_and_is_the_same_in_every_process() -> None:
    changed = {"count": 4, "ratio": 0.25, "name": "y", "is_on": True, "mode": "fast", "limit": 1, "either": 2.0, "path": Path("b")}
    changed |= {"shape": (2, 1), "weights": (1.0,), "table": {"a": 1.0}, "inner": Inner(2)}
    prints = {config.fingerprint(replace(Options(), **{name: value})) for name, value in changed.items()}
    assert len(prints | {config.fingerprint(Options())}) == len(changed) + 1
    code = "import test_config; from mmalign import config; print(config.fingerprint(test_config.Options()))"
    path = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {path}; {code}"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == config.fingerprint(Options())


def test_secret_never_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    secret = Options().key
    assert not secret.is_set()
    with pytest.raises(MmalignError, match="OPENAI_API_KEY is not set. Export OPENAI_API_KEY, or put"):
        secret.reveal()
    (tmp_path / ".env").write_text("# a comment\nexport OPENAI_API_KEY='canary-in-the-mine'\nOTHER=1\n")
    assert secret.is_set() and secret.reveal() == "canary-in-the-mine"
    everything = [repr(secret), str(secret), f"{secret}", repr(Options()), config.show(Options()), json.dumps(config.plain(Options()))]
    assert not any("canary" in text for text in everything) and b"canary" not in pickle.dumps(secret)
    assert "key: '***'" in config.show(Options())
    assert config.redact("401 for canary-in-the-mine!") == "401 for ***!"
    monkeypatch.setenv("OPENAI_API_KEY", "from-the-environment")
    assert secret.reveal() == "from-the-environment"


def test_yaml_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(MmalignError, match="absent.yaml does not exist"):
        config.load_yaml(tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(MmalignError, match="bad.yaml is not valid YAML"):
        config.load_yaml(tmp_path / "bad.yaml")
