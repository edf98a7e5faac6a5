"""A paged optimizer has no more on the device than its buckets, and what it needs where it says."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from paging_programs import KIB, Lion
from torch import nn

import spillover
from spillover import ConfigError, DiskFull, DriverError, HostOutOfMemory
from spillover._pinned import host_stats
from spillover.emulator import calls, faults
from spillover.optim import page, unpage

BUCKET = 256 * KIB
MIB = 1 << 20


def make_parameters(count: int = 16) -> list[nn.Parameter]:
    """Of 64 KiB each, with gradients."""
    parameters = [nn.Parameter(torch.full((128, 128), 1.0, device="cuda")) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.5)
    return parameters


def peak_of(function: Callable[[], Any]) -> int:
    """Device memory that a call takes at most, above what it finds."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.usefixtures("settled_memory")
@pytest.mark.parametrize("tier", ["host", "auto", "disk"])
@pytest.mark.parametrize("foreach", [True, False])
def test_peak_of_every_step(tier: str, foreach: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {} if tier == "host" else {"directory": tmp_path}
    if tier == "auto":
        options["host_budget"] = MIB
    parameters = make_parameters()
    optimizer = torch.optim.Adam(parameters, foreach=foreach)
    page(optimizer, tier, bucket_bytes=BUCKET, **options)
    held = torch.cuda.memory_allocated()
    peaks = [peak_of(optimizer.step) for _ in range(3)]
    # State of three buckets, and the update's own temporaries over the parameters of one.
    assert max(peaks) <= 3 * BUCKET + BUCKET
    assert min(peaks) >= BUCKET
    assert torch.cuda.memory_allocated() == held
    spent = peak_of(lambda: optimizer.load_state_dict(optimizer.state_dict()))
    assert spent <= (0 if tier == "host" else 128 * KIB)
    state_bytes = 2 * sum(parameter.nbytes for parameter in parameters)
    stats = spillover.stats().others["paging"][-1]
    assert stats.host_bytes + stats.disk_bytes == state_bytes
    assert stats.reserved_bytes == 0
    assert stats.buckets == state_bytes // BUCKET


@pytest.mark.usefixtures("settled_memory")
@pytest.mark.parametrize(
    ("name", "options", "copies"),
    [
        ("Adam", {"amsgrad": True}, 3),
        ("Muon", {}, 1),
        ("RMSprop", {"momentum": 0.9, "centered": True}, 3),
        ("SGD", {}, 0),
        pytest.param("Adadelta", {}, 2, marks=pytest.mark.soak),
        pytest.param("Adagrad", {}, 1, marks=pytest.mark.soak),
        pytest.param("Adamax", {}, 2, marks=pytest.mark.soak),
        pytest.param("ASGD", {}, 1, marks=pytest.mark.soak),
        pytest.param("NAdam", {}, 2, marks=pytest.mark.soak),
        pytest.param("RAdam", {}, 2, marks=pytest.mark.soak),
        pytest.param("Rprop", {}, 2, marks=pytest.mark.soak),
        pytest.param("SGD", {"momentum": 0.9}, 1, marks=pytest.mark.soak),
    ],
)
def test_host_bytes_are_there_before_the_first_step(
    name: str, options: dict[str, Any], copies: int
) -> None:
    parameters = make_parameters(8)
    before = host_stats().used_bytes
    optimizer = page(getattr(torch.optim, name)(parameters, **options))
    expected = copies * sum(parameter.nbytes for parameter in parameters)
    assert host_stats().used_bytes - before == expected
    for _ in range(2):
        optimizer.step()
        torch.cuda.synchronize()
        assert host_stats().used_bytes - before == expected
    del optimizer
    gc.collect()
    assert host_stats().used_bytes == before


def test_adafactors_host_bytes() -> None:
    parameters = make_parameters(8)
    parameters.append(nn.Parameter(torch.ones(5000, device="cuda")))
    parameters[-1].grad = torch.ones_like(parameters[-1])
    optimizer = page(torch.optim.Adafactor(parameters))
    reserved = spillover.stats().others["paging"][-1].reserved_bytes
    assert reserved == 8 * 2 * 128 * 4 + 5000 * 4
    optimizer.step()
    stats = spillover.stats().others["paging"][-1]
    assert (stats.host_bytes, stats.reserved_bytes) == (reserved, 0)


@pytest.mark.usefixtures("settled_memory")
def test_a_parameter_that_is_larger_than_buckets() -> None:
    parameters = make_parameters(4)
    parameters.insert(2, nn.Parameter(torch.ones(1024, 1024, device="cuda")))
    parameters[2].grad = torch.ones_like(parameters[2])
    optimizer = page(torch.optim.SGD(parameters, momentum=0.9), bucket_bytes=128 * KIB)
    large = parameters[2].nbytes
    # It comes when what was there has left, and the next one when it has.
    assert max(peak_of(optimizer.step) for _ in range(3)) <= large + 128 * KIB


@pytest.mark.parametrize("fused", [True, False])
def test_the_host_waits_for_nothing(fused: bool) -> None:
    optimizer = page(torch.optim.AdamW(make_parameters(), fused=fused), bucket_bytes=BUCKET)
    optimizer.step()
    with faults():
        optimizer.step()
        found = calls()
    waits = ("cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize")
    assert {name: found.get(name, 0) for name in waits} == dict.fromkeys(waits, 0)
    assert found["cuMemcpyAsync"] >= 4 * 16


@pytest.mark.usefixtures("settled_memory")
def test_nothing_stays_of_an_optimizer_that_is_paged_whole() -> None:
    parameters = make_parameters(8)
    optimizer = page(Lion(parameters))
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        optimizer.step()
        assert torch.cuda.memory_allocated() == before


# ---- room ----------------------------------------------------------------------------------------


def state_of(optimizer: torch.optim.Optimizer) -> dict[Any, Any]:
    return {key: dict(entry) for key, entry in optimizer.state.items()}


@pytest.mark.parametrize("has_state", [False, True])
def test_too_small_a_host_budget(has_state: bool) -> None:
    parameters = make_parameters(8)
    optimizer = torch.optim.Adam(parameters)
    if has_state:
        optimizer.step()
    before = state_of(optimizer)
    with pytest.raises(HostOutOfMemory, match=r"Adam for 8 parameters needs 1\.00 MiB") as caught:
        page(optimizer, host_budget="512KiB")
    assert "tier='auto'" in str(caught.value)
    assert type(optimizer) is torch.optim.Adam
    assert not optimizer._optimizer_step_pre_hooks
    for key, entry in before.items():
        assert all(optimizer.state[key][name] is value for name, value in entry.items())
    optimizer.step()
    page(optimizer, host_budget="1MiB")
    optimizer.step()


def test_too_small_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = torch.optim.Adam(make_parameters(8))
    options: dict[str, Any] = {"host_budget": "256KiB", "directory": tmp_path}
    with pytest.raises(DiskFull, match=r"256\.00 KiB of pinned .* 768\.00 KiB on disk") as caught:
        page(optimizer, "auto", write_limit="512KiB", **options)
    assert caught.value.filename == str(tmp_path)
    usage = type("usage", (), {"free": 700 * KIB})
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda folder: usage)
        with pytest.raises(DiskFull, match=r"700\.00 KiB are free"):
            page(optimizer, "auto", **options)
    assert type(optimizer) is torch.optim.Adam
    page(optimizer, "auto", **options)
    optimizer.step()
    stats = spillover.stats().others["paging"][-1]
    assert (stats.host_bytes, stats.disk_bytes) == (256 * KIB, 768 * KIB)


