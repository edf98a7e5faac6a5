"""Paged optimizers compute what they compute unpaged, bit for bit."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from paging_programs import (
    CASES,
    KIB,
    Lion,
    Net,
    assert_same,
    assert_same_bits,
    backward,
    groups_of,
    options_of,
    train,
    trained,
)
from torch import nn

from spillover.optim import page

#: What is on disk does not depend on the kernels.
TIERED = [(*case, "host") for case in CASES] + [
    (name, variant, tier)
    for name, variant in CASES
    for tier in ("auto", "disk")
    if variant in ("foreach", "options")
]

#: Some parameters share a bucket, some have one of their own, and some are more than one.
BUCKET = 8 * KIB


def make_of(name: str, variant: str) -> Any:
    return functools.partial(getattr(torch.optim, name), **options_of(name, variant))


@pytest.mark.filterwarnings("ignore:.*capturable=True:UserWarning")
@pytest.mark.parametrize(("name", "variant", "tier"), TIERED)
def test_every_class_and_variant(name: str, variant: str, tier: str, tmp_path: Path) -> None:
    paging: dict[str, Any] = {"tier": tier, "bucket_bytes": BUCKET}
    if tier != "host":
        paging["directory"] = tmp_path
    if tier == "auto":
        paging["host_budget"] = 16 * KIB
    matrices_only = name == "Muon"
    found = trained(make_of(name, variant), paging, matrices_only=matrices_only)
    expected = trained(make_of(name, variant), None, matrices_only=matrices_only)
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad", "Adafactor", "RMSprop"])
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    paging = {"bucket_bytes": BUCKET}
    for variant in ("foreach", "loop"):
        make = make_of(name, variant)
        assert_same(trained(make, paging, dtype=dtype), trained(make, None, dtype=dtype))


@pytest.mark.parametrize("bucket_bytes", [1, 3000, "1GiB"])
def test_any_size_of_bucket(bucket_bytes: int | str) -> None:
    make = make_of("AdamW", "foreach")
    found = trained(make, {"bucket_bytes": bucket_bytes})
    assert_same(found, trained(make, None))


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("eps", [(None, 1e-3), (1e-6, 1e-3)])
def test_adafactor_with_several_dtypes_in_a_group(
    foreach: bool | None, eps: tuple[float | None, float]
) -> None:
    def run(paged: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        # The first one decides what eps is for all of them.
        kinds = (torch.bfloat16, torch.float32, torch.float64, torch.bfloat16)
        model = nn.ParameterList(torch.randn(16, 16).to("cuda", kind) * 1e-3 for kind in kinds)
        optimizer = torch.optim.Adafactor(model, eps=eps, foreach=foreach)
        if paged:
            page(optimizer, bucket_bytes=1)
        for step in range(5):
            for parameter in model:
                generator = torch.Generator().manual_seed(step)
                gradient = torch.randn(16, 16, generator=generator) * 1e-4
                parameter.grad = gradient.to("cuda", parameter.dtype)
            optimizer.step()
        return model, optimizer

    assert_same(run(True), run(False))


@pytest.mark.parametrize("foreach", [None, True])
@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_sparse_gradients_beside_dense_ones(name: str, foreach: bool | None) -> None:
    def run(paged: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(10, 24, sparse=True), nn.Linear(24, 24)).cuda()
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1, foreach=foreach)
        if paged:
            page(optimizer, bucket_bytes=1)
        for step in range(5):
            optimizer.zero_grad()
            model(torch.tensor([step, 3, 3], device="cuda")).square().sum().backward()
            optimizer.step()
        return model, optimizer

    assert_same(run(True), run(False))


def test_momentum_of_some_parameters_only() -> None:
    def run(paged: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)
        if paged:
            page(optimizer, bucket_bytes=BUCKET)
        model.layers[2].requires_grad_(False)
        train(model, optimizer, 2)
        model.layers[2].requires_grad_(True)
        train(model, optimizer, 2, first=2)
        return model, optimizer

    assert_same(run(True), run(False))


def test_default_kernels_beside_parameters_on_the_host() -> None:
    def run(paged: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.ParameterList([torch.randn(64, 8).cuda(), torch.randn(64, 8)])
        model.append(torch.randn(64, 8).cuda())
        optimizer = torch.optim.AdamW(model, lr=0.1)
        if paged:
            page(optimizer, bucket_bytes=1)
        for _ in range(5):
            for parameter in model:
                parameter.grad = parameter.detach() * 2
            optimizer.step()
        return model, optimizer

    model, optimizer = run(True)
    assert_same((model, optimizer), run(False))
    state = optimizer.state[model[1]]["exp_avg"]
    assert not state.is_pinned(), "what is on the host anyway is left alone"


def test_an_optimizer_of_a_user_is_paged_whole() -> None:
    found = trained(functools.partial(Lion, lr=1e-3), {})
    expected = trained(functools.partial(Lion, lr=1e-3), None)
    for weight, wanted in zip(found[0].parameters(), expected[0].parameters(), strict=True):
        assert torch.equal(weight, wanted)
        entry, reference = found[1].state[weight], expected[1].state[wanted]
        assert set(entry) == set(reference)
        if reference:
            assert entry["count"] == reference["count"] == 6
            for one, other in (
                (entry["momentum"], reference["momentum"]),
                (entry["history"][0], reference["history"][0]),
            ):
                assert_same_bits(one, other)
                assert one.is_cuda == (weight.numel() == 1)


def test_shared_state_and_a_derived_class() -> None:
    class Shared(Lion):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            table = None
            for entry in self.state.values():
                if table is None:
                    table = entry.get("table", torch.arange(8.0).cuda())
                entry["table"] = table
            if table is not None:
                table += 1
            return loss

    found, expected = trained(Shared, {}, steps=3), trained(Shared, None, steps=3)
    tables = [entry["table"] for entry in found[1].state.values()]
    assert all(table is tables[0] for table in tables)
    wanted = next(iter(expected[1].state.values()))["table"]
    assert torch.equal(tables[0], wanted.cpu())


def test_state_shared_between_parameters_of_torchs_own_class() -> None:
    def run(paged: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.ParameterList([torch.randn(8, 8).cuda(), torch.randn(8, 8).cuda()])
        optimizer = torch.optim.SGD(model, lr=0.1, momentum=0.9)
        buffer = torch.zeros(8, 8, device="cuda")
        for parameter in model:
            optimizer.state[parameter]["momentum_buffer"] = buffer
        if paged:
            page(optimizer, bucket_bytes=1)
        for _ in range(5):
            for parameter in model:
                parameter.grad = parameter.detach() * 2
            optimizer.step()
        return model, optimizer

    assert_same(run(True), run(False))


def test_the_same_parameter_twice() -> None:
    def run(paged: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.ParameterList([torch.randn(8, 8).cuda(), torch.randn(8, 8).cuda()])
        with pytest.warns(UserWarning, match="duplicate"):
            optimizer = torch.optim.Adam([model[0], model[1], model[0]], lr=0.1)
        if paged:
            page(optimizer, bucket_bytes=1)
        for _ in range(3):
            for parameter in model:
                parameter.grad = parameter.detach() * 2
            optimizer.step()
        return model, optimizer

    assert_same(run(True), run(False))


@pytest.mark.parametrize("fused", [True, False])
def test_grad_scaler(fused: bool) -> None:
    def run(paged: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = Net()
        optimizer = torch.optim.AdamW(groups_of(model), fused=fused)
        if paged:
            page(optimizer, bucket_bytes=BUCKET)
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=2)
        for step in range(6):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            value = torch.randn(8, 24, generator=generator).cuda()
            loss = model(value).square().mean()
            scaler.scale(loss * float("inf") if step == 3 else loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return model, optimizer

    assert_same(run(True), run(False))


def test_steps_on_several_streams_and_other_layouts() -> None:
    def run(paged: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 8, 3).cuda().to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        if paged:
            page(optimizer, bucket_bytes=1)
        streams = [torch.cuda.Stream(), torch.cuda.current_stream()]
        for step in range(6):
            stream, other = streams[step % 2], streams[1 - step % 2]
            stream.wait_stream(other)
            with torch.cuda.stream(stream):
                optimizer.zero_grad()
                generator = torch.Generator().manual_seed(step)
                value = torch.randn(2, 3, 5, 5, generator=generator).cuda()
                model(value).square().sum().backward()
                optimizer.step()
        streams[1].wait_stream(streams[0])
        return model, optimizer

    found = run(True)
    assert_same(found, run(False))
    state = found[1].state[found[0].weight]["exp_avg"]
    assert state.is_contiguous(memory_format=torch.channels_last)


def test_closures_run_once_with_gradients() -> None:
    def run(paged: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = Net()
        optimizer = torch.optim.NAdam(groups_of(model))
        if paged:
            page(optimizer, bucket_bytes=BUCKET)
        calls = []

        def closure() -> torch.Tensor:
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            return backward(model, len(calls))

        with torch.no_grad():
            losses = [optimizer.step(closure) for _ in range(3)]
        assert calls == [True] * 3
        assert all(loss is not None and loss.requires_grad for loss in losses)
        return model, optimizer

    assert_same(run(True), run(False))
