"""What is written to and read of a placeholder ``.grad`` is the gradient's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_models import Twins, assert_twins_equal, backward, is_offloaded

Change = Callable[[torch.Tensor], object]

CHANGES: dict[str, Change] = {
    "mul_": lambda g: g.mul_(0.5),
    "mul_ by a tensor": lambda g: g.mul_(torch.full((), 0.5, device="cuda")),
    "mul_ by an array": lambda g: g.mul_(torch.full_like(g, 0.5)),
    "div_": lambda g: g.div_(4),
    "div_ by zero": lambda g: g.div_(0),
    "imul": lambda g: g.__imul__(2),
    "neg_": lambda g: g.neg_(),
    "zero_": lambda g: g.zero_(),
    "fill_": lambda g: g.fill_(3.0),
    "add_ a number": lambda g: g.add_(1.0),
    "add_ a tensor": lambda g: g.add_(torch.ones_like(g)),
    "add_ with alpha": lambda g: g.add_(torch.ones_like(g), alpha=0.25),
    "add_ a row": lambda g: g.add_(torch.ones(g.shape[-1], device="cuda")),
    "add_ itself": lambda g: g.add_(g),
    "sub_": lambda g: g.sub_(torch.ones_like(g)),
    "copy_": lambda g: g.copy_(torch.ones_like(g)),
    "copy_ from the host": lambda g: g.copy_(torch.ones(g.shape)),
    "copy_ a number": lambda g: g.copy_(torch.tensor(2.0)),
    "copy_ itself": lambda g: g.copy_(g),
    "clamp_": lambda g: g.clamp_(-1e-3, 1e-3),
    "clamp_ after mul_": lambda g: g.mul_(0.5).clamp_(-1e-3, 1e-3),
    "mul_ twice, add_": lambda g: g.mul_(0.5).mul_(0.5).add_(torch.ones_like(g)),
    "mul_ of zeros": lambda g: g.zero_().mul_(2.0).add_(torch.ones_like(g)),
    "nan of zeros": lambda g: g.zero_().mul_(float("nan")),
    "lerp_": lambda g: g.lerp_(torch.ones_like(g), 0.1),
    "masked_fill_": lambda g: g.masked_fill_(g > 0, 0.0),
    "index_fill_": lambda g: g.index_fill_(0, torch.tensor([0], device="cuda"), 5.0),
    "nan_to_num_": lambda g: g.nan_to_num_(),
    "setitem": lambda g: g.__setitem__(0, 7.0),
    "through a view": lambda g: g.view(-1).mul_(0.5),
    "through a transposed view": lambda g: g.t().add_(1.0) if g.ndim == 2 else None,
    "through data": lambda g: g.data.mul_(0.5),
    "through detach": lambda g: g.detach().clamp_(-1e-3, 1e-3),
    "through a view of data": lambda g: g.data.view(-1)[:2].zero_(),
    "norm, then mul_": lambda g: g.mul_(1.0 / (g.norm() + 1.0)),
    "an ema": lambda g: g.mul_(0.9).add_(torch.ones_like(g), alpha=0.1),
    "foreach_mul_": lambda g: torch._foreach_mul_([g], 0.5),
    "foreach_mul_ by a tensor": lambda g: torch._foreach_mul_([g], torch.tensor(0.5)),
    "foreach_mul_ by a list": lambda g: torch._foreach_mul_([g], [0.5]),
    "foreach_div_": lambda g: torch._foreach_div_([g], 2.0),
    "foreach_add_": lambda g: torch._foreach_add_([g], [torch.ones_like(g)], alpha=2.0),
    "foreach_add_ a number": lambda g: torch._foreach_add_([g], 1.0),
    "foreach_zero_": lambda g: torch._foreach_zero_([g]),
    "foreach_sqrt_ of abs": lambda g: (torch._foreach_abs_([g]), torch._foreach_sqrt_([g])),
    "foreach_copy_": lambda g: torch._foreach_copy_([g], [torch.ones_like(g)]),
    "foreach_clamp": lambda g: torch._foreach_clamp_max_([g], 1e-3),
    "an out argument": lambda g: torch.mul(g, 2.0, out=g),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_written_to_a_gradient_is_in_it(twins: Twins, change: Change) -> None:
    for model in twins[:2]:
        for parameter in model.parameters():
            change(parameter.grad)
    assert_equal_with_nan(twins)
    backward(*twins[:2], seed=1)
    assert_equal_with_nan(twins, atol=1e-6)


def assert_equal_with_nan(twins: Twins, atol: float = 1e-7) -> None:
    for found, expected in zip(twins[1].parameters(), twins[0].parameters(), strict=True):
        torch.testing.assert_close(
            found.grad.cpu(), expected.grad.cpu(), rtol=1e-5, atol=atol, equal_nan=True
        )


READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "norm": lambda g: g.norm(),
    "norm of float": lambda g: g.float().norm(2),
    "norm by rows": lambda g: g.norm(dim=-1),
    "max norm": lambda g: g.norm(float("inf")),
    "vector_norm in double": lambda g: torch.linalg.vector_norm(g, dtype=torch.float64),
    "foreach_norm": lambda g: torch._foreach_norm([g, g])[1],
    "sum": lambda g: g.sum(),
    "abs max": lambda g: g.abs().max(),
    "isnan": lambda g: torch.isnan(g),
    "isinf": lambda g: torch.isinf(g),
    "isfinite": lambda g: torch.isfinite(g).all(),
    "matmul": lambda g: g @ g.T if g.ndim == 2 else g.dot(g),
    "item": lambda g: g.sum().item(),
    "getitem": lambda g: g[0],
    "cpu": lambda g: g.cpu(),
    "numpy": lambda g: g.cpu().numpy(),
    "numpy of a detached one": lambda g: g.detach().to("cpu", torch.float64).numpy(),
    "tolist": lambda g: g.tolist(),
    "double": lambda g: g.double(),
    "clone": lambda g: g.clone(),
    "clone in a format": lambda g: g.clone(memory_format=torch.contiguous_format),
    "cat": lambda g: torch.cat([g.flatten(), g.flatten()]),
    "stack": lambda g: torch.stack([g, g]),
    "equal": lambda g: torch.equal(g, g.clone()),
    "allclose": lambda g: torch.allclose(g, g.cpu().cuda()),
    "repr": repr,
    "str": str,
    "format": lambda g: f"{g.sum()}",
    "histogram": lambda g: torch.histc(g, 4),
    "flatten_dense_tensors": lambda g: torch._utils._flatten_dense_tensors([g, g]),
    "shape": lambda g: (g.shape, g.stride(), g.dtype, g.device, g.numel(), g.nbytes, g.ndim),
    "properties": lambda g: (g.is_cuda, g.is_sparse, g.layout, g.requires_grad, g.grad_fn),
    "is_leaf": lambda g: (g.is_leaf, len(g), g.is_contiguous(), isinstance(g, torch.Tensor)),
    "new_zeros": lambda g: g.new_zeros(3),
    "zeros_like": lambda g: torch.zeros_like(g),
    "deepcopy": lambda g: copy.deepcopy(g),
    "pickle": lambda g: pickle.loads(pickle.dumps(g)),
    "memory": lambda g: torch.as_tensor(g.untyped_storage().nbytes()),
    "dlpack": lambda g: torch.from_dlpack(g),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("state", ["arrived", "summed", "scaled", "zero"])
def test_what_is_read_of_a_gradient_is_the_truth(twins: Twins, read: Any, state: str) -> None:
    if state == "summed":
        backward(*twins[:2], seed=1)
    for model in twins[:2]:
        for parameter in model.parameters():
            if state == "scaled":
                parameter.grad.mul_(0.25)
            elif state == "zero":
                parameter.grad.zero_()
    for found, expected in zip(twins[1].parameters(), twins[0].parameters(), strict=True):
        assert is_offloaded(found.grad)
        one, other = read(found.grad), read(expected.grad)
        if isinstance(other, (str, tuple)):
            assert one == other
        else:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        assert not isinstance(one, torch.Tensor) or not is_offloaded(one)


def test_data_ptr_is_of_the_gradient(twins: Twins) -> None:
    gradient = next(twins[1].parameters()).grad
    address = gradient.data_ptr()
    assert address != 0
    assert gradient.data_ptr() == address == gradient.__cuda_array_interface__["data"][0]
    assert_twins_equal(twins)


# ---- zero_grad ---------------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("by", ["model", "optimizer"])
def test_zero_grad(twins: Twins, set_to_none: bool, by: str) -> None:
    for model in twins[:2]:
        zeroing = model if by == "model" else torch.optim.SGD(model.parameters(), lr=1.0)
        zeroing.zero_grad(set_to_none=set_to_none)
        for parameter in model.parameters():
            assert (parameter.grad is None) == set_to_none
            assert set_to_none or not parameter.grad.any()
    assert_twins_equal(twins)
    backward(*twins[:2], seed=2)
    assert_twins_equal(twins)


def test_zero_grad_costs_nothing_and_lets_the_memory_be_used_again(twins: Twins) -> None:
    _, offloaded, handle = twins
    before = handle.stats()
    for set_to_none in (False, True, False):
        offloaded.zero_grad(set_to_none=set_to_none)
        backward(offloaded)
    after = handle.stats()
    assert after.host_bytes == before.host_bytes
    assert after.added_bytes == after.fetched == 0
