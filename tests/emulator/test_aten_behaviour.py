"""How emulated operators treat outputs, views, layouts and layers that need several operators."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("size", [0, 2, 30])
def test_out_argument_is_resized_on_the_device(size: int) -> None:
    a, b = floats(6).cuda(), floats(6).cuda()
    out = torch.empty(size, device="cuda")
    if size:
        with pytest.warns(UserWarning, match="was resized"):
            torch.add(a, b, out=out)
    else:
        torch.add(a, b, out=out)
    assert out.is_cuda
    assert torch.equal(out.cpu(), a.cpu() + b.cpu())


def test_out_argument_that_is_a_view_is_written_in_place() -> None:
    whole = torch.zeros(4, 6, device="cuda")
    torch.mul(torch.ones(4, device="cuda"), 3, out=whole[:, 2])
    assert whole.sum(0).tolist() == [0, 0, 12, 0, 0, 0]


def test_in_place_results_are_the_same_tensor() -> None:
    a = torch.ones(5, device="cuda")
    assert a.add_(1) is a
    assert torch.relu_(a) is a
    pointer = a.data_ptr()
    torch._foreach_mul_([a], 2.0)
    assert a.data_ptr() == pointer
    assert a.tolist() == [4.0] * 5


def test_in_place_on_overlapping_memory_is_refused_as_on_cpu() -> None:
    expanded = torch.zeros(1, device="cuda").expand(4)
    with pytest.raises(RuntimeError, match="more than one element"):
        expanded.add_(1)


def test_version_counters_and_autograd_see_in_place_changes() -> None:
    a = torch.ones(3, device="cuda", requires_grad=True)
    b = a * 2
    c = b * b
    b.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        c.sum().backward()


def test_views_share_memory() -> None:
    a = torch.zeros(4, 4, device="cuda")
    a.t()[1].fill_(5)
    assert a[:, 1].tolist() == [5.0] * 4
    b = torch.view_as_real(torch.zeros(3, dtype=torch.complex64, device="cuda"))
    b[..., 1] = 2
    assert b.sum().item() == 6


def test_factories() -> None:
    assert torch.arange(5, device="cuda").tolist() == [0, 1, 2, 3, 4]
    assert torch.eye(3, device="cuda").sum().item() == 3
    assert torch.linspace(0, 1, 3, device="cuda").tolist() == [0, 0.5, 1]
    assert torch.full((2,), 7, device="cuda").tolist() == [7, 7]
    assert torch.tril_indices(3, 3, device="cuda").is_cuda
    assert torch.zeros(3, device="cuda").sum().item() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bfloat16, torch.bool])
def test_copies_between_layouts_and_types(dtype: torch.dtype) -> None:
    source = torch.arange(24).reshape(4, 6)
    expected = source.t().to(dtype)
    on_device = source.cuda().t().to(dtype)
    assert torch.equal(on_device.cpu(), expected)
    target = torch.empty(6, 4, dtype=dtype, device="cuda")
    target.copy_(source.t())
    assert torch.equal(target.cpu(), expected)
    host = torch.empty(6, 4, dtype=dtype)
    host.copy_(source.cuda().t())
    assert torch.equal(host, expected)


def test_foreach_on_long_lists() -> None:
    host = [torch.full((3,), float(i)) for i in range(100)]
    device = [h.cuda() for h in host]
    results = torch._foreach_add(device, device, alpha=2)
    assert all(
        r.is_cuda and torch.equal(r.cpu(), h * 3) for r, h in zip(results, host, strict=True)
    )


@pytest.mark.parametrize("layer", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
def test_recurrent_layers(layer: type[torch.nn.Module]) -> None:
    torch.manual_seed(0)
    host = layer(6, 8, num_layers=2)
    device = layer(6, 8, num_layers=2).cuda()
    device.load_state_dict(host.state_dict())
    inputs = floats(5, 3, 6)
    expected, actual = host(inputs)[0], device(inputs.cuda())[0]
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-6)
    expected.sum().backward()
    actual.sum().backward()
    for a, e in zip(device.parameters(), host.parameters(), strict=True):
        torch.testing.assert_close(a.grad.cpu(), e.grad, rtol=1e-4, atol=1e-5)


def test_synchronised_batch_norm_parts_equal_batch_norm() -> None:
    torch.manual_seed(0)
    x = floats(6, 4, 5).cuda()
    weight, bias = torch.rand(4).add(0.5).cuda(), floats(4).cuda()
    mean, invstd = torch.batch_norm_stats(x, 1e-5)
    counts = torch.full((1,), 30.0, device="cuda")
    running_mean, running_var = torch.zeros(4, device="cuda"), torch.ones(4, device="cuda")
    mean, invstd = torch.batch_norm_gather_stats_with_counts(
        x, mean[None], invstd[None], running_mean, running_var, 0.1, 1e-5, counts
    )
    actual = torch.batch_norm_elemt(x, weight, bias, mean, invstd, 1e-5)
    expected_mean, expected_var = torch.zeros(4), torch.ones(4)
    host = x.cpu().requires_grad_()
    expected = F.batch_norm(host, expected_mean, expected_var, weight.cpu(), bias.cpu(), True)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(running_mean.cpu(), expected_mean)
    torch.testing.assert_close(running_var.cpu(), expected_var)

    grad = floats(6, 4, 5)
    expected.backward(grad)
    sums = torch.batch_norm_backward_reduce(grad.cuda(), x, mean, invstd, weight, True, True, True)
    actual_grad = torch.batch_norm_backward_elemt(
        grad.cuda(), x, mean, invstd, weight, sums[0], sums[1], counts.int()
    )
    torch.testing.assert_close(actual_grad.cpu(), host.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("blocking", [True, False])
def test_foreach_copy_crosses_between_host_and_device(blocking: bool) -> None:
    host = [torch.arange(4.0).pin_memory(), torch.ones(2, 3)]
    device = [torch.zeros(4, device="cuda"), torch.zeros(3, 2, device="cuda").t()]
    torch._foreach_copy_(device, host, non_blocking=not blocking)
    back = [torch.empty(4), torch.empty(2, 3)]
    torch._foreach_copy_(back, device)
    assert all(torch.equal(a, b) for a, b in zip(back, host, strict=True))


TWO_DEVICES = """
import torch

