"""Nobody reads an old weight while updates are under way: each way of reading, by name.

The worker updates only while somebody waits (``lazy_worker``), so who does not wait fails.
"""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from overlap_models import LazyWorker, Net, assert_same_run, loss_of, set_ones, tokens_of, train
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from spillover.optim import SGD, AdamW, _awaited, clip_grad_norm_

pytestmark = pytest.mark.usefixtures("lazy_worker")

Read = Callable[[nn.Module, torch.optim.Optimizer], Any]


def first(model: nn.Module) -> torch.Tensor:
    return model.table.weight


def loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def all_of(model: nn.Module) -> list[torch.Tensor]:
    return [each.detach().clone() for each in model.parameters()]


def in_thread(model: nn.Module) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.extend(all_of(model)))
    thread.start()
    thread.join()
    return found


def averaged(model: nn.Module) -> list[torch.Tensor]:
    average = torch.optim.swa_utils.AveragedModel(model)
    for each in average.parameters():
        each.data.zero_()
    average.n_averaged.fill_(1)
    average.update_parameters(model)
    return all_of(average)


def in_evaluation(model: nn.Module) -> list[torch.Tensor]:
    model.eval()
    with torch.no_grad():
        found = model(tokens_of(99))
    model.train()
    return [found]


def through_memory(tensor: torch.Tensor) -> torch.Tensor:
    """What is at its address, as a kernel would find it that was given the address alone."""
    address = tensor.data_ptr()
    del tensor
    host = torch.empty(40 * 32, pin_memory=True)
    stream = torch.cuda.current_stream()
    torch.cuda.cudart()
    import ctypes

    copy_async = ctypes.CDLL("libcuda.so.1").cuMemcpyDtoHAsync_v2
    result = copy_async(
        ctypes.c_void_p(host.data_ptr()),
        ctypes.c_uint64(address),
        ctypes.c_size_t(host.nbytes),
        ctypes.c_void_p(stream.cuda_stream),
    )
    assert result == 0
    stream.synchronize()
    return host


READS: dict[str, Read] = {
    "clone": lambda model, _: all_of(model),
    "data": lambda model, _: [each.data.clone() for each in model.parameters()],
    "reversed": lambda model, _: [each.cpu() for each in reversed(list(model.parameters()))],
    "tolist": lambda model, _: [torch.tensor(first(model).tolist())],
    "item": lambda model, _: [torch.tensor(first(model)[1, 2].item())],
    "numpy": lambda model, _: [torch.from_numpy(first(model).detach().cpu().numpy())],
    "print": lambda model, _: [torch.tensor([ord(each) for each in repr(first(model))])],
    "equal": lambda model, _: [torch.tensor(torch.equal(*[first(model)] * 2)), first(model) == 1],
    "foreach": lambda model, _: torch._foreach_norm(list(model.parameters())),
    "norm": lambda model, _: [torch.nn.utils.get_total_norm(list(model.parameters()))],
    "EMA": lambda model, _: averaged(model),
    "lerp": lambda model, _: [torch.zeros(40, 32, device="cuda").lerp(first(model), 0.1)],
    "another tensor's copy_": lambda model, _: [torch.zeros(40, 32).copy_(first(model))],
    "out=": lambda model, _: [
        torch.add(first(model).detach(), 1, out=torch.empty(40, 32, device="cuda"))
    ],
    "functional": lambda model, _: [F.linear(torch.ones(32, device="cuda"), first(model))],
    "matmul": lambda model, _: [torch.ones(40, device="cuda") @ first(model)],
    "einsum": lambda model, _: [torch.einsum("ij->j", first(model))],
    "parameters_to_vector": lambda model, _: [parameters_to_vector(model.parameters())],
    "functional_call": lambda model, _: [
        torch.func.functional_call(model, dict(model.named_parameters()), (tokens_of(9),))
    ],
    "stack_module_state": lambda model, _: list(
        torch.func.stack_module_state([model, model])[0].values()
    ),
    "deepcopy": lambda model, _: all_of(copy.deepcopy(model)),
    "deepcopy of a parameter": lambda model, _: [copy.deepcopy(first(model))],
    "deepcopy with the optimizer": lambda model, optimizer: all_of(
        copy.deepcopy((optimizer, model))[1]
    ),
    "copy of a parameter": lambda model, _: [copy.copy(first(model)).detach().clone()],
    "pickle": lambda model, _: all_of(pickle.loads(pickle.dumps(model))),
    "torch.save of the model": lambda model, _: all_of(loaded(model)),
    "torch.save of the state": lambda model, _: list(loaded(model.state_dict()).values()),
    "torch.save of a parameter": lambda model, _: [loaded(first(model))],
    "state_dict": lambda model, _: [each.clone() for each in model.state_dict().values()],
    "state_dict kept": lambda model, _: [
        each.clone() for each in model.state_dict(keep_vars=True).values()
    ],
    "the optimizer's state_dict": lambda _, optimizer: [
        each.clone()
        for entry in optimizer.state_dict()["state"].values()
        for each in entry.values()
    ],
    "the optimizer's state": lambda model, optimizer: [
        optimizer.state[first(model)]["exp_avg"].clone()
    ],
    "evaluation": lambda model, _: in_evaluation(model),
    "another thread": lambda model, _: in_thread(model),
    "storage": lambda model, _: [
        torch.tensor([], device="cuda").set_(first(model).untyped_storage()).clone()
    ],
    "data_ptr": lambda model, _: [through_memory(first(model))],
    "dlpack": lambda model, _: [torch.from_dlpack(first(model).detach()).clone()],
    "nn.Parameter of it": lambda model, _: [nn.Parameter(first(model)).detach().clone()],
    "a view": lambda model, _: [first(model).view(-1).clone(), first(model)[3].clone()],
    "another device": lambda model, _: all_of(copy.deepcopy(model).cpu()),
    "pinned": lambda model, _: [first(model).detach().cpu().pin_memory()],
    "to another type": lambda model, _: [first(model).to(torch.bfloat16), first(model).half()],
    "a leaf for gradients": lambda model, _: list(
        torch.autograd.grad((first(model) ** 3).sum(), first(model))
    ),
}