def test_parameters_that_are_added_without_room() -> None:
    parameters = make_parameters(8)
    optimizer = page(torch.optim.Adam(parameters[:4]), host_budget="512KiB")
    with pytest.raises(HostOutOfMemory, match="needs 512"):
        optimizer.add_param_group({"params": parameters[4:]})
    assert len(optimizer.param_groups) == 1
    optimizer.step()


def test_a_checkpoint_that_needs_more_than_there_is() -> None:
    parameters = make_parameters(4)
    optimizer = page(torch.optim.Adam(parameters), host_budget="512KiB")
    optimizer.step()
    larger = torch.optim.Adam(parameters, amsgrad=True)
    larger.step()
    optimizer.step()
    before = {key: {n: v.clone() for n, v in e.items()} for key, e in optimizer.state.items()}
    with pytest.raises(HostOutOfMemory):
        optimizer.load_state_dict(larger.state_dict())
    for key, entry in before.items():
        for name, value in entry.items():
            assert torch.equal(optimizer.state[key][name], value)
    assert not optimizer.param_groups[0]["amsgrad"]
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tier": "device"}, "'host', 'disk' or 'auto'"),
        ({"tier": "disk"}, "needs directory"),
        ({"tier": "auto"}, "needs directory"),
        ({"directory": "x"}, "are for tier='disk'"),
        ({"write_limit": 5}, "are for tier='disk'"),
        ({"tier": "disk", "directory": "x", "host_budget": 5}, "host_budget is for"),
        ({"bucket_bytes": 0}, "bucket_bytes must be at least"),
        ({"bucket_bytes": "many"}, "bucket_bytes='many' is not a size"),
        ({"host_budget": 0}, "host_budget must be at least"),
    ],
    ids=str,
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    optimizer = torch.optim.Adam(make_parameters(1))
    with pytest.raises(ConfigError, match=message):
        page(optimizer, **options)