a = torch.arange(6.0, device="cuda:1").reshape(2, 3)
b = torch.ones(2, 3, device="cuda:0")
assert (a + 1).device.index == 1
assert torch.arange(3, device="cuda:1").device.index == 1
assert torch.tril_indices(3, 3, device="cuda:1").device.index == 1
assert torch.cuda.current_device() == 0
try:
    a + b
except RuntimeError as error:
    assert "cuda:1 and cuda:0" in str(error), error
else:
    raise AssertionError("tensors of two devices were added")
b.copy_(a)
assert b.tolist() == a.tolist()
c = torch.zeros(3, 2, dtype=torch.float64, device="cuda:0")
c.copy_(a.t())
assert c.tolist() == a.t().tolist()
assert a.to("cuda:0").device.index == 0
torch.cuda.manual_seed_all(3)
x, y = torch.rand(4, device="cuda:0"), torch.rand(4, device="cuda:1")
torch.cuda.manual_seed_all(3)
assert torch.equal(torch.rand(4, device="cuda:1"), y)
assert torch.nn.functional.dropout(a, 0.5).device.index == 1
before = torch.cuda.memory_allocated(0)
torch.mm(a, a.t())
assert torch.cuda.memory_allocated(0) == before
torch.cuda.synchronize(0)
torch.cuda.synchronize(1)
print("done")
"""


def test_two_devices(run_emulated: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert run_emulated(TWO_DEVICES, devices=2).stdout.endswith("done\n")