@pytest.mark.parametrize("name", READS)
def test_reads(name: str) -> None:
    assert_same_run(
        train(overlaps=True, after_step=READS[name], steps=3),
        train(overlaps=False, after_step=READS[name], steps=3),
    )


# ---- writes ------------------------------------------------------------------------------------


@torch.no_grad()
def scale_all(model: nn.Module, _: Any) -> list[torch.Tensor]:
    torch._foreach_mul_(list(model.parameters()), 0.9)
    return []


@torch.no_grad()
def fill_one(model: nn.Module, _: Any) -> list[torch.Tensor]:
    model.norm.weight.fill_(0.5)
    model.layers[1].weight[2].zero_()
    model.layers[2].weight.data.clamp_(-0.1, 0.1)
    return []


def load(model: nn.Module, _: Any) -> list[torch.Tensor]:
    model.load_state_dict(
        {name: torch.full_like(value, 0.1) for name, value in model.layers[0].state_dict().items()},
        strict=False,
    )
    model.layers[0].load_state_dict(
        {name: value * 0.5 for name, value in model.layers[1].state_dict().items()}
    )
    return []


def replace_data(model: nn.Module, _: Any) -> list[torch.Tensor]:
    for each in model.parameters():
        each.data = each.data * 0.5
    return []


def replace_storage(model: nn.Module, _: Any) -> list[torch.Tensor]:
    """``set_`` is a method that torch calls no class for."""
    with torch.no_grad():
        for each in model.parameters():
            each.set_(torch.full(each.shape, 0.1, dtype=each.dtype, device="cuda"))
    return []


def from_vector(model: nn.Module, _: Any) -> list[torch.Tensor]:
    vector = torch.linspace(-0.1, 0.1, sum(each.numel() for each in model.parameters()))
    vector_to_parameters(vector.cuda(), model.parameters())
    return []


def move(model: nn.Module, _: Any) -> list[torch.Tensor]:
    model.cpu()
    found = all_of(model)
    model.cuda()
    return found


