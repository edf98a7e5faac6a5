"""Checks that run in one process that makes a dry run; ``test_dry.py`` starts it.

``python -m tests.emulator.dry_checks error`` prints one JSON object: for each check of that policy
``""`` or what went wrong.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import traceback
from collections.abc import Callable
from typing import Any

LARGE = 1 << 20
#: By policy, or by "routing" where a routing model is stated too.
CHECKS: dict[str, dict[str, Callable[[], None]]] = {"error": {}, "zero": {}, "routing": {}}


def check(policy: str = "error") -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a function as a check that runs under the policy."""

    def register(function: Callable[[], None]) -> Callable[[], None]:
        CHECKS[policy][function.__name__] = function
        return function

    return register


def message(kind: type[BaseException], function: Callable[[], Any]) -> str:
    """The text of the exception that the call must end with."""
    try:
        result = function()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}, but {result!r}")


@check()
def small_values_are_real() -> None:
    import torch

    lengths = torch.tensor([3, 5], device="cuda")
    mask = torch.arange(6, device="cuda") < lengths[:, None]
    assert mask.sum().item() == 8
    assert lengths.tolist() == [3, 5]
    assert torch.equal(mask.cpu(), torch.arange(6) < torch.tensor([3, 5])[:, None])
    assert bool((lengths > 2).all())
    assert mask.nonzero().shape == (8, 2)
    assert lengths.repeat_interleave(2).tolist() == [3, 3, 5, 5]
    torch.cuda.manual_seed(3)
    first = torch.rand(4, device="cuda").tolist()
    torch.cuda.manual_seed(3)
    assert torch.rand(4, device="cuda").tolist() == first


@check()
def known_values_go_over_pinned_and_pageable_memory_and_back() -> None:
    import torch

    source = torch.arange(100, device="cuda")
    pinned = torch.empty(100, dtype=torch.int64, pin_memory=True)
    pinned.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    assert pinned.tolist() == list(range(100))
    assert pinned.to("cuda", non_blocking=True).sum().item() == 4950
    assert source.cpu().numpy().sum() == 4950
    strided = torch.zeros(100, 2, dtype=torch.int64, device="cuda")
    strided[:, 1] = source
    assert strided.cpu()[:, 1].tolist() == list(range(100))


