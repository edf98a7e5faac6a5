"""torch's clipping and GradScaler on placeholders."""

from __future__ import annotations

import pytest
import torch
from gradient_models import Gpt, Twins, all_offloaded, assert_twins_equal, backward, make_gpt
from torch import nn

from spillover.optim import AdamW, clip_grad_norm_, offload_gradients


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("clip", ["norm", "value", "total"])
@pytest.mark.parametrize("twice", [False, True])
def test_torchs_clipping_sees_the_truth(
    twins: Twins, foreach: bool | None, clip: str, twice: bool
) -> None:
    if twice:
        backward(*twins[:2], seed=1)
    results = []
    for model in twins[:2]:
        if clip == "norm":
            results.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=foreach))
        elif clip == "value":
            nn.utils.clip_grad_value_(model.parameters(), 1e-3, foreach=foreach)
            results.append(torch.zeros(()))
        else:
            gradients = [one.grad for one in model.parameters()]
            results.append(nn.utils.get_total_norm(gradients, foreach=foreach))
            nn.utils.clip_grads_with_norm_(model.parameters(), 0.1, results[-1], foreach=foreach)
    torch.testing.assert_close(*results, rtol=1e-5, atol=0.0)
    assert twins[2].stats().fetched == 0
    assert_twins_equal(twins, rtol=1e-5, atol=1e-9)


def test_grad_scaler_skips_a_step_with_infinity_and_changes_nothing() -> None:
    def run(offloads: bool) -> tuple[Gpt, list[float]]:
        model = make_gpt()
        optimizer = AdamW(model.parameters(), lr=1e-2, offload_gradients=offloads)
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=2)
        scales = []
        for seed in range(6):
            before = [parameter.detach().clone() for parameter in model.parameters()]
            loss = model.loss(seed)
            scaler.scale(loss * float("inf") if seed == 2 else loss).backward()
            assert all_offloaded(model) == offloads
            if seed % 2:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
            same = all(map(torch.equal, model.parameters(), before))
            assert same == (seed == 2)
        return model, scales

    (plain, expected), (offloaded, found) = run(False), run(True)
    assert found == expected
    for one, other in zip(offloaded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_grad_scaler_with_gradients_in_both_places(twins: Twins) -> None:
    _, offloaded, _ = twins
    here = nn.Parameter(torch.ones(3, device="cuda"))
    here.grad = torch.full_like(here, 2.0)
    optimizer = torch.optim.SGD([*offloaded.parameters(), here], lr=1.0)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0)
    scaler.scale(torch.ones((), device="cuda"))
    norm = offloaded.embedding.weight.grad.norm().item()
    scaler.unscale_(optimizer)
    assert here.grad.tolist() == [1.0] * 3
    assert offloaded.embedding.weight.grad.norm().item() == pytest.approx(norm / 2)


def test_a_norm_too_large_for_its_type_is_not_infinity() -> None:
    parameter = nn.Parameter(torch.zeros(4, device="cuda"))
    with offload_gradients([parameter], anomalies="raise") as handle:
        parameter.backward(torch.full((4,), 1e38, device="cuda"))
        assert parameter.grad.norm().item() == float("inf")
        handle.check()
        assert not torch.isinf(parameter.grad).any()


def test_complex_gradients_count_in_our_norm() -> None:
    found = []
    for clip in (clip_grad_norm_, nn.utils.clip_grad_norm_):
        phase = nn.Parameter(torch.ones(3, dtype=torch.complex64, device="cuda"))
        weight = nn.Parameter(torch.ones(5, device="cuda"))
        with offload_gradients([weight]):
            (torch.view_as_real(phase * (3 + 4j)).sum() + (2 * weight).sum()).backward()
            norm = clip([phase, weight], 1.0)
            found.append([norm, phase.grad.clone(), weight.grad.clone()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
