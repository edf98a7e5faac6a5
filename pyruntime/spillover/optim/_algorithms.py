"""What tells one optimizer on the host from another: names of state, options, checks, the kernel.

Nothing here knows of memory, devices or checkpoints, and ``_host_optimizer`` knows no algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from spillover._errors import ConfigError
from spillover.optim import _kernels
from spillover.optim._kernels import Range

Group = dict[str, Any]


@dataclass(frozen=True)
class MomentSpec:
    """A state of one number an element: torch's name of it, and which moment of the kernels it is.

    ``is_signed`` chooses its code in 8 bits.
    """

    name: str
    slot: Literal["first", "second", "second_max"]
    is_signed: bool


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One optimizer.

    Attributes
    ----------
    name
        Of the class, for messages.
    moments
        Those that a group's options ask for.
    update
        Calls the kernel on ranges of one group, whose gradients count a factor more.
    check
        Raises ConfigError for options of a group, of which some may be missing.
    torch_options
        Keys of torch's groups that change nothing here, so that torch can load our groups.
    newer_options
        Options that checkpoints of older versions of torch have not, and what they mean then.
    counts_steps
        Whether torch's state has ``step``.
    first_step_reads
        Whether moments are read in the first step of a parameter; otherwise they are in the state
        from the end of it on, as torch's.
    has_initial_state
        Whether state is there before the first step, as torch's is.
    initial_value
        Of moments.
    """

    name: str
    moments: Callable[[Group], tuple[MomentSpec, ...]]
    update: Callable[[Iterable[Range], Group, float], None]
    check: Callable[[Group], None]
    torch_options: dict[str, Any] = field(default_factory=dict)
    newer_options: dict[str, Any] = field(default_factory=lambda: {"maximize": False})
    counts_steps: bool = True
    first_step_reads: bool = True
    has_initial_state: bool = False
    initial_value: Callable[[Group], float] = lambda group: 0.0


# ---- options -----------------------------------------------------------------------------------


def _check_not_negative(group: Group, *names: str) -> None:
    for name in names:
        if name not in group:
            continue
        value = group[name]
        try:
            number = float("nan") if isinstance(value, str) else float(value)
        except (TypeError, ValueError, RuntimeError):
            number = float("nan")
        # Written so that NaN, which compares false with everything, is refused.
        if not 0.0 <= number < float("inf"):
            raise ConfigError(f"{name} must be a finite number of 0 or more, got {value!r}")


def _check_betas(group: Group) -> None:
    if "betas" not in group:
        return
    betas = group["betas"]
    try:
        first, second = (float(beta) for beta in betas)
        fits = 0.0 <= first < 1.0 and 0.0 <= second < 1.0
    except (TypeError, ValueError, RuntimeError):
        fits = False
    if not fits:
        raise ConfigError(
            f"betas must be two numbers in [0, 1), such as (0.9, 0.999), got {betas!r}"
        )


def _check_unsupported(group: Group) -> None:
    for name in ("capturable", "differentiable"):
        if group.get(name):
            raise ConfigError(f"{name}=True is not supported: the step runs on the host")


def _check_adam(group: Group) -> None:
    _check_not_negative(group, "lr", "eps", "weight_decay")
    _check_betas(group)
    _check_unsupported(group)


def _check_sgd(group: Group) -> None:
    _check_not_negative(group, "lr", "momentum", "weight_decay")
    _check_unsupported(group)
    try:
        dampening = float(group.get("dampening", 0.0))
    except (TypeError, ValueError, RuntimeError):
        dampening = float("nan")
    if not abs(dampening) < float("inf"):
        raise ConfigError(f"dampening must be a finite number, got {group['dampening']!r}")


def check_nesterov(group: Group) -> None:
    """Raise ConfigError where a group, which has all options, wants what nesterov has not."""
    if group.get("nesterov") and (float(group["momentum"]) <= 0 or float(group["dampening"]) != 0):
        raise ConfigError("nesterov=True needs a momentum above 0 and a dampening of 0")


