"""What a step cannot be faster than: bounds from shapes, rates and limits (``docs/bounds.md``)."""

from spillover.planner._bounds import (
    Bound,
    MicroStep,
    Rates,
    StepWork,
    activation_bound,
    optimizer_bound,
    parameter_bound,
    step_bound,
)
from spillover.planner._work import measure

__all__ = [
    "Bound",
    "MicroStep",
    "Rates",
    "StepWork",
    "activation_bound",
    "measure",
    "optimizer_bound",
    "parameter_bound",
    "step_bound",
]
