"""The command line. A verb is a file of mmalign/verbs; `--json`, `--debug` and `--plug` belong to every verb.

Exit codes: 0 every requested number is complete, 2 the command cannot mean anything as typed, 3 incomplete, 1 any other error.
Nothing heavy is imported before a verb needs it.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from mmalign import __version__, registry, verbs
from mmalign.options import Parser
from mmalign.screen import Screen
from mmalign.types import MmalignError, UsageError
from mmalign.verbs import COMPLETE, ERROR, INCOMPLETE, USAGE

EPILOG = """examples:
  mmalign eval --model tiny-janus --suite shapes --limit 40     the bundled checkpoint on the bundled suite, in a minute or two
  mmalign eval --model ./checkpoint --suite geneval,shapes      run, or continue where it stopped
  mmalign explain geneval                                       protocol, formula, known traps
exit codes: 0 complete, 2 usage, 3 incomplete, 1 error"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    typed = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the bars on the screen are ours
    screen = Screen("--json" in typed)
    try:
        options = _parse(typed)
        return options.run(options, screen)
    except UsageError as error:
        return _fail(screen, str(error), USAGE, typed)
    except MmalignError as error:
        return _fail(screen, str(error), ERROR, typed)
    except KeyboardInterrupt as stop:
        return _fail(screen, str(stop) or "Stopped.", INCOMPLETE, typed)
    except BrokenPipeError:  # the reader (`| head`) has seen enough
        sys.stderr.close()
        return COMPLETE
    except Exception as error:  # noqa: BLE001 (the command line's top: a fault of ours must still be a sentence)
        text = f"Unexpected {type(error).__name__}: {error}. This is a fault in mmalign or a plug-in; --debug shows the traceback."
        return _fail(screen, text, ERROR, typed)


def _parse(typed: list[str]) -> argparse.Namespace:
    parser = Parser(prog="mmalign", description="Evaluate and align text-to-image and unified multimodal models.", epilog=EPILOG)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--version", action="version", version=f"mmalign {__version__}")
    known_verbs = verbs.load()
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    for name, verb in known_verbs.items():
        text = (verb.__doc__ or "").strip()
        sub = subparsers.add_parser(name, help=text.split(":")[0].split(".")[0], description=text, allow_abbrev=False)
        sub.set_defaults(run=verb.declare(sub), command=shlex.join(["mmalign", *typed]))
        general = sub.add_argument_group("every verb")
        general.add_argument("--json", action="store_true", help="one JSON document on standard output")
        general.add_argument("--debug", action="store_true", help="tracebacks instead of a sentence")
        general.add_argument("--plug", action="append", type=Path, default=[], metavar="FILE", help="register a Python file (repeatable)")
    first = next((word for word in typed if not word.startswith("-")), None)
    if first is None and not {"-h", "--help", "--version"} & set(typed):
        parser.print_help()
        raise SystemExit(USAGE)
    if first is not None and first not in known_verbs and typed[0] == first:
        raise UsageError(f"Unknown verb '{first}'{registry.suggest(first, known_verbs)}")
    if first in known_verbs:
        if subparsers.choices[first].get_default("takes_rest"):
            options, rest = parser.parse_known_args(typed)
            options.rest = [word for word in rest if word not in ("--debug", "--json")]  # typed before the verb, and read from `typed`
            return options
        known = list(subparsers.choices[first]._option_string_actions)
        for word in typed:
            flag = word.partition("=")[0]
            if flag.startswith("--") and len(flag) > 2 and flag not in known:
                near = difflib.get_close_matches(flag, known, n=1)
                hint = f"Did you mean '{near[0]}'?" if near else f"See: mmalign {first} --help"
                raise UsageError(f"Unknown option '{flag}' of mmalign {first}. {hint}")
    return parser.parse_args(typed)


def _fail(screen: Screen, sentence: str, code: int, typed: Sequence[str]) -> int:
    """Say what went wrong: on standard error for a person, as {"error", "exit"} on standard output with --json."""
    if "--debug" in typed:
        screen.note(traceback.format_exc().rstrip())
    if screen.as_json:
        screen.give({"error": sentence, "exit": code})
    else:
        screen.note(f"mmalign: {sentence}")
    return code