@pytest.mark.parametrize(
    "write",
    [scale_all, fill_one, load, replace_data, replace_storage, from_vector, move],
    ids=lambda one: one.__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_writes(write: Read, dtype: torch.dtype) -> None:
    assert_same_run(
        train(overlaps=True, after_step=write, dtype=dtype),
        train(overlaps=False, after_step=write, dtype=dtype),
    )


# ---- gradients ---------------------------------------------------------------------------------


def zero_gradients(model: nn.Module, _: Any) -> list[torch.Tensor]:
    for each in model.parameters():
        if each.grad is not None:
            each.grad.zero_()
    return []


def scale_gradients(model: nn.Module, _: Any) -> list[torch.Tensor]:
    torch._foreach_mul_([each.grad for each in model.parameters() if each.grad is not None], 0.0)
    return []


def clip_gradients(model: nn.Module, _: Any) -> list[torch.Tensor]:
    return [clip_grad_norm_(model.parameters(), 0.01).cpu()]


def drop_gradients(model: nn.Module, _: Any) -> list[torch.Tensor]:
    """Whoever takes the memory then writes to it."""
    model.zero_grad()
    return [torch.full((32, 32), float("nan"), device="cuda") for _ in range(20)][:0]


def read_gradients(model: nn.Module, _: Any) -> list[torch.Tensor]:
    return [each.grad.clone() for each in model.parameters() if each.grad is not None]


@pytest.mark.parametrize(
    "change",
    [zero_gradients, scale_gradients, clip_gradients, drop_gradients, read_gradients],
    ids=lambda one: one.__name__,
)
@pytest.mark.parametrize("offloads", [False, True])
def test_gradients_after_the_step(change: Read, offloads: bool) -> None:
    options: dict[str, Any] = {"after_step": change, "offload_gradients": offloads}
    assert_same_run(train(overlaps=True, **options), train(overlaps=False, **options))


def test_gradients_that_stay_are_added_to() -> None:
    def run(overlaps: bool) -> list[torch.Tensor]:
        model = Net()
        options = {"overlap": model} if overlaps else {}
        optimizer = AdamW(model.parameters(), lr=0.01, **options)
        for step in range(3):
            loss_of(model, step).backward()
            optimizer.step()
        return all_of(model)

    assert all(map(torch.equal, run(True), run(False)))


# ---- what cannot be told to wait ---------------------------------------------------------------


def test_an_alias_that_was_kept_is_new_when_the_step_returns() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).cuda()
    optimizer = SGD(model.parameters(), lr=1.0, overlap=model)
    kept = model[0].weight.data, model[1].weight.detach()[2]
    before = [each.clone() for each in kept]
    for each in model.parameters():
        each.grad = torch.ones_like(each)
    optimizer.step()
    assert [_awaited.is_awaited(each) for each in model.parameters()] == [False, True, False, True]
    for each, old in zip(kept, before, strict=True):
        assert torch.equal(each, old - 1)


def test_a_gradient_that_somebody_else_holds_is_read_when_the_step_returns() -> None:
    model = nn.Linear(8, 8).cuda()
    optimizer = SGD(model.parameters(), lr=1.0, overlap=model)
    before = model.weight.detach().clone()
    bucket = torch.ones(2, 8, 8, device="cuda")
    model.weight.grad, model.bias.grad = bucket[1], torch.ones(8, device="cuda")
    optimizer.step()
    bucket.zero_()
    assert torch.equal(model.weight, before - 1)


class OfC(nn.Module):
    """A module whose operator is an extension that torch's functions know nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 8))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return value @ self.weight


def test_an_extension_in_c_gets_new_weights_from_its_module() -> None:
    model = nn.Sequential(OfC(), OfC()).cuda()
    optimizer = SGD(model.parameters(), lr=1.0, overlap=model)
    for each in model.parameters():
        each.grad = torch.ones_like(each)
    optimizer.step()
    assert torch.equal(model(torch.ones(8, device="cuda")), torch.zeros(8, device="cuda"))


def test_a_module_that_was_added_later_has_new_weights() -> None:
    model = nn.Sequential(nn.Linear(64, 64)).cuda()
    optimizer = SGD(model.parameters(), lr=1.0, overlap=model)
    model.append(OfC().cuda())
    optimizer.add_param_group({"params": model[1].weight})
    set_ones(model)
    optimizer.step()
    assert torch.equal(model[1](torch.ones(8, device="cuda")), torch.zeros(8, device="cuda"))


def sum_of_squares(model: nn.Module, weights: Any, value: torch.Tensor) -> torch.Tensor:
    return torch.func.functional_call(model, weights, (value,)).square().sum()


TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "grad": torch.func.grad,
    "vjp": lambda function: lambda *arguments: torch.func.vjp(function, *arguments)[0],
    "jacrev": torch.func.jacrev,
    "a gradient for each sample": lambda function: torch.vmap(
        torch.func.grad(function), in_dims=(None, 0)
    ),
    "functionalize": torch.func.functionalize,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).cuda()
    optimizer = SGD(model.parameters(), lr=1.0, overlap=model)
    function = TRANSFORMS[name](functools.partial(sum_of_squares, model))
    value = torch.ones(3, 8, device="cuda")
    set_ones(model)
    optimizer.step()
    weights = dict(model.named_parameters())
    found = function(weights, value)
    optimizer.synchronize()
    expected = function(weights, value)
    assert torch.utils._pytree.tree_all(
        lambda each: each, torch.utils._pytree.tree_map(torch.equal, found, expected)
    )


def test_weights_that_no_hooked_module_has_are_new_when_the_step_returns() -> None:
    model, alone = nn.Linear(8, 8).cuda(), nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = SGD([*model.parameters(), alone], lr=1.0, overlap=model)
    optimizer.add_param_group({"params": nn.Parameter(torch.ones(4, device="cuda"))})
    for group in optimizer.param_groups:
        for each in group["params"]:
            each.grad = torch.ones_like(each)
    optimizer.step()
    assert not _awaited.is_awaited(alone)
    assert not _awaited.is_awaited(optimizer.param_groups[1]["params"][0])
    assert _awaited.is_awaited(model.weight)
    assert alone.sum() == 0


def test_an_old_graph_is_refused() -> None:
    """As after a step that does not overlap: the weight that it saved has changed."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).cuda()
    optimizer = SGD(model.parameters(), lr=0.1, overlap=model)
    loss = model(torch.ones(4, device="cuda")).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_replayed_graph_finds_new_weights() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)).cuda()
    optimizer = SGD(model.parameters(), lr=0.1, overlap=model)
    value = torch.ones(2, 16, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model(value).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        model(value)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        found = model(value)
    for each in model.parameters():
        each.grad = torch.ones_like(each)
    optimizer.step()
    graph.replay()
    assert torch.equal(found, model(value))


def test_graphed_callables_wait_for_all_that_they_replay() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)).cuda()
    twin = copy.deepcopy(model)
    value = torch.ones(2, 16, device="cuda")
    graphed = torch.cuda.make_graphed_callables(model, (value,))
    optimizer = SGD(model.parameters(), lr=0.1, overlap=model)
    reference = SGD(twin.parameters(), lr=0.1)
    for _ in range(3):
        for module, one in ((graphed, optimizer), (twin, reference)):
            module(value).square().sum().backward()
            one.step()
            one.zero_grad()
    assert all(map(torch.equal, all_of(model), all_of(twin)))


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(value, weight)
        return value @ weight

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        value, weight = ctx.saved_tensors
        return gradient @ weight.T, value.T @ gradient


