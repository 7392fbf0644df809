"""Our results in the formats of others: Hugging Face model-index and .eval_results, and the JSON of lm-evaluation-harness.

model-index is the legacy block of a model card (huggingface/hub-docs, modelcard.md): every metric of every suite. `.eval_results/*.yaml`
(huggingface.co/docs/hub/eval-results) holds one headline per benchmark dataset of the Hub, so the caller says which dataset a suite is.
lm-eval's JSON has `results`, `configs`, `versions`, `n-samples`, `higher_is_better`; a version is the hash of the protocol card. Values
are in the suite's own units. What deviates, fails or was a training reward is said in the notes, in every format. Pure functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmalign.results import is_complete
from mmalign.tables.ours import Ours
from mmalign.types import Metric, Result, UsageError

PROJECT = "https://github.com/mmalign/mmalign"
TASK = "text-to-image"


def model_index(found: Sequence[Ours]) -> dict[str, Any]:
    """The `model-index` block of a model card, for YAML front matter: one entry per suite, all results of one model."""
    results = []
    for one in found:
        result = one.result
        metrics = [_card_metric(name, metric, result) for name, metric in _defined(result)]
        results.append(
            {
                "task": {"type": TASK, "name": "Text to image"},
                "dataset": {
                    "name": _title(result),
                    "type": one.suite,
                    "split": str(result.suite["split"]),
                    "args": {"card": result.suite.get("card", ""), "seed": result.sampling["seed"], "notes": notes(one)},
                },
                "metrics": metrics,
                "source": {"name": f"mmalign {result.provenance.get('version', '')}".strip(), "url": PROJECT},
            }
        )
    return {"model-index": [{"name": found[0].label, "results": results}]}


def eval_results(found: Sequence[Ours], datasets: Mapping[str, str]) -> list[dict[str, Any]]:
    """The entries of an `.eval_results/*.yaml` file. `datasets` maps a suite to a dataset of the Hub: `org/name` or `org/name:task`.

    UsageError for a suite without a dataset, since an invented id would point at somebody else's benchmark.
    """
    entries = []
    for one in found:
        if one.suite not in datasets:
            raise UsageError(f"Which dataset of the Hub is the suite {one.suite}? Say --dataset {one.suite}=ORG/NAME or ORG/NAME:TASK.")
        dataset, _, task = datasets[one.suite].partition(":")
        entry: dict[str, Any] = {
            "dataset": {"id": dataset, "task_id": task or "default"},
            "value": _headline(one.result).value,
            "source": {"url": PROJECT, "name": "mmalign"},
            "notes": notes(one),
        }
        if one.result.provenance.get("ended"):
            entry["date"] = str(one.result.provenance["ended"])[:10]
        entries.append(entry)
    return entries


def lm_eval(found: Sequence[Ours]) -> dict[str, Any]:
    """The JSON that lm-evaluation-harness writes, with suites in the place of tasks and prompts in that of documents."""
    content: dict[str, Any] = {name: {} for name in ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples")}
    for one in found:
        result, suite = one.result, one.suite
        values: dict[str, Any] = {"alias": suite}
        for name, metric in _defined(result):
            values[f"{name},none"] = metric.value
            values[f"{name}_stderr,none"] = "N/A" if metric.stderr is None else metric.stderr
        content["results"][suite] = values
        content["configs"][suite] = {
            "task": suite,
            "test_split": result.suite["split"],
            "metric_list": [{"metric": name, "higher_is_better": metric.higher_is_better} for name, metric in _defined(result)],
            "output_type": "generate_image",
            "repeats": result.suite["images_per_prompt"],
            "generation_kwargs": dict(result.sampling["settings"]),
            "metadata": {"version": result.suite.get("card", ""), "notes": notes(one)},
        }
        content["versions"][suite] = result.suite.get("card", "")
        content["n-shot"][suite] = 0
        content["higher_is_better"][suite] = {name: metric.higher_is_better for name, metric in _defined(result)}
        content["n-samples"][suite] = {"original": result.suite["prompts"], "effective": _headline(result).prompts}
    first = found[0].result
    content["config"] = {
        "model": first.model.get("family", ""),
        "model_args": str(first.model.get("source", "")),
        "seed": first.sampling["seed"],
    }
    content["git_hash"] = first.provenance.get("git", "")
    content["model_name"] = found[0].label
    return content


def notes(one: Ours) -> str:
    """In one line: images, interval, protocol, failures, training rewards."""
    result, metric = one.result, _headline(one.result)
    said = [f"{result.suite['prompts']}x{result.suite['images_per_prompt']} images"]
    if metric.ci:
        said.append(f"95% interval {metric.ci[0]:.4g} to {metric.ci[1]:.4g}")
    said.append("protocol official" if not one.reasons else f"not by the protocol: {'; '.join(one.reasons)}")
    if one.rewards:
        said.append(f"trained on the reward {', '.join(one.rewards)}")
    return ", ".join(said)


def choose(found: Sequence[Ours], model: str | None, everything: bool) -> list[Ours]:
    """The results of one model that may leave the house: complete and undeviating ones, with `everything` all that have a headline.

    One result per suite, the newest that is complete. UsageError when no model or more than one fits.
    """
    fitting = [
        one for one in found if (one.is_usable or everything) and (model is None or model == one.label) and _has_headline(one.result)
    ]
    labels = list(dict.fromkeys(one.label for one in fitting))
    if len(labels) != 1:
        known = ", ".join(dict.fromkeys(one.label for one in found)) or "none"
        why = (
            "More than one model has results: name one with --model."
            if labels
            else "No complete, undeviating result fits; --all takes others."
        )
        raise UsageError(f"{why} Models: {known}.")
    chosen: dict[str, Ours] = {}
    for one in sorted(fitting, key=lambda one: not is_complete(one.result)):
        chosen.setdefault(one.suite, one)
    return list(chosen.values())


def _defined(result: Result) -> list[tuple[str, Metric]]:
    """The metrics that have a value, headline first."""
    names = [result.headline, *(name for name in result.metrics if name != result.headline)]
    return [(name, result.metrics[name]) for name in names if name in result.metrics and result.metrics[name].value is not None]


def _headline(result: Result) -> Metric:
    return result.metrics[result.headline]


def _has_headline(result: Result) -> bool:
    return result.headline in result.metrics and _headline(result).value is not None


def _title(result: Result) -> str:
    return str(result.suite.get("title", result.suite["name"]))


def _card_metric(name: str, metric: Metric, result: Result) -> dict[str, Any]:
    shown: dict[str, Any] = {"type": name, "value": metric.value, "name": f"{_title(result)} {name}"}
    if metric.ci:
        shown["args"] = {"stderr": metric.stderr, "interval_95": list(metric.ci)}
    return shown