def _check_lion(group: Group) -> None:
    _check_not_negative(group, "lr", "weight_decay")
    _check_betas(group)


def _check_adagrad(group: Group) -> None:
    _check_not_negative(group, "lr", "lr_decay", "eps", "weight_decay", "initial_accumulator_value")
    _check_unsupported(group)


# ---- kernels -----------------------------------------------------------------------------------


def _update_adam(ranges: Iterable[Range], group: Group, factor: float) -> None:
    first, second = group["betas"]
    _kernels.adam(
        ranges,
        lr=float(group["lr"]),
        betas=(float(first), float(second)),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        decoupled=bool(group["decoupled_weight_decay"]),
        amsgrad=bool(group["amsgrad"]),
        maximize=bool(group["maximize"]),
        gradient_scale=factor,
    )


def _update_sgd(ranges: Iterable[Range], group: Group, factor: float) -> None:
    _kernels.sgd(
        ranges,
        lr=float(group["lr"]),
        momentum=float(group["momentum"]),
        dampening=float(group["dampening"]),
        weight_decay=float(group["weight_decay"]),
        nesterov=bool(group["nesterov"]),
        maximize=bool(group["maximize"]),
        gradient_scale=factor,
    )


def _update_lion(ranges: Iterable[Range], group: Group, factor: float) -> None:
    first, second = group["betas"]
    _kernels.lion(
        ranges,
        lr=float(group["lr"]),
        betas=(float(first), float(second)),
        weight_decay=float(group["weight_decay"]),
        maximize=bool(group["maximize"]),
        gradient_scale=factor,
    )


def _update_adagrad(ranges: Iterable[Range], group: Group, factor: float) -> None:
    _kernels.adagrad(
        ranges,
        lr=float(group["lr"]),
        lr_decay=float(group["lr_decay"]),
        weight_decay=float(group["weight_decay"]),
        eps=float(group["eps"]),
        maximize=bool(group["maximize"]),
        gradient_scale=factor,
    )


# ---- the algorithms ----------------------------------------------------------------------------

_EXP_AVG = MomentSpec("exp_avg", "first", is_signed=True)
_EXP_AVG_SQ = MomentSpec("exp_avg_sq", "second", is_signed=False)
_MAX_EXP_AVG_SQ = MomentSpec("max_exp_avg_sq", "second_max", is_signed=False)
_MOMENTUM = MomentSpec("momentum_buffer", "first", is_signed=True)
_SUM = MomentSpec("sum", "second", is_signed=False)

_WAYS = {"foreach": None, "differentiable": False, "fused": None}


def _adam(name: str) -> Algorithm:
    return Algorithm(
        name=name,
        moments=lambda group: (
            (_EXP_AVG, _EXP_AVG_SQ) + ((_MAX_EXP_AVG_SQ,) if group["amsgrad"] else ())
        ),
        update=_update_adam,
        check=_check_adam,
        torch_options={**_WAYS, "capturable": False, "decoupled_weight_decay": False},
        newer_options={"maximize": False, "amsgrad": False},
    )


ADAMW = _adam("AdamW")
ADAM = _adam("Adam")
SGD = Algorithm(
    name="SGD",
    moments=lambda group: (_MOMENTUM,) if float(group["momentum"]) != 0 else (),
    update=_update_sgd,
    check=_check_sgd,
    torch_options=dict(_WAYS),
    newer_options={"maximize": False, "nesterov": False},
    counts_steps=False,
    first_step_reads=False,
)
LION = Algorithm(
    name="Lion", moments=lambda group: (_EXP_AVG,), update=_update_lion, check=_check_lion
)
ADAGRAD = Algorithm(
    name="Adagrad",
    moments=lambda group: (_SUM,),
    update=_update_adagrad,
    check=_check_adagrad,
    torch_options=dict(_WAYS),
    has_initial_state=True,
    initial_value=lambda group: float(group["initial_accumulator_value"]),
)