# ---- what cannot be paged ------------------------------------------------------------------------


class Elsewhere(Lion):
    """Keeps state beside its state."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.buffers = {"momentum": [torch.zeros(MIB, device="cuda")]}


class Wrapping(Lion):
    """Has an optimizer within."""

    def __init__(self, params: Any) -> None:
        params = list(params)
        super().__init__(params)
        self.inner = torch.optim.SGD(params)


class Quantized(torch.Tensor):
    """A tensor that is more than its bytes."""


class Subclassed(Lion):
    """Makes state of a tensor subclass."""

    def step(self, closure: Any = None) -> Any:
        """One step."""
        loss = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            kind = torch.zeros_like(parameter).as_subclass(Quantized)
            self.state[parameter].setdefault("quantized", kind)
        return loss


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.LBFGS, "LBFGS cannot be paged: its history"),
        (torch.optim.SparseAdam, "few rows"),
        (spillover.optim.AdamW, "off the device by itself"),
        (Elsewhere, r"4\.00 MiB on the device outside of optimizer\.state, in buffers"),
        (Wrapping, "another optimizer in its attribute 'inner'"),
        (functools.partial(torch.optim.Adam, differentiable=True), "differentiable=False"),
    ],
    ids=str,
)
def test_refused(make: Any, message: str) -> None:
    optimizer = make(make_parameters(2))
    with pytest.raises(ConfigError, match=message):
        page(optimizer)


def test_tensor_subclasses_are_refused() -> None:
    parameters = make_parameters(2)
    optimizer = Subclassed(parameters)
    optimizer.step()
    with pytest.raises(ConfigError, match=r"Quantized in the state of a parameter of shape"):
        page(optimizer)
    weight = nn.Parameter(torch.zeros(3, device="cuda").as_subclass(Quantized))
    with pytest.raises(ConfigError, match=r"a parameter of shape \(3,\) is a .*Quantized"):
        page(torch.optim.Adam([weight]))


def test_tensor_subclasses_that_the_first_step_makes() -> None:
    parameters = make_parameters(2)
    optimizer = page(Subclassed(parameters))
    before = parameters[0].detach().clone()
    with pytest.raises(ConfigError, match=r"Quantized.* The step is done") as caught:
        optimizer.step()
    assert not torch.equal(parameters[0], before)
    assert optimizer.state[parameters[0]]["count"] == 1
    assert "may be called again" not in "".join(getattr(caught.value, "__notes__", []))
    unpage(optimizer)
    optimizer.step()
    assert optimizer.state[parameters[0]]["count"] == 2


def test_state_that_shares_memory_stays(caplog: pytest.LogCaptureFixture) -> None:
    class Flat(Lion):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            parameters = self.param_groups[0]["params"]
            if "flat" not in self.state[parameters[0]]:
                flat = torch.zeros(2 * parameters[0].numel(), device="cuda")
                for each, part in zip(parameters, flat.chunk(2), strict=True):
                    self.state[each]["flat"] = part
                self.state[parameters[0]]["whole"] = flat
                self.state[parameters[1]]["gradient"] = parameters[1].grad
            self.state[parameters[0]]["whole"].add_(1)
            return loss

    parameters = make_parameters(2)
    optimizer = page(Flat(parameters))
    for _ in range(3):
        optimizer.step()
    assert [each.message for each in caplog.records if "shares memory" in each.message]
    state = optimizer.state
    assert all(state[each]["flat"].eq(3).all() for each in parameters)
    assert state[parameters[1]]["gradient"] is parameters[1].grad
    assert state[parameters[0]]["momentum"].device.type == "cpu"


def test_captures_are_refused() -> None:
    optimizer = page(torch.optim.Adam(make_parameters(2), capturable=True))
    optimizer.step()
    other = torch.optim.Adam(make_parameters(2), capturable=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in (optimizer.step, lambda: page(other)):
            with pytest.raises(spillover.StateError, match="CUDA graph"):
                call()
    optimizer.step()


def test_differentiable_that_is_set_later() -> None:
    optimizer = page(torch.optim.Adam(make_parameters(2)))
    optimizer.param_groups[0]["differentiable"] = True
    with pytest.raises(ConfigError, match="differentiable=False"):
        optimizer.step()


def test_no_driver_error_is_taken_for_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise DriverError("cuMemHostRegister: on purpose")

    monkeypatch.setattr("spillover._host.HostPool.allocate", fail)
    optimizer = torch.optim.Adam(make_parameters(1))
    with pytest.raises(DriverError):
        page(optimizer)
    assert type(optimizer) is torch.optim.Adam