class Odd(nn.Module):
    """Weights that are computed, recurrent, tied, saved by a function, checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.old_normed = nn.utils.spectral_norm(nn.Linear(8, 8))
        self.recurrent = nn.LSTM(8, 8, num_layers=2, batch_first=True)
        self.tied = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.tied.weight
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.weights = nn.ParameterList(torch.randn(8, 8) / 4 for _ in range(2))
        self.cuda()

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        value = self.old_normed(self.normed(value))
        value = self.recurrent(value)[0]
        value = self.again(self.tied(value))
        value = torch.utils.checkpoint.checkpoint(self.encoder, value, use_reentrant=False)
        for weight in self.weights:
            value = Function.apply(value.flatten(0, 1), weight).view(value.shape)
        return value


def test_odd_modules() -> None:
    def run(overlaps: bool) -> list[torch.Tensor]:
        model = Odd()
        options = {"overlap": model} if overlaps else {}
        optimizer = AdamW(model.parameters(), lr=0.01, **options)
        found = []
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            value = torch.randn(2, 3, 8, generator=generator).cuda()
            optimizer.zero_grad()
            loss = model(value).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
            if step % 2 == 0:
                model.eval()
                with torch.no_grad():
                    found.append(model(value))
                model.train()
        return [*found, *all_of(model)]

    assert all(map(torch.equal, run(True), run(False)))


def test_two_optimizers_of_one_model() -> None:
    def run(overlaps: bool) -> list[torch.Tensor]:
        model = Net()
        options = {"overlap": model} if overlaps else {}
        first_half, second_half = list(model.parameters())[:4], list(model.parameters())[4:]
        optimizers = [AdamW(first_half, lr=0.01, **options), SGD(second_half, lr=0.1, **options)]
        for step in range(4):
            loss_of(model, step).backward()
            for one in optimizers:
                one.step()
                one.zero_grad()
        return all_of(model)

    assert all(map(torch.equal, run(True), run(False)))


def test_copies_of_a_module_have_hooks_that_do_nothing(lazy_worker: LazyWorker) -> None:
    model = Net()
    optimizer = AdamW(model.parameters(), overlap=model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded(model)):
        loss_of(twin, 0).backward()
    loss_of(model, 0).backward()
    optimizer.step()
    loss_of(twin, 0)
    assert lazy_worker.batches == 0
    other = copy.deepcopy(optimizer)
    assert other.gradients is None
    other.step()


def test_a_step_outlives_its_optimizer() -> None:
    model = nn.Linear(8, 8).cuda()
    before = model.weight.detach().clone()
    optimizer = SGD(model.parameters(), lr=1.0, overlap=model)
    for each in model.parameters():
        each.grad = torch.ones_like(each)
    optimizer.step()
    del optimizer
    assert torch.equal(model.weight, before - 1)
    assert model.bias.numel()
    model.bias.sum()
    gc.collect()
    assert not model._forward_pre_hooks
