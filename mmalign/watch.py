"""What a training run is watched with: a panel of measurements on held-out prompts, and pictures of the same prompts over time.

Both draw with seeds of their own, so that watching changes nothing in the training; under torchrun each process draws its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmalign import distributed, jobs, registry
from mmalign.reward import load_scorer
from mmalign.types import Prompt, Request, Row, Sample, Value, request_seed

if TYPE_CHECKING:
    from mmalign.training import Training

PANEL_PROMPTS = 64
SHOWN_PROMPTS = 8  # prompts whose pictures are kept through the run


class Panel:
    """Measures on held-out prompts while the training runs: the suite's metrics, from the same prompts and seeds each time."""

    def __init__(self, job: Training, model: Any) -> None:
        entry = registry.find("evaluators", job.panel, job.plugs)
        self.evaluator = registry.load(entry).Evaluator()
        self.headline = registry.card(entry).headline
        found = self.evaluator.prompts("val")
        self.prompts = found[:: max(1, len(found) // PANEL_PROMPTS)][:PANEL_PROMPTS]
        self.model = model
        recipes = jobs.suite_scorers(self.evaluator, job.sets, job.plugs)
        self.scorers = {name: load_scorer(name, recipe.overrides, job.device, job.plugs) for name, recipe in recipes.items()}
        settings = {**model.settings, **job.config.sampling}
        self.requests = [Request(prompt, 0, request_seed(job.config.seed, prompt.id, 0), None, settings) for prompt in self.prompts]

    def __call__(self) -> dict[str, float]:
        rank, world = distributed.rank(), distributed.world()
        samples = self.model.generate(self.requests[rank::world])
        rows = []
        for request, sample in zip(self.requests[rank::world], samples, strict=True):
            if isinstance(sample, Sample):
                rows.append(Row(request, sample, {name: scorer.score([sample])[0] for name, scorer in self.scorers.items()}))
        gathered = distributed.gather([Row(row.request, Sample(row.request), row.scores) for row in rows])
        usable = [row for row in gathered if all(isinstance(score, Value) for score in row.scores.values())]
        usable.sort(key=lambda row: row.request.id)
        figures = {name: value for name, value in self.evaluator.aggregate(usable).items() if value is not None}
        return dict(sorted(figures.items(), key=lambda item: item[0] != self.headline))  # the headline first, the rest in their order


class SamePictures:
    """Draws the same few prompts with the same seeds each time, so that the report shows how the model changes."""

    def __init__(self, job: Training, model: Any, prompts: Sequence[Prompt]) -> None:
        self.model = model
        chosen = prompts[:: max(1, len(prompts) // SHOWN_PROMPTS)][:SHOWN_PROMPTS]
        settings = {**model.settings, **job.config.sampling}
        self.requests = [Request(prompt, 0, request_seed(job.config.seed, prompt.id, 0), None, settings) for prompt in chosen]

    def __call__(self) -> list[tuple[Any, str]]:
        rank, world = distributed.rank(), distributed.world()
        numbers = range(rank, len(self.requests), world)
        made = zip(numbers, self.model.generate([self.requests[number] for number in numbers]), strict=True)
        found = distributed.gather([(number, sample.image) for number, sample in made if isinstance(sample, Sample)])
        return [(image, self.requests[number].prompt.text) for number, image in sorted(found, key=lambda item: item[0])]
