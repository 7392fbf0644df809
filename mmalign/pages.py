"""HTML pages from the package's templates, with style and script inside and a content security policy that admits only these.

Autoescape is on for every template. The policy names the one style and the one script of a page by their sha256, so text that came
from a prompt or a judge could not run even if it were not escaped.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from typing import TYPE_CHECKING, Any

from mmalign.figures import format_number, format_signed
from mmalign.types import Metric

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


def render(template: str, *, script: str, **content: Any) -> str:
    """The page of a template and a script of `mmalign/templates`. A name that the template needs and `content` lacks is an error."""
    code, style = _text(script), _text("style.css")
    policy = (
        f"default-src 'none'; img-src 'self' file: data:; style-src '{_source_hash(style)}'; script-src '{_source_hash(code)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return _environment().get_template(template).render(policy=policy, style=style, script=code, **content)


def open_bounds(metric: Metric) -> tuple[float, float] | None:
    """The bounds of a metric where they say something: two ends that differ."""
    return metric.bounds if metric.bounds and metric.bounds[0] < metric.bounds[1] else None


def _signed(x: float | None) -> str:
    return format_number(x) if x is None else format_signed(x)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mmalign", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": format_number, "signed": _signed, "open_bounds": open_bounds}
    return environment


def _text(name: str) -> Markup:
    """A style or script of the package as it is; it is ours, so it is not escaped."""
    from importlib.resources import files

    from markupsafe import Markup

    return Markup((files("mmalign") / "templates" / name).read_text(encoding="utf-8"))


def _source_hash(text: str) -> str:
    """What a content security policy calls an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
