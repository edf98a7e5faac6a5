"""What kernels refuse: each error says what was wrong and right, and nothing has changed."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from kernel_cases import CASES, blockwise, gradient_of, make_state

from spillover import ConfigError, _core, emulator
from spillover._pinned import empty_pinned
from spillover.optim import _kernels

ADAM: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "decoupled": True,
}


def tensors(**changed: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "gradient": torch.ones(512),
        "weight": torch.ones(512),
        "first": torch.zeros(512),
        "second": torch.zeros(512),
    }
    given.update(changed)
    return {name: value for name, value in given.items() if value is not None}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gradient": torch.ones(512, dtype=torch.float64)}, "gradient is torch.float64.*float32"),
        ({"weight": torch.ones(512).bfloat16()}, "weight is torch.bfloat16; it must be float32"),
        ({"weight": torch.ones(511)}, "weight has 511 elements; it must have 512"),
        ({"weight": torch.ones(2, 256)}, r"weight has shape \(2, 256\).*flat"),
        ({"weight": torch.ones(1024)[::2]}, r"weight has shape \(512,\) and strides \(2,\)"),
        ({"weight": torch.ones(512, device="meta")}, "weight is on meta.*CPU"),
        ({"low_weight": torch.ones(512)}, "low_weight is torch.float32.*bfloat16 or float16"),
        ({"first": torch.zeros(512).half()}, "first is torch.float16.*float32 or bfloat16"),
        ({"first": blockwise(513)}, "first.codes has 513 elements"),
        ({"remainder": torch.zeros(512, dtype=torch.int16)}, "remainder needs its low_weight"),
    ],
)
def test_ranges_that_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _kernels.make_range(**tensors(**changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": None}, "weight of range 0 is null; give the address of its 2048 bytes"),
        ({"first": None}, "range 0 has no first"),
        ({"second_max": torch.zeros(512)}, "range 0 has second_max, which the step does not use"),
        ({"step": 0}, "step 0; the first one is 1"),
        ({"first_index": 100, "first": blockwise(512)}, "element 100; .* a multiple of 256"),
        (
            {
                "low_weight": torch.ones(512).bfloat16(),
                "remainder": torch.zeros(512, dtype=torch.int16),
            },
            "weight and remainder",
        ),
        (
            {
                "weight": None,
                "low_weight": torch.ones(512).half(),
                "remainder": torch.zeros(512, dtype=torch.int16),
            },
            "low_weight must be bfloat16",
        ),
    ],
)
def test_steps_that_are_refused(changed: dict[str, Any], message: str) -> None:
    given = tensors(**changed)
    before = {name: value.clone() for name, value in given.items() if torch.is_tensor(value)}
    good = _kernels.make_range(**tensors())
    good_weight = good.tensors[1].clone()
    bad = _kernels.make_range(**given)
    with pytest.raises(ConfigError, match=message):
        _kernels.adam([bad, good], **ADAM)
    assert torch.equal(good.tensors[1], good_weight)
    assert all(torch.equal(given[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("kernel", "changed", "message"),
    [
        ("adam", {"lr": -1.0}, "lr=-1 is out of range; it must be finite and not negative"),
        ("adam", {"lr": math.nan}, "lr=nan"),
        ("adam", {"betas": (1.0, 0.9)}, "beta1=1 is out of range; it must be at least 0 and below"),
        ("adam", {"betas": (0.9, -0.1)}, "beta2=-0.1"),
        ("adam", {"eps": -1e-8}, "eps=-1e-08"),
        ("adam", {"weight_decay": math.inf}, "weight_decay=inf"),
        ("adam", {"gradient_scale": math.inf}, "gradient_scale=inf is not finite; leave the step"),
        ("sgd", {"lr": 1.0, "nesterov": True}, "nesterov needs a momentum above 0"),
        ("sgd", {"lr": 1.0, "dampening": math.nan}, "dampening=nan"),
        ("lion", {"lr": 1.0, "betas": (0.9, 2.0)}, "beta2=2"),
        ("adagrad", {"lr": 1.0, "lr_decay": -1.0}, "lr_decay=-1"),
    ],
)
def test_options_that_are_refused(kernel: str, changed: dict[str, Any], message: str) -> None:
    options = {**ADAM, **changed} if kernel == "adam" else changed
    with pytest.raises(ConfigError, match=message):
        getattr(_kernels, kernel)([_kernels.make_range(**tensors())], **options)


def test_memory_that_overlaps() -> None:
    memory = torch.ones(2000)
    given = tensors(weight=memory[:512], first=memory[511:1023])
    with pytest.raises(ConfigError, match=r"first of range 0 .* overlaps weight of range 0"):
        _kernels.adam([_kernels.make_range(**given)], **ADAM)
    one = _kernels.make_range(**tensors(weight=memory[:512]))
    other = _kernels.make_range(**tensors(weight=memory[500:1012]))
    with pytest.raises(ConfigError, match=r"weight of range 1 .* overlaps weight of range 0"):
        _kernels.adam([one, other], **ADAM)
    with pytest.raises(ConfigError, match="overlaps"):
        _kernels.accumulate([memory[:100]], [memory[50:150]])
    with pytest.raises(ConfigError, match="overlaps"):
        _kernels.scale([memory, memory], 2.0)
    # What is only read may be shared, and neighbours touch.
    shared = torch.ones(512)
    ranges = [
        _kernels.make_range(
            gradient=shared,
            weight=memory[start : start + 512],
            first=torch.zeros(512),
            second=torch.zeros(512),
        )
        for start in (0, 512, 1024)
    ]
    _kernels.adam(ranges, **ADAM)
    assert _kernels.sum_of_squares([shared, shared]).value == 1024
    assert (memory[1536:] == 1).all()


def test_addresses_that_are_wrong() -> None:
    memory = torch.zeros(600)
    address = memory.data_ptr()
    with pytest.raises(ConfigError, match="not aligned; its address must be a multiple of 4"):
        _core.update_sgd(
            [_core.UpdateRange(count=10, gradient=address + 400, weight=address + 2)],
            lr=1.0,
            momentum=0.0,
            dampening=0.0,
            weight_decay=0.0,
            nesterov=False,
            maximize=False,
            gradient_scale=1.0,
            threads=0,
        )
    with pytest.raises(ConfigError, match="beyond the address space"):
        _core.sum_of_squares([(2**64 - 8, "float32", 10)], threads=1)
    with pytest.raises(ConfigError, match="'int8' is no type of elements"):
        _core.sum_of_squares([(address, "int8", 10)], threads=1)
    with pytest.raises(ConfigError, match="scale is inf"):
        _kernels.accumulate([torch.zeros(2)], [torch.zeros(2)], scale=math.inf)


def test_parts_of_blockwise_moments_begin_at_blocks() -> None:
    with pytest.raises(ConfigError, match="cut at multiples of 256"):
        blockwise(1000).part(100, 100)
    part = blockwise(1000).part(512, 300)
    assert part.codes.numel() == 300
    assert part.scales.numel() == 2


def test_an_instruction_set_that_is_not_there() -> None:
    program = "from spillover import _core; _core._instruction_set()"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={"SPILLOVER_OPTIM_ISA": "sse"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "SPILLOVER_OPTIM_ISA='sse' is no instruction set that this processor" in result.stderr


def test_a_step_that_does_not_wait_for_its_gradient_is_a_hazard() -> None:
    case = CASES[0]
    state = make_state(case, 1000)
    device_gradient = gradient_of(1000, torch.float32, 1).cuda()
    gradient = empty_pinned((1000,), torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradient.copy_(device_gradient, non_blocking=True)
    with pytest.raises(Exception, match="gradient is not ordered after the device's work"):
        case.kernel([state.range(gradient, 1)], **case.options)
    emulator.clear_hazards()
    stream.synchronize()
    case.kernel([state.range(gradient, 1)], **case.options)


def test_weights_that_leave_while_they_are_written_are_a_hazard() -> None:
    case = CASES[0]
    state = make_state(case, 1000)
    state.low_weight = empty_pinned((1000,), torch.bfloat16)
    state.low_weight.copy_(state.weight)
    gradient = gradient_of(1000, torch.float32, 1)
    target = torch.empty(1000, dtype=torch.bfloat16, device="cuda")
    target.copy_(state.low_weight, non_blocking=True)
    with pytest.raises(Exception, match="low_weight is not ordered after the device's work"):
        case.kernel([state.range(gradient, 1)], **case.options)
    emulator.clear_hazards()
    torch.cuda.synchronize()
    case.kernel([state.range(gradient, 1)], **case.options)
