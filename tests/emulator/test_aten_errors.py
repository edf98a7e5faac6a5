"""What the emulated device refuses, and how it says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F


@pytest.mark.parametrize(
    "function",
    [
        lambda d, h: d + h,
        lambda d, h: h * d,
        lambda d, h: torch.mm(d, h),
        lambda d, h: torch.cat([d, h]),
        lambda d, h: F.linear(d, h),
        lambda d, h: torch.add(d, d, out=h),
        lambda d, h: d.add_(h),
        lambda d, h: torch._foreach_add([d], [h]),
    ],
)
def test_mixing_devices_is_refused(function: Callable[..., Any]) -> None:
    d, h = torch.ones(3, 3, device="cuda"), torch.ones(3, 3)
    with pytest.raises(RuntimeError, match=r"same device.*cuda:0.*cpu|cuda:0.*cpu|cpu.*cuda:0"):
        function(d, h)


def test_scalars_and_indices_may_be_on_the_host() -> None:
    d = torch.arange(6.0, device="cuda")
    assert (d + torch.tensor(1.0)).sum().item() == 21
    assert d[torch.tensor([1, 2])].tolist() == [1, 2]
    d[torch.tensor([0])] = torch.tensor(9.0)
    assert d[0].item() == 9


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (
            lambda x: torch.ops.aten.cudnn_convolution(
                x[None, None], x[None, None], [0, 0], [1, 1], [1, 1], 1, False, False, False
            ),
            "aten::cudnn_convolution",
        ),
        (
            lambda x: torch.ops.aten._conv_depthwise2d(
                x[None, None], x[None, None], [3, 3], None, [1, 1], [0, 0], [1, 1]
            ),
            "aten::_conv_depthwise2d",
        ),
        (lambda x: torch._to_sparse_semi_structured(x), "aten::_to_sparse_semi_structured"),
    ],
    ids=["cudnn", "depthwise", "semi-structured"],
)
def test_operator_that_is_not_emulated_names_itself(
    function: Callable[[torch.Tensor], Any], name: str
) -> None:
    with pytest.raises(
        NotImplementedError, match=f"spillover emulator: operator {name}.*not emulated"
    ):
        function(torch.ones(3, 3, device="cuda"))


def test_kernel_errors_are_torch_errors() -> None:
    a = torch.ones(2, 3, device="cuda")
    with pytest.raises(RuntimeError, match=r"must match the size|cannot be multiplied"):
        a @ a
    with pytest.raises(IndexError):
        a.sum(5)
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(-torch.eye(3, device="cuda"))
    # The device works on after an error.
    assert a.sum().item() == 6


def test_index_out_of_range_is_an_error() -> None:
    with pytest.raises((IndexError, RuntimeError)):
        F.embedding(torch.tensor([99], device="cuda"), torch.ones(3, 2, device="cuda"))


def test_cudnn_is_off() -> None:
    assert torch.backends.cudnn.enabled is False
    assert torch.backends.cuda.cudnn_sdp_enabled() is False


def test_reading_a_device_pointer_on_the_host_faults(run_emulated: Callable[..., Any]) -> None:
    result = run_emulated(
        "import ctypes, torch\n"
        "x = torch.ones(4, device='cuda')\n"
        "print('before', flush=True)\n"
        "ctypes.string_at(x.data_ptr(), 4)\n"
        "print('after', flush=True)\n",
        check=False,
    )
    assert result.returncode == -11
    assert "before" in result.stdout
    assert "after" not in result.stdout
