"""The cost model against published figures: ``calibration_error_percent.CASE``.

``cases.toml`` lists figures with their sources. Those marked ``held_out`` took no part in choosing
any number of a profile; only they count towards the median. Each is computed by adding up the
formulas for its operators (the walk), and training runs for which there is a program also by the
clock, under which the program runs.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._calibration import _clocked, _resnet, _transformer
from spillover.emulator import _costs, _profiles

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_CASES = Path(__file__).resolve().parent / "cases.toml"
QUICK_PROGRAMS = ("nanogpt_eager_a100_sxm_40gb",)
#: Share of the sum of their rates that drives keep when a file is striped over them.
STRIPE_EFFICIENCY = 0.87


@dataclass(frozen=True, kw_only=True)
class Case:
    """A published figure and the shapes that it is for."""

    name: str
    card: str
    kind: str
    published: float
    unit: str
    source: str
    held_out: bool
    model: dict[str, Any]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the model says to a case."""

    case: Case
    predicted: float

    @property
    def error_percent(self) -> float:
        """Distance of the prediction from the published figure, in percent of the latter."""
        return abs(self.signed_percent)

    @property
    def signed_percent(self) -> float:
        """The same with its sign: above zero where the prediction is larger."""
        return (self.predicted / self.case.published - 1) * 100


def cases() -> list[Case]:
    """All cases, in the order of the file."""
    return [Case(**entry) for entry in tomllib.loads(_CASES.read_text())["case"]]


def outcomes() -> list[Outcome]:
    """Every case with its prediction."""
    return [Outcome(case=case, predicted=predict(case)) for case in cases()]


def predict(case: Case) -> float:
    """The model's figure for ``case``, in its unit."""
    return _PREDICTORS[case.kind](case)


def clocked(names: Collection[str] | None = None) -> list[Outcome]:
    """Held-out training runs (all, or those that are named) as the clock has them."""
    found = []
    for case in cases():
        is_wanted = case.held_out if names is None else case.name in names
        if is_wanted and _clocked.is_runnable(case.kind, case.model):
            figure = _clocked.figure(case.unit, case.model, _clocked.step_ns(case.name))
            found.append(Outcome(case=case, predicted=figure))
    return found


def _training(case: Case) -> float:
    model = _transformer.Transformer(**case.model)
    dtype: _costs.DType = "bf16"
    rate = _transformer.tokens_per_second(_profiles.load(case.card), model, dtype)
    return rate / model.sequence if case.unit == "sequences/s" else rate


def _training_ms(case: Case) -> float:
    model = _transformer.Transformer(**case.model)
    return _transformer.step_ns(_profiles.load(case.card), model, "bf16") / 1e6


def _convolutional(case: Case) -> float:
    model = _resnet.ResNet50(**case.model)
    return _resnet.images_per_second(_profiles.load(case.card), model, "fp16")


def _burst(card: str) -> _profiles.GpuProfile:
    """The card as it runs one kernel after another of the same, as microbenchmarks do."""
    return dataclasses.replace(_profiles.load(card).gpu, sustained_efficiency=1.0)


def _attention(case: Case) -> float:
    shape = _costs.AttentionShape(**case.model)
    gpu = _burst(case.card)
    duration_ns = sum(
        _costs.attention_ns(gpu, shape, which, "bf16") for which in ("forward", "backward")
    )
    # The source counts 4 operations an element of the scores, 3.5 times that with backward, and
    # half of it under a causal mask.
    flop = 3.5 * 4 * shape.batch * shape.heads * shape.queries * shape.keys * shape.head_dim
    return flop / (2 if shape.causal else 1) / duration_ns / 1000


def _matmul(case: Case) -> float:
    sizes = dict(case.model)
    dtype = sizes.pop("dtype")
    shape = _costs.MatmulShape(**sizes)
    return shape.flop / _costs.matmul_ns(_burst(case.card), shape, dtype) / 1000


def _copy(case: Case) -> float:
    size_bytes = case.model["size_bytes"]
    gpu = _profiles.load(case.card).gpu
    return size_bytes / _costs.copy_ns(gpu, size_bytes, case.model["direction"])


def _stripe(case: Case) -> float:
    return case.model["base_gb_s"] * case.model["drives"] * STRIPE_EFFICIENCY


_PREDICTORS = {
    "transformer": _training,
    "transformer_ms": _training_ms,
    "resnet50": _convolutional,
    "attention": _attention,
    "matmul": _matmul,
    "copy": _copy,
    "stripe": _stripe,
}


def run(*, quick: bool) -> dict[str, Any]:
    """Metrics of the calibration. ``quick`` runs one program only; the other cases are walked.

    A case's error is the clock's where its program was run, and the walk's otherwise.
    """
    walked = outcomes()
    by_clock = {found.case.name: found for found in clocked(QUICK_PROGRAMS if quick else None)}
    found = [by_clock.get(outcome.case.name, outcome) for outcome in walked]
    held_out = [outcome for outcome in found if outcome.case.held_out]
    fitted = [outcome for outcome in found if not outcome.case.held_out]
    errors = [outcome.error_percent for outcome in held_out]
    deviations = [
        abs(by_clock[outcome.case.name].predicted / outcome.predicted - 1) * 100
        for outcome in walked
        if outcome.case.name in by_clock
    ]
    metrics: dict[str, float] = {
        "calibration_error_percent_median": statistics.median(errors),
        "calibration_error_percent_max": max(errors),
        "calibration_cases_held_out": len(held_out),
        "calibration_clock_cases": len(by_clock),
        "calibration_clock_error_percent_median": statistics.median(
            outcome.error_percent for outcome in by_clock.values()
        ),
        "calibration_clock_to_walk_percent_median": statistics.median(deviations),
        "calibration_fit_error_percent_median": statistics.median(
            outcome.error_percent for outcome in fitted
        ),
    }
    for outcome in held_out:
        metrics[f"calibration_error_percent.{outcome.case.name}"] = outcome.error_percent
    return {
        "metrics": metrics,
        "details": {
            outcome.case.name: {
                "card": outcome.case.card,
                "published": outcome.case.published,
                "predicted": outcome.predicted,
                "by_clock": outcome.case.name in by_clock,
                "unit": outcome.case.unit,
                "error_percent": outcome.signed_percent,
                "held_out": outcome.case.held_out,
                "source": outcome.case.source,
                "note": outcome.case.note,
            }
            for outcome in found
        },
        "notes": [
            "simulated: the cost model against published figures, none of them measured by us; "
            "communication between cards is not modelled",
            "the median is over figures that took no part in choosing the profiles' numbers",
            "training runs with a program are run dry under the clock, at full size; the others "
            "are sums of the same formulas over their operators",
        ],
    }
