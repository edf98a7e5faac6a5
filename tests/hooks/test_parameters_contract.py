"""What users and their tools see of a model whose weights are streamed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from streamed_models import (
    assert_same,
    gradients_of,
    make_gpt,
    make_tokens,
    weights_of,
)
from torch import nn

from spillover import StateError, emulator, stream_parameters


def stack(count: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(*[nn.Linear(8, 8) for _ in range(count)]), nn.Linear(8, 8))


def inputs() -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).cuda()


# ---- what stays as it was ----------------------------------------------------------------------


def test_parameters_keep_their_identity_and_order() -> None:
    model = make_gpt()
    before = dict(model.named_parameters())
    stream_parameters(model)
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    assert isinstance(model.blocks[0].norm1.weight, nn.Parameter)
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.is_cuda
    assert model.blocks[0].norm1.weight.is_pinned()


def test_parameters_look_the_same_after_forward_and_backward() -> None:
    model = make_gpt()
    weight = model.blocks[1].norm1.weight
    stream_parameters(model)
    model.loss(make_tokens(1)[0].cuda()).backward()
    assert model.blocks[1].norm1.weight is weight
    assert weight.grad is not None
    assert weight.grad.device.type == "cpu"
    assert "weight" not in model.blocks[1].norm1.__dict__


def test_a_model_that_starts_on_the_device_with_gradients() -> None:
    model = stack().cuda()
    model(inputs()).sum().backward()
    expected = gradients_of(model)
    stream_parameters(model)
    assert_same(gradients_of(model), expected)
    model(inputs()).sum().backward()
    assert_same(gradients_of(model), {name: value * 2 for name, value in expected.items()})


def test_state_dict_round_trip() -> None:
    model = make_gpt()
    expected = weights_of(model)
    stream_parameters(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert len(file.getvalue()) < 2 * sum(value.nbytes for value in expected.values())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    file.seek(0)
    model.load_state_dict(torch.load(file))
    assert_same(weights_of(model), expected)
    plain = make_gpt()
    plain.load_state_dict(model.state_dict())
    assert_same(weights_of(plain), expected)


@pytest.mark.parametrize("how", ["in place", "data in place", "data", "load"])
def test_changed_weights_are_used(how: str) -> None:
    # Two blocks: their copies are still on the device when the next forward begins.
    model, resident = stack(2), stack(2).cuda()
    stream_parameters(model)
    with torch.no_grad():
        model(inputs())
        weight = model[0][1].weight
        changed = torch.full_like(weight, 0.25)
        if how == "in place":
            weight.copy_(changed)
        elif how == "data in place":
            weight.data.copy_(changed)
        elif how == "data":
            weight.data = changed
        else:
            model.load_state_dict({**model.state_dict(), "0.1.weight": changed})
        resident[0][1].weight.copy_(changed)
        assert torch.equal(model(inputs()), resident(inputs()))


def test_weights_changed_between_forward_and_backward_raise_as_in_torch() -> None:
    model = stack()
    stream_parameters(model)
    output = model(inputs())
    with torch.no_grad():
        model[0][1].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*0\.1\.weight"):
        output.sum().backward()


def test_a_kept_gradient_keeps_its_values() -> None:
    model = stack()
    stream_parameters(model)
    model(inputs()).sum().backward()
    kept = model[0][0].weight.grad
    before = kept.clone()
    model.zero_grad()
    (model(inputs()) * 3).sum().backward()
    assert torch.equal(kept, before)
    assert not torch.equal(model[0][0].weight.grad, before)


def test_gradients_without_set_to_none_accumulate_from_zero() -> None:
    model, resident = stack(), stack().cuda()
    stream_parameters(model)
    for _ in range(2):
        for candidate in (model, resident):
            candidate.zero_grad(set_to_none=False)
            candidate(inputs()).sum().backward()
    assert_same(gradients_of(model), gradients_of(resident))


def test_clip_grad_norm_and_grad_scaler() -> None:
    model, resident = make_gpt(), make_gpt().cuda()
    stream_parameters(model, resident=1)
    norms = []
    for candidate in (model, resident):
        optimizer = torch.optim.SGD(candidate.parameters(), lr=0.1, foreach=False)
        scaler = torch.amp.GradScaler("cuda", init_scale=128.0)
        for tokens in make_tokens(2):
            scaler.scale(candidate.loss(tokens.cuda())).backward()
            scaler.unscale_(optimizer)
            norms.append(float(nn.utils.clip_grad_norm_(candidate.parameters(), 0.5)))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert norms[:2] == pytest.approx(norms[2:], rel=1e-5)
    found, expected = weights_of(model), weights_of(resident)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_grad_scaler_skips_a_step_with_infinite_gradients() -> None:
    model = stack()
    stream_parameters(model)
    before = weights_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    scaler = torch.amp.GradScaler("cuda", init_scale=128.0)
    scaler.scale((model(inputs()) * float("inf")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_same(weights_of(model), before)
    assert scaler.get_scale() == 64.0


def test_an_optimizer_step_inside_of_backward() -> None:
    model, resident = stack(), stack().cuda()
    stream_parameters(model)

    def step(parameter: torch.Tensor) -> None:
        with torch.no_grad():
            parameter.sub_(parameter.grad, alpha=0.1)
        parameter.grad = None

    for candidate in (model, resident):
        for parameter in candidate.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        for _ in range(3):
            torch.tanh(candidate(inputs())).sum().backward()
    assert_same(weights_of(model), weights_of(resident))


def test_moving_to_where_it_is_changes_nothing() -> None:
    model = make_gpt()
    stream_parameters(model)
    weight = model.blocks[0].norm1.weight
    model.cuda().to("cuda").to(torch.device("cuda", 0)).float().train().eval()
    assert model.blocks[0].norm1.weight is weight
    assert weight.device.type == "cpu"
    model.loss(make_tokens(1)[0].cuda()).backward()


@pytest.mark.parametrize("convert", ["half", "cpu", "double"])
def test_conversions_of_streamed_weights_raise(convert: str) -> None:
    model = make_gpt()
    handle = stream_parameters(model)
    with pytest.raises(StateError, match=r"call remove\(\)"):
        getattr(model.blocks, convert)()
    handle.remove()
    getattr(model, convert)()


# ---- the handle --------------------------------------------------------------------------------


def test_remove_gives_an_ordinary_model() -> None:
    model = make_gpt()
    tokens = make_tokens(1)[0].cuda()
    with torch.no_grad():
        expected = make_gpt().cuda()(tokens)
    hooks = [
        (len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
    ]
    with stream_parameters(model) as handle:
        model.loss(tokens).backward()
    handle.remove()
    assert hooks == [
        (len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
    ]
    assert not any("_apply" in module.__dict__ for module in model.modules())
    model.cuda()
    assert all(parameter.is_cuda for parameter in model.parameters())
    assert torch.equal(model(tokens), expected)
    stream_parameters(model)
    assert torch.equal(model(tokens), expected)


def test_remove_during_forward_raises_and_backward_after_remove_raises() -> None:
    model = stack()
    handle = stream_parameters(model)
    hook = model[0][1].register_forward_hook(lambda *_: handle.remove())
    with pytest.raises(StateError, match="forward or backward runs"):
        model(inputs())
    hook.remove()
    with pytest.raises(KeyboardInterrupt), stream_parameters(stack()):
        raise KeyboardInterrupt
    output = model(inputs())
    handle.remove()
    with pytest.raises(StateError, match="streamed"):
        output.sum().backward()


def test_stats() -> None:
    model = make_gpt(layers=4)
    block_bytes = sum(parameter.nbytes for parameter in model.blocks[0].parameters())
    handle = stream_parameters(model, resident=1)
    stats = handle.stats
    assert (stats.blocks_streamed, stats.blocks_resident) == (3, 1)
    assert 3 * block_bytes <= stats.streamed_bytes < 3 * block_bytes + 3 * 16 * 512
    outside = model.embedding.weight.nbytes + 2 * model.norm.weight.nbytes
    assert stats.resident_bytes == block_bytes + outside
    assert stats.fetched_bytes == 0
    model.loss(make_tokens(1)[0].cuda()).backward()
    stats = handle.stats
    # Forward fetches three blocks; the last two are still there when backward begins.
    assert stats.fetches == 4
    assert stats.fetched_bytes == 4 * stats.streamed_bytes // 3
    assert stats.gradient_bytes == 3 * block_bytes
    assert stats.waits == 0


def test_a_model_dropped_without_remove_is_collected() -> None:
    model = stack()
    stream_parameters(model)
    model(inputs()).sum().backward()
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_device_copies_of_a_dropped_model_are_given_back() -> None:
    def drop_one() -> None:
        model = stack()
        stream_parameters(model)
        model(inputs()).sum().backward()

    def held() -> tuple[int, int]:
        for _ in range(3):  # What one collection finalizes, the next one frees.
            gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), emulator.live().events

    drop_one()
    gc.collect()
    torch.cuda.empty_cache()
    drop_one()
    before = held()
    for _ in range(3):
        drop_one()
    assert held() == before


# ---- clear errors ------------------------------------------------------------------------------


def test_replaced_parameters_raise() -> None:
    model = stack()
    stream_parameters(model)
    model[0][1].weight = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(StateError, match=r"'0\.1\.weight' was replaced"):
        model(inputs())


def test_weights_moved_behind_our_back_raise() -> None:
    model = stack()
    stream_parameters(model)
    model[0][1].weight.data = torch.zeros(8, 8, device="cuda")
    with pytest.raises(StateError, match=r"'0\.1\.weight' became torch.float32 on cuda"):
        model(inputs())


def test_weights_changed_by_their_own_forward_raise() -> None:
    class Clamped(nn.Linear):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.weight.clamp_(-0.1, 0.1)
            return super().forward(value)

    model = nn.Sequential(nn.Sequential(Clamped(8, 8), Clamped(8, 8)))
    stream_parameters(model)
    with pytest.raises(StateError, match="in place"):
        model(inputs())


def test_copies_hold_weights_but_do_not_run() -> None:
    model = stack()
    stream_parameters(model)
    twin = copy.deepcopy(model)
    assert_same(weights_of(twin), weights_of(model))
    with pytest.raises(StateError, match="is a copy"):
        twin(inputs())
    with pytest.raises(StateError, match="is a copy"):
        twin.cuda()
    with pytest.raises(StateError, match="state_dict"):
        pickle.dumps(model)


def test_tensor_hooks_raise() -> None:
    model = stack()
    stream_parameters(model)
    model[0][0].weight.register_hook(lambda gradient: gradient)
    with pytest.raises(StateError, match="tensor hook"):
        model(inputs())


def test_create_graph_raises() -> None:
    model = stack()
    stream_parameters(model)
    with pytest.raises(StateError, match="create_graph"):
        model(inputs()).square().sum().backward(create_graph=True)
