"""Sparse tensors on the emulated device: what programs do with them, against the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

COMPRESSED = [torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc]


@pytest.fixture
def dense() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(6, 8, generator=generator)
    return values * (torch.rand(6, 8, generator=generator) > 0.6)


def sparse_of(dense: Tensor, layout: torch.layout) -> Tensor:
    blocks = (2, 2) if layout in (torch.sparse_bsr, torch.sparse_bsc) else None
    return dense.to_sparse(layout=layout, blocksize=blocks)


def same(actual: Tensor, expected: Tensor) -> None:
    assert actual.is_cuda
    assert actual.layout == expected.layout
    torch.testing.assert_close(actual.cpu(), expected)


@pytest.mark.parametrize("layout", [torch.sparse_coo, *COMPRESSED])
def test_conversion_there_and_back(dense: Tensor, layout: torch.layout) -> None:
    sparse = sparse_of(dense.cuda(), layout)
    same(sparse, sparse_of(dense, layout))
    same(sparse.to_dense(), dense)
    same(sparse.cpu().cuda(), sparse_of(dense, layout))


def test_duplicate_indices_are_summed_by_coalescing() -> None:
    indices = torch.tensor([[0, 1, 1, 0], [2, 0, 0, 1]])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    host = torch.sparse_coo_tensor(indices, values, (2, 3))
    device = torch.sparse_coo_tensor(indices.cuda(), values.cuda(), (2, 3))
    assert not device.is_coalesced()
    assert device.coalesce().is_coalesced()
    same(device.coalesce(), host.coalesce())
    # The uncoalesced original is left as it was.
    assert device._nnz() == 4


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matrix": lambda s, d: s @ d.T,
    "vector": lambda s, d: s @ d[0],
    "sum of sparse": lambda s, d: s + s * 2,
    "sum with dense": lambda s, d: d + s,
    "product": lambda s, d: s * s,
    "scalar": lambda s, d: s * 3.0,
    "addmm": lambda s, d: torch.sparse.addmm(torch.ones(6, 6, device=d.device), s, d.T),
    "sparse by sparse": lambda s, d: torch.sparse.mm(s, s.transpose(0, 1)),
    "reduction": lambda s, d: torch.sparse.sum(s, dim=0),
    "softmax": lambda s, d: torch.sparse.softmax(s, dim=1),
    "index_select": lambda s, d: s.index_select(0, torch.tensor([0, 3], device=d.device)),
    "mask": lambda s, d: d.sparse_mask(s),
    "unary": lambda s, d: s.abs().sqrt(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_coordinates(dense: Tensor, name: str) -> None:
    operation = OPERATIONS[name]
    expected = operation(dense.to_sparse(), dense)
    actual = operation(dense.cuda().to_sparse(), dense.cuda())
    if expected.is_sparse:
        actual, expected = actual.coalesce(), expected.coalesce()
    same(actual, expected)


@pytest.mark.parametrize("name", ["matrix", "vector", "sum of sparse", "product", "scalar"])
def test_compressed_rows(dense: Tensor, name: str) -> None:
    operation = OPERATIONS[name]
    same(
        operation(dense.cuda().to_sparse_csr(), dense.cuda()),
        operation(dense.to_sparse_csr(), dense),
    )


def test_writing_in_place_reaches_the_device_tensor(dense: Tensor) -> None:
    host, device = dense.to_sparse(), dense.cuda().to_sparse()
    other = torch.eye(6, 8).to_sparse()
    host.add_(other)
    device.add_(other.cuda())
    same(device.coalesce(), host.coalesce())
    host.mul_(2.0)
    device.mul_(2.0)
    same(device.coalesce(), host.coalesce())


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_gradients(dense: Tensor, layout: torch.layout) -> None:
    def gradients(device: str) -> tuple[Tensor, Tensor]:
        weights = sparse_of(dense.to(device), layout).requires_grad_()
        inputs = dense.T.contiguous().to(device).requires_grad_()
        (torch.sparse.mm(weights, inputs) ** 2).sum().backward()
        assert weights.grad is not None
        assert inputs.grad is not None
        return weights.grad, inputs.grad

    for actual, expected in zip(gradients("cuda"), gradients("cpu"), strict=True):
        same(actual.to_dense(), expected.to_dense())


def test_an_embedding_with_sparse_gradients_trains(dense: Tensor) -> None:
    def train(device: str) -> Tensor:
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(10, 4, sparse=True).to(device)
        optimizer = torch.optim.SparseAdam(embedding.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            rows = torch.tensor([[step, 2, 5], [5, 1, step]], device=device)
            embedding(rows).square().sum().backward()
            assert embedding.weight.grad is not None
            assert embedding.weight.grad.is_sparse
            optimizer.step()
        return embedding.weight.detach()

    torch.testing.assert_close(train("cuda").cpu(), train("cpu"))


def test_operands_on_two_devices_are_refused(dense: Tensor) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        dense.cuda().to_sparse().add(dense.to_sparse())


def test_values_written_on_another_stream_are_a_hazard(dense: Tensor) -> None:
    from spillover import emulator

    sparse = dense.cuda().to_sparse()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    sparse._values().mul_(2.0)
    with torch.cuda.stream(side), pytest.raises(RuntimeError, match="hazard"):
        sparse @ torch.ones(8, 2, device="cuda")
    torch.cuda.synchronize()
    emulator.clear_hazards()