@check()
def zeros_on_the_host_are_real_and_need_no_memory() -> None:
    import resource

    import torch

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    state = torch.zeros_like(torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < 1 << 28
    assert state[::4096].sum().item() == 0
    state[12345] = 7
    assert state.zero_()[12345] == 0
    inner, shared = torch.ones(LARGE), torch.ones(LARGE).share_memory_()
    inner[7:-9].zero_()
    assert inner.sum().item() == 16
    every_other = torch.ones(LARGE)
    every_other[::2].zero_()
    assert every_other.sum().item() == LARGE / 2
    assert shared.zero_().sum().item() == 0


@check()
def an_unknown_value_overwrites_a_known_one() -> None:
    import torch

    value = torch.zeros((), device="cuda")
    assert value.item() == 0.0
    value.add_(torch.randn(LARGE, device="cuda").sum())
    message(RuntimeError, lambda: bool(value > 0))
    value.fill_(2.0)
    assert value.item() == 2.0


@check()
def a_decision_by_an_unknown_value_names_operators_and_lines() -> None:
    import torch

    loss = torch.randn(LARGE, device="cuda").mean()

    def decide() -> bool:
        return bool(loss < 1.0)

    text = message(RuntimeError, decide)
    assert "aten::_local_scalar_dense" in text, text
    assert "made by: aten::lt.Scalar" in text, text
    assert text.count("dry_checks.py") >= 2, text
    assert text.count(".<locals>.decide") == 2, text
    assert "--unknown zero" in text, text


@check()
def a_number_that_is_only_printed_is_no_error() -> None:
    import torch

    from spillover import SpilloverError

    loss = torch.randn(LARGE, device="cuda").mean()
    total = 2 * loss.item() / 3 + 1
    assert f"{total:.3f} {loss:.3f}" == "unknown unknown"
    assert "unknown" in repr(loss)
    assert "unknown" in str(torch.nn.Parameter(loss))
    assert "aten::mean" in message(SpilloverError, lambda: total < 1.0)
    message(SpilloverError, lambda: bool(total))
    message(RuntimeError, lambda: float(loss))
    message(RuntimeError, lambda: int(loss))


@check()
def decisions_in_c_by_an_unknown_number_are_errors() -> None:
    import math

    import numpy as np
    import torch

    from spillover import SpilloverError

    loss = torch.randn(LARGE, device="cuda").mean().item()
    deciding: dict[str, Callable[[], Any]] = {
        "math.isfinite": lambda: math.isfinite(loss),
        "math.isnan": lambda: math.isnan(loss),
        "math.isinf": lambda: math.isinf(loss),
        "math.isclose": lambda: math.isclose(1.0, loss),
        "float": lambda: float(loss),
        "is_integer": lambda: loss.is_integer(),
        "numpy.isfinite": lambda: np.isfinite(loss),
        "numpy.less": lambda: np.float64(1.0) < loss,
        "min": lambda: min(loss, 1.0),
    }
    for function in deciding.values():
        assert "aten::mean" in message(SpilloverError, function)
    for number in (math.exp(loss), math.sqrt(loss), np.exp(loss), loss // 2, sum([loss, 1.0])):
        assert f"{number:.2f}" == "unknown"
    assert math.isfinite(1.0)
    assert json.dumps({"loss": loss}) == '{"loss": NaN}'


@check()
def unknown_pinned_memory_is_no_array() -> None:
    import torch

    pinned = torch.empty(LARGE, pin_memory=True)
    pinned.copy_(torch.randn(LARGE, device="cuda"), non_blocking=True)
    torch.cuda.synchronize()
    message(RuntimeError, pinned.numpy)
    message(RuntimeError, lambda: pinned[:4].numpy())
    known = torch.zeros(4, pin_memory=True)
    known.copy_(torch.ones(4, device="cuda"))
    assert known.numpy().sum() == 4.0


@check()
def results_whose_size_is_data_are_refused_by_name() -> None:
    import torch

    unknown = torch.randn(LARGE, device="cuda")
    for name, function in {
        "aten::nonzero": lambda: (unknown > 0).nonzero(),
        "aten::masked_select": lambda: unknown.masked_select(unknown > 0),
        "aten::nonzero ": lambda: unknown[unknown > 0],
        "aten::_unique2": lambda: unknown.unique(),
        "aten::bincount": lambda: unknown.long().bincount(),
    }.items():
        text = message(NotImplementedError, function)
        assert name.strip() in text or "aten::index" in text, text
        assert "dry_checks.py" in text, text
    unknown[unknown > 0] = 0.0
    message(RuntimeError, lambda: torch.equal(unknown, unknown + 1))
    assert not torch.equal(unknown, unknown[:5])
    sparse = torch.sparse_coo_tensor([[0, 1]], [1.0, 2.0], (2,), device="cuda")
    assert "sparse" in message(NotImplementedError, lambda: sparse + sparse)


@check()
def graphs_are_refused() -> None:
    import torch

    value = torch.randn(LARGE, device="cuda")
    torch.cuda.synchronize()

    def capture() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            value.add_(1)

    assert "aten::add_" in message(NotImplementedError, capture)
    assert value.add(1).shape == value.shape


@check()
def shapes_are_checked_as_ever() -> None:
    import torch

    left, right = torch.randn(LARGE, device="cuda"), torch.randn(LARGE + 1, device="cuda")
    assert str(LARGE) in message(RuntimeError, lambda: left + right)
    message(RuntimeError, lambda: left.view(1024, 1024) @ right)
    message(RuntimeError, lambda: left + right.cpu())


@check()
def host_operators_carry_on_what_is_unknown() -> None:
    import torch

    host = torch.randn(LARGE, device="cuda").cpu()
    doubled = host * 2
    assert doubled.shape == (LARGE,)
    message(RuntimeError, lambda: bool(doubled.sum() > 0))
    message(RuntimeError, lambda: doubled.numpy())
    host.zero_()
    assert host.sum().item() == 0.0
    weights = torch.zeros(LARGE)
    torch._fused_adamw_(
        [weights], [doubled], [torch.zeros(LARGE)], [torch.zeros(LARGE)], [], [torch.ones(())],
        lr=1e-3, beta1=0.9, beta2=0.99, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip
    message(RuntimeError, lambda: bool(weights[0] > 0))


@check()
def unknown_host_memory_is_forgotten_with_its_tensor() -> None:
    import ctypes

    import torch

    for _ in range(20):
        host = torch.randn(1 << 15, device="cuda").cpu()
        address, size_bytes = host.data_ptr(), host.nbytes
        del host
        gc.collect()
        from spillover.emulator import _libraries

        known = _libraries.driver().spillover_emulator_is_known
        assert known(ctypes.c_void_p(address), size_bytes)


@check()
def views_and_in_place_results_alias() -> None:
    import torch

    base = torch.randn(1024, 1024, device="cuda")
    before = torch.cuda.memory_allocated()
    assert base.t()[3:].unflatten(1, (4, 256)).data_ptr() == base.data_ptr() + 12
    assert base.add_(1) is base
    base.view(-1).relu_()
    assert torch.cuda.memory_allocated() == before
    assert (base.half().t() + 1).stride() == (1, 1024)
    out = torch.empty(0, device="cuda")
    torch.add(base, 1, out=out)
    assert out.shape == base.shape
    assert out.untyped_storage().nbytes() == base.nbytes


@check()
def a_scaler_takes_gradients_as_finite() -> None:
    import torch

    weight = torch.nn.Parameter(torch.randn(512, 512, device="cuda"))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cuda", growth_interval=2)
    for _ in range(4):
        optimizer.zero_grad()
        scaler.scale((weight * weight).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 65536.0 * 4


@check()
def layers_without_meta_kernels_of_torch_are_covered() -> None:
    import torch
    from torch import nn

    def device(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", requires_grad=True)

    scores = device(50, 16, 100).log_softmax(-1)
    targets = torch.randint(1, 100, (16, 20), device="cuda")
    nn.functional.ctc_loss(scores, targets, [50] * 16, [20] * 16).backward()
    cell = nn.GRUCell(256, 256).cuda()
    cell(device(64, 256), device(64, 256)).sum().backward()
    values, places = device(512, 512).cummax(0)
    assert values.shape == places.shape == (512, 512)
    norm = torch.batch_norm_stats(device(16, 64, 32, 32).detach(), 1e-5)
    assert [part.shape for part in norm] == [(64,), (64,)]
    nn.functional.dropout(device(512, 512), 0.5).sum().backward()
    nn.functional.scaled_dot_product_attention(
        device(2, 4, 256, 64), device(2, 4, 256, 64), device(2, 4, 256, 64), dropout_p=0.1
    ).sum().backward()


@check()
def results_are_those_of_the_card() -> None:
    from tests.emulator import result_cases

    for name, (function, expected) in result_cases.CASES.items():
        assert result_cases.describe(function()) == expected, name


@check()
def large_models_cost_no_memory_here() -> None:
    import resource

    import torch
    from torch import nn

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.device("cuda"):
        model = nn.Sequential(*[nn.Linear(8192, 8192) for _ in range(16)])  # 4 GiB
    with torch.device("meta"):
        empty = nn.Linear(1 << 15, 1 << 15)
    empty.to_empty(device="cuda")  # 4 GiB
    nn.init.kaiming_normal_(empty.weight)
    pinned = torch.empty(1 << 30, pin_memory=True)  # 4 GiB
    pinned.zero_()
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        loss = model(torch.randn(4096, 8192, device="cuda")).square().mean()
    loss.backward()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() > 20 << 30
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 256 << 10, f"{grown} KiB"


@check()
def the_checker_goes_on_checking() -> None:
    import torch

    from spillover import emulator

    source = torch.randn(LARGE, device="cuda")
    torch.cuda.synchronize()
    source.add_(1)
    with torch.cuda.stream(torch.cuda.Stream()):
        text = message(RuntimeError, lambda: source.mul_(2))
    assert "aten::mul_" in text, text
    assert "aten::add_" in text, text
    emulator.clear_hazards()


@check()
def what_is_known_follows_a_model_of_bytes() -> None:
    import ctypes

    import torch

    from spillover.emulator import _libraries

    driver = _libraries.driver()
    set_known = driver.spillover_emulator_set_known
    set_known.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    set_known.restype = None
    chance = random.Random(7)
    size = 512
    places = {
        "device": torch.empty(size, dtype=torch.uint8, device="cuda"),
        "pinned": torch.empty(size, dtype=torch.uint8, pin_memory=True),
    }
    model = {}
    for name, tensor in places.items():
        set_known(tensor.data_ptr(), size, 0)
        model[name] = [False] * size
    for step in range(3000):
        name = chance.choice(list(places))
        start = chance.randrange(size)
        stop = chance.randrange(start, size) + 1
        if chance.random() < 0.2:
            other = chance.choice(list(places))
            target = chance.randrange(size - (stop - start) + 1)
            if name != other or (target >= stop or target + stop - start <= start):
                part = places[other][target : target + stop - start]
                torch.ops.aten.copy_(part, places[name][start:stop], True)
                torch.cuda.synchronize()
                carried = model[name][start:stop]
                if name == other == "pinned":  # an operator of the CPU: all or nothing
                    carried = [all(carried)] * len(carried)
                model[other][target : target + stop - start] = carried
        else:
            known = chance.random() < 0.5
            set_known(places[name].data_ptr() + start, stop - start, int(known))
            model[name][start:stop] = [known] * (stop - start)
        begin = chance.randrange(size)
        end = chance.randrange(begin, size) + 1
        for place, tensor in places.items():
            found = driver.spillover_emulator_is_known(tensor.data_ptr() + begin, end - begin)
            assert bool(found) == all(model[place][begin:end]), (step, place, begin, end)


@check()
def kernels_run_only_on_what_is_known_and_small() -> None:
    import ctypes

    import torch

    from spillover.emulator import _libraries

    driver = _libraries.driver()
    runs = []
    body_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    accesses_type = ctypes.CFUNCTYPE(
        ctypes.c_size_t,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.POINTER(_libraries.Range),
        ctypes.c_size_t,
    )
    touched: list[tuple[int, int, int]] = []

    def accesses(parameters: int, shape: int, user: int, ranges: Any, capacity: int) -> int:
        for index, (pointer, size_bytes, is_write) in enumerate(touched):
            ranges[index] = _libraries.Range(pointer, size_bytes, is_write)
        return len(touched)

    body = body_type(lambda parameters, shape, user: runs.append(1))
    declared = accesses_type(accesses)
    assert driver.spillover_emulator_register_kernel(b"dry_copy", body, None, None, 0) == 0
    assert driver.spillover_emulator_declare_accesses(b"dry_copy", declared, None) == 0
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    assert driver.cuModuleLoadData(ctypes.byref(module), b"image") == 0
    assert driver.cuModuleGetFunction(ctypes.byref(function), module, b"dry_copy") == 0

    def launch(source: torch.Tensor, target: torch.Tensor) -> tuple[int, bool]:
        runs.clear()
        touched[:] = [
            (source.data_ptr(), source.nbytes, 0),
            (target.data_ptr(), target.nbytes, 1),
        ]
        status = driver.cuLaunchKernel(
            function, 1, 1, 1, 1, 1, 1, 0, ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        )
        assert status == 0
        torch.cuda.synchronize()
        known = driver.spillover_emulator_is_known(target.data_ptr(), target.nbytes)
        return len(runs), bool(known)

    known, small = torch.ones(16, device="cuda"), torch.empty(16, device="cuda")
    large = torch.randn(LARGE, device="cuda")
    assert launch(known, small) == (1, True)
    assert launch(large[:16], small) == (0, False)
    assert launch(known, large) == (0, False)


@check()
def the_report_divides_the_peak() -> None:
    import torch

    from spillover import emulator

    gc.collect()
    torch.cuda.empty_cache()
    found = emulator.dry_report()
    assert found.fits
    assert found.shortage is None
    assert sum(found.by_class.values()) == found.peak_allocated_bytes
    assert found.peak_allocated_bytes == torch.cuda.max_memory_allocated()
    assert found.peak is not None
    assert json.loads(found.to_json())["device"] == 0


@check()
def a_known_mask_selects_from_unknown_data() -> None:
    import torch

    unknown = torch.randn(300, 5, 700, device="cuda")
    rows = torch.arange(300, device="cuda") % 3 == 0
    assert unknown[rows].shape == (100, 5, 700)
    assert unknown[rows, 1].shape == (100, 700)
    both = torch.zeros(300, 5, dtype=torch.bool, device="cuda")
    both[:7, 2] = True
    assert unknown[both].shape == (7, 700)
    assert unknown.masked_select(both[:, :, None]).shape == (4900,)
    assert "mask" in message(NotImplementedError, lambda: unknown[unknown[:, 0, 0] > 0])


@check("routing")
def experts_are_chosen_as_stated() -> None:
    import torch

    for experts, chosen, tokens in ((8, 2, 4000), (64, 6, 10000), (16, 16, 3000), (4, 1, 9001)):
        scores = torch.randn(2, tokens, experts, device="cuda").softmax(-1)
        values, places = scores.topk(chosen)
        message(RuntimeError, lambda values=values: bool(values[0, 0, 0] > 0))
        assert places.shape == (2, tokens, chosen)
        assert (places.sort(-1).values.diff(dim=-1) > 0).all()
        loads = torch.bincount(places.flatten(), minlength=experts).tolist()
        mean = 2 * tokens * chosen / experts
        assert loads[0] == (round(2 * mean) if chosen < experts else mean)
        assert max(loads[1:]) - min(loads[1:]) <= 1
    assert torch.equal(scores.topk(chosen)[1], places)


@check("routing")
def what_follows_from_the_choice_is_computed() -> None:
    import torch

    tokens, experts = 20000, 64
    x = torch.randn(tokens, 32, device="cuda")
    weights, chosen = torch.randn(tokens, experts, device="cuda").topk(4)
    hit = torch.nn.functional.one_hot(chosen, experts).permute(2, 1, 0)
    sizes = []
    for expert in hit.sum((-1, -2)).greater(0).nonzero():
        slots, rows = torch.where(hit[expert[0]])
        sizes.append(x[rows].shape[0])
        assert weights[rows, slots].shape == rows.shape
        assert x[(chosen == expert[0]).any(-1)].shape == (sizes[-1], 32)
    assert sum(sizes) == 4 * tokens
    assert sizes[0] == 2 * 4 * tokens // experts
    counts = torch.histc(chosen.flatten().int(), bins=experts, min=0, max=experts - 1)
    assert counts.tolist() == sizes
    order = chosen.flatten().argsort(stable=True)
    assert len(x[order // 4].split(counts.tolist())) == experts


@check("routing")
def other_choices_stay_unknown() -> None:
    import torch

    scores = torch.randn(40, 32000, device="cuda")
    for places in (scores.topk(4)[1], scores[:, :64].topk(4, dim=0)[1], scores[:, 0].topk(3)[1]):
        message(RuntimeError, lambda places=places: bool(places.flatten()[0] > 0))
    known = torch.eye(4, device="cuda")
    assert known.topk(1)[1].flatten().tolist() == [0, 1, 2, 3]


@check("zero")
def unknown_values_are_zero_where_asked_for() -> None:
    import torch

    unknown = torch.randn(LARGE, device="cuda")
    assert unknown.sum().item() == 0.0
    assert not bool(unknown[0] > 1)
    assert not torch.equal(unknown, unknown + 1)
    assert unknown.cpu().numpy().sum() == 0.0
    pinned = torch.empty(LARGE, pin_memory=True).copy_(unknown)
    assert pinned.numpy().sum() == 0.0
    assert pinned.sum().item() == 0.0
    assert unknown[:3].tolist() == [0.0, 0.0, 0.0]
    message(NotImplementedError, lambda: unknown.nonzero())


def main(policy: str) -> None:
    """Run the checks of a policy."""
    import spillover.emulator

    if policy == "routing":
        spillover.emulator.enable(dry=True, vram="64GiB", routing="2")
    else:
        spillover.emulator.enable(dry=True, vram="64GiB", unknown=policy)  # type: ignore[arg-type]
    import torch

    results = {}
    for name, function in CHECKS[policy].items():
        try:
            function()
            torch.cuda.synchronize()
            found = spillover.emulator.hazards()
            assert not found, "\n".join(found)
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
            spillover.emulator.clear_hazards()
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
