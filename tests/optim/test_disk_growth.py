"""State on disk of parameters that come later: groups that are added, weights that were frozen."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from host_cases import CLASSES, Pair, copies, make_weights, recorded
from torch import nn

from spillover import ConfigError, DiskFull, DurableStore, StateError, StorageError
from spillover.emulator import StorageFault, faults
from spillover.optim import AdamW, _disk_layout, resume

each_class = pytest.mark.parametrize("pair", CLASSES, ids=str)
#: Those that are trained from the start.
OLD = slice(2, None)
Add = Callable[[Any, list[nn.Parameter]], None]


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """State is in several units then."""
    monkeypatch.setattr(_disk_layout, "UNIT_BYTES_MAX", 4 << 10)


def on_disk(weights: list[nn.Parameter], folder: Path | list[Path], **options: Any) -> AdamW:
    return AdamW(weights, tier="disk", directory=folder, **{"commit_every": None, **options})


def run(
    optimizer: Any, weights: list[nn.Parameter], numbers: range, trained: slice = slice(None)
) -> None:
    """Steps with recorded gradients, of those that are trained."""
    for number in numbers:
        pairs = list(zip(weights, recorded(number, weights[0].dtype), strict=True))
        for weight, gradient in pairs[trained]:
            weight.grad = gradient.to(weight.device, weight.dtype)
        optimizer.step()


def leave_a_commit(folder: Path) -> list[nn.Parameter]:
    """What it has."""
    weights = make_weights()
    with contextlib.closing(on_disk(weights, folder)) as optimizer:
        run(optimizer, weights, range(1))
        optimizer.commit()
    return weights


def state_of(optimizer: Any) -> list[torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return [value.clone() for key in sorted(state) for value in state[key].values()]


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder).parent) for path in folder.rglob("*") if path.is_file()}


def freeze(weights: list[nn.Parameter], is_frozen: bool = True) -> None:
    for weight in weights[:2]:
        weight.requires_grad_(not is_frozen)


def add_as_group(optimizer: Any, weights: list[nn.Parameter]) -> None:
    optimizer.add_param_group({"params": weights[:2], "lr": 0.01})


def thaw(optimizer: Any, weights: list[nn.Parameter]) -> None:
    freeze(weights, is_frozen=False)


def begin(add: Add, weights: list[nn.Parameter], make: Callable[..., Any]) -> Any:
    """An optimizer that does not train the first two yet."""
    if add is add_as_group:
        return make(weights[2:])
    freeze(weights)
    return make(weights)


each_way = pytest.mark.parametrize("add", [add_as_group, thaw])


@each_class
@each_way
@pytest.mark.parametrize(
    ("dtype", "form"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"moments": "blockwise8"}),
        (torch.bfloat16, {"moments": "bfloat16", "master": "split"}),
    ],
    ids=["float32", "blockwise8", "split"],
)
@pytest.mark.parametrize("tier", ["disk", "auto"])
def test_what_comes_later_is_trained_as_on_the_host(
    pair: Pair, add: Add, dtype: torch.dtype, form: dict[str, Any], tier: str, tmp_path: Path
) -> None:
    device = "cpu" if "master" in form else "cuda"

    def train(**options: Any) -> list[torch.Tensor]:
        weights = make_weights(dtype, device)
        optimizer = begin(
            add, weights, lambda some: pair.ours(some, **pair.options, **form, **options)
        )
        run(optimizer, weights, range(3), OLD)
        add(optimizer, weights)
        run(optimizer, weights, range(3, 7))
        return [*(weight.detach() for weight in weights), *state_of(optimizer)]

    budget = {"host_budget": 9000} if tier == "auto" else {}
    found = train(tier=tier, directory=tmp_path, commit_every=2, **budget)
    assert all(map(torch.equal, train(), found))


@each_way
@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
def test_a_new_process_goes_on(add: Add, early: bool, tmp_path: Path) -> None:
    """Where it trains all from the start, or gets to do so as the first one did."""
    weights = make_weights()
    host = begin(add, weights, AdamW)
    run(host, weights, range(2), OLD)
    add(host, weights)
    run(host, weights, range(2, 6))

    first = make_weights()
    optimizer = begin(add, first, lambda some: on_disk(some, tmp_path))
    run(optimizer, first, range(2), OLD)
    optimizer.commit()
    add(optimizer, first)
    run(optimizer, first, range(2, 4))
    optimizer.commit({"at": 4})
    run(optimizer, first, range(4, 5))  # Is forgotten.
    optimizer.close()

    second = make_weights(seed=9)
    optimizer = begin(add, second, lambda some: on_disk(some, tmp_path))
    if add is add_as_group or early:
        add(optimizer, second)
    with pytest.raises(StateError, match="was not resumed"):
        run(optimizer, second, range(1), OLD)
    resumed = resume(tmp_path)
    assert resumed is not None
    assert (resumed.step, resumed.extra) == (4, {"at": 4})
    if add is thaw and not early:
        add(optimizer, second)
    run(optimizer, second, range(4, 6))
    assert all(map(torch.equal, weights, second))
    assert all(map(torch.equal, state_of(host), state_of(optimizer)))
    optimizer.commit()
    optimizer.close()

    # And once more, as everything is where it was.
    third = make_weights(seed=10)
    optimizer = begin(add, third, lambda some: on_disk(some, tmp_path))
    if add is add_as_group:
        add(optimizer, third)
    optimizer.resume()
    assert all(map(torch.equal, weights, third))
    assert all(map(torch.equal, state_of(host), state_of(optimizer)))


@each_way
def test_the_last_commit_counts_until_there_is_another(add: Add, tmp_path: Path) -> None:
    weights = make_weights()
    optimizer = begin(add, weights, lambda some: on_disk(some, tmp_path))
    run(optimizer, weights, range(2), OLD)
    optimizer.commit()
    values = copies(weights)
    add(optimizer, weights)
    run(optimizer, weights, range(2, 4))
    assert len(files_of(tmp_path)) == 2
    optimizer.close()

    others = make_weights(seed=9)
    optimizer = begin(add, others, lambda some: on_disk(some, tmp_path))
    resumed = optimizer.resume()
    assert resumed is not None
    assert resumed.step == 2
    assert all(map(torch.equal, values[2:], others[2:]))
    assert files_of(tmp_path) == {"."}
    add(optimizer, others)
    run(optimizer, others, range(2, 3))
    optimizer.commit()
    assert files_of(tmp_path) == {"spillover.generation-1"}


def test_a_store_that_was_not_finished_is_removed(tmp_path: Path) -> None:
    weights = leave_a_commit(tmp_path)
    unfinished = tmp_path / "spillover.generation-1"
    unfinished.mkdir()
    (unfinished / "spillover.durable.new").write_bytes(bytes(100_000))
    others = make_weights(seed=9)
    on_disk(others, tmp_path).resume()
    assert all(map(torch.equal, weights, others))
    assert not unfinished.exists()


def test_going_back_to_before_weights_were_thawed(tmp_path: Path) -> None:
    weights = make_weights()
    freeze(weights)
    optimizer = on_disk(weights, tmp_path)
    run(optimizer, weights, range(2), OLD)
    optimizer.commit()
    before, state = copies(weights), state_of(optimizer)
    thaw(optimizer, weights)
    run(optimizer, weights, range(2, 4))
    after = copies(weights)
    resumed = optimizer.resume()
    assert resumed is not None
    assert all(map(torch.equal, before, weights))
    assert all(map(torch.equal, state, state_of(optimizer)))
    run(optimizer, weights, range(2, 4))
    assert all(map(torch.equal, after, weights))


def test_a_group_that_the_commit_lacks_is_added_after_resuming(tmp_path: Path) -> None:
    weights = make_weights()
    optimizer = on_disk(weights[2:], tmp_path)
    run(optimizer, weights, range(2), OLD)
    optimizer.commit()
    add_as_group(optimizer, weights)
    with pytest.raises(ConfigError, match=r"is of 2 parameters, and the optimizer has 4"):
        optimizer.resume()
    values = copies(weights)
    run(optimizer, weights, range(2, 3))  # Nothing was lost.
    del optimizer.param_groups[-1]
    optimizer.resume()
    assert all(map(torch.equal, values[2:], weights[2:]))
    optimizer.close()
    others = make_weights(seed=9)
    optimizer = on_disk(others[2:], tmp_path)
    optimizer.resume()
    assert all(map(torch.equal, weights[2:], others[2:]))


def test_groups_that_come_one_by_one(tmp_path: Path) -> None:
    weights = make_weights()
    optimizer = on_disk(weights[:1], [tmp_path / "a", tmp_path / "b"], commit_every=1)
    for count in range(1, len(weights)):
        run(optimizer, weights, range(count, count + 1), slice(count))
        optimizer.add_param_group({"params": weights[count]})
    optimizer.step()
    assert files_of(tmp_path) == {
        f"{name}/spillover.generation-{len(weights) - 1}" for name in "ab"
    }
    optimizer.close()
    others = make_weights(seed=9)
    again = on_disk(others[:1], [tmp_path / "b", tmp_path / "a"])
    for weight in others[1:]:
        again.add_param_group({"params": weight})
    again.resume()
    assert all(map(torch.equal, weights, others))


@pytest.mark.parametrize("is_there", [True, False], ids=["mount_point", "link"])
@pytest.mark.parametrize("is_committed", [True, False], ids=["committed", "not_yet"])
def test_a_folder_that_is_lost_is_named_and_nothing_is_removed(
    is_there: bool, is_committed: bool, tmp_path: Path
) -> None:
    """Whether something can be made in its place, or not."""
    folders = [tmp_path / "a", tmp_path / "b"]
    (tmp_path / "disk").mkdir()
    folders[1].symlink_to(tmp_path / "disk")
    weights = make_weights()
    optimizer = on_disk(weights[2:], folders)
    run(optimizer, weights, range(1), OLD)
    optimizer.commit()
    values = copies(weights)
    add_as_group(optimizer, weights)
    run(optimizer, weights, range(1, 2))
    if is_committed:
        optimizer.commit()
        values = copies(weights)
    optimizer.close()
    (tmp_path / "disk").rename(tmp_path / "away")
    if is_there:
        (tmp_path / "disk").mkdir()
    with pytest.raises(StorageError, match="lost, or not mounted"):
        on_disk(make_weights()[2:], folders)
    if is_there:
        shutil.rmtree(tmp_path / "disk")
    (tmp_path / "away").rename(tmp_path / "disk")
    others = make_weights(seed=9)
    again = on_disk(others[2:], folders)
    if is_committed:
        add_as_group(again, others)
    again.resume()
    trained = slice(None) if is_committed else OLD
    assert all(map(torch.equal, values[trained], others[trained]))


def test_a_store_of_somebody_else_below_is_left_alone(tmp_path: Path) -> None:
    weights = leave_a_commit(tmp_path)
    below = tmp_path / "spillover.generation-3"
    with DurableStore(below, {"entry": 1}) as store:
        store.write("entry", b"1").wait()
        store.commit()
    with pytest.raises(ConfigError, match="choose another directory"):
        on_disk(make_weights(seed=9), tmp_path)
    DurableStore.delete(below)
    others = make_weights(seed=9)
    on_disk(others, tmp_path).resume()
    assert all(map(torch.equal, weights, others))


def test_resuming_what_was_removed_says_so(tmp_path: Path) -> None:
    weights = make_weights()
    optimizer = on_disk(weights, tmp_path)
    run(optimizer, weights, range(1))
    optimizer.commit()
    shutil.rmtree(tmp_path)
    with pytest.raises(StorageError, match="is not there any more"):
        optimizer.resume()


@each_way
@pytest.mark.parametrize("operation", ["make_folder", "open", "allocate", "write", "read", "sync"])
def test_what_fails_while_places_are_made_changes_nothing(
    add: Add, operation: str, tmp_path: Path
) -> None:
    twins = make_weights()
    host = begin(add, twins, AdamW)
    run(host, twins, range(2), OLD)
    add(host, twins)
    run(host, twins, range(2, 4))

    for call in (1, 2, 3, 5, 8, 13):
        folder = tmp_path / str(call)
        weights = make_weights()
        optimizer = begin(add, weights, lambda some, folder=folder: on_disk(some, folder))
        run(optimizer, weights, range(2), OLD)
        optimizer.commit()
        error = "ENOSPC" if operation in ("allocate", "write") else "EIO"
        fault = StorageFault(operation, error=error, call=call)  # type: ignore[arg-type]
        with faults(storage=[fault]):
            try:
                add(optimizer, weights)
            except StorageError:
                assert len(optimizer.param_groups) == 1
                add(optimizer, weights)
            try:
                run(optimizer, weights, range(2, 3))
            except StorageError:
                optimizer.step()
        run(optimizer, weights, range(3, 4))
        assert all(map(torch.equal, twins, weights)), call
        assert all(map(torch.equal, state_of(host), state_of(optimizer))), call
        optimizer.commit()
        optimizer.close()


def test_too_little_disk_says_how_much_is_needed(tmp_path: Path) -> None:
    weights = make_weights()
    optimizer = on_disk(weights[2:], tmp_path)
    run(optimizer, weights, range(1), OLD)
    full = StorageFault("allocate", error="ENOSPC")
    with (
        faults(storage=[full]),
        pytest.raises(DiskFull, match=r"AdamW needs room for more parameters: \d+ bytes .* disk"),
    ):
        add_as_group(optimizer, weights)
    assert len(optimizer.param_groups) == 1
    assert files_of(tmp_path) == {"."}


def test_a_group_that_is_refused_later_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = make_weights()
    optimizer = on_disk(weights[2:], tmp_path, offload_gradients=True)
    run(optimizer, weights, range(1), OLD)

    def refuse(*arguments: object) -> None:
        raise StateError("not now")

    with monkeypatch.context() as patch:
        patch.setattr(type(optimizer.gradients), "add", refuse)
        with pytest.raises(StateError, match="not now"):
            add_as_group(optimizer, weights)
    run(optimizer, weights, range(1, 2), OLD)
    optimizer.commit()
    optimizer.close()
    values, weights = weights, make_weights(seed=8)
    optimizer = on_disk(weights[2:], tmp_path, offload_gradients=True)
    optimizer.resume()
    assert all(map(torch.equal, values[2:], weights[2:]))
    add_as_group(optimizer, weights)
    run(optimizer, weights, range(2, 3))
    optimizer.commit()
    optimizer.close()
    others = make_weights(seed=9)
    again = on_disk(others[2:], tmp_path)
    add_as_group(again, others)
    again.resume()
    assert all(map(torch.equal, weights, others))


@pytest.mark.parametrize("frozen", [slice(2), slice(1)], ids=["all", "some"])
def test_a_group_of_frozen_weights_is_committed(frozen: slice, tmp_path: Path) -> None:
    weights = make_weights()
    for weight in weights[frozen]:
        weight.requires_grad_(False)
    optimizer = on_disk(weights[2:], tmp_path)
    add_as_group(optimizer, weights)
    run(optimizer, weights, range(2), slice(frozen.stop, None))
    optimizer.commit()
    thaw(optimizer, weights)
    run(optimizer, weights, range(2, 3))
    assert optimizer.commit() == 2
    optimizer.close()
    others = make_weights(seed=9)
    again = on_disk(others[2:], tmp_path)
    add_as_group(again, others)
    again.resume()
    assert all(map(torch.equal, weights, others))
    assert again.commit() == 3


def test_a_parameter_of_the_module_becomes_a_group(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = nn.Module()
        model.weights = nn.ParameterList(make_weights())
        return model

    model = make()
    weights = list(model.parameters())
    optimizer = on_disk(weights[2:], tmp_path, module=model)
    run(optimizer, weights, range(1), OLD)
    optimizer.commit()
    add_as_group(optimizer, weights)
    run(optimizer, weights, range(1, 2))
    optimizer.commit()
    optimizer.close()
    other = make()
    others = list(other.parameters())
    again = on_disk(others[2:], tmp_path, module=other)
    with pytest.raises(ConfigError, match=r"of 4 parameters, .* has 2: call add_param_group\(\)"):
        again.resume()
    add_as_group(again, others)
    again.resume()
    assert all(map(torch.equal, weights, others))


def test_other_groups_than_the_commit_has_are_refused_and_change_nothing(tmp_path: Path) -> None:
    weights = make_weights()
    optimizer = on_disk(weights[2:], tmp_path)
    add_as_group(optimizer, weights)
    run(optimizer, weights, range(1))
    optimizer.commit()
    optimizer.close()
    others = make_weights(seed=9)
    values = copies(others)
    again = on_disk(others[2:], tmp_path)
    for weight in others[:2]:
        again.add_param_group({"params": weight})
    with pytest.raises(ConfigError, match=r"groups of \[2, 2\] parameters, .* of \[2, 1, 1\]"):
        again.resume()
    assert all(map(torch.equal, values, others))


def test_an_old_store_that_cannot_be_removed_is_in_nobodys_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = make_weights()
    optimizer = on_disk(weights[2:], tmp_path)
    run(optimizer, weights, range(1), OLD)
    optimizer.commit()
    add_as_group(optimizer, weights)
    run(optimizer, weights, range(1, 2))
    with faults(storage=[StorageFault("unlink", error="EACCES", times=None)]):
        optimizer.commit()
        assert "is of no more use" in caplog.text
        optimizer.close()
        others = make_weights(seed=9)
        again = on_disk(others[2:], tmp_path)
        add_as_group(again, others)
        again.resume()
    assert all(map(torch.equal, weights, others))
    again.close()
    on_disk(make_weights()[2:], tmp_path)
    assert files_of(tmp_path) == {"spillover.generation-1"}


def test_the_command_finds_the_store_that_counts(tmp_path: Path) -> None:
    def store(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "spillover", "store", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )

    weights = make_weights()
    optimizer = on_disk(weights[2:], tmp_path)
    add_as_group(optimizer, weights)
    run(optimizer, weights, range(1))
    optimizer.commit()
    optimizer.close()
    assert "weight/3" in store("show", str(tmp_path)).stdout
    assert "all checksums are good" in store("verify", str(tmp_path)).stdout
    assert store("delete", "--yes", str(tmp_path)).returncode == 0
    assert files_of(tmp_path) == set()
    assert store("delete", "--yes", str(tmp_path)).returncode == 2


def test_all_that_is_written_counts_for_the_limit(tmp_path: Path) -> None:
    weights = make_weights()
    limit = 3_000_000
    optimizer = on_disk(weights[:1], tmp_path, write_limit=limit)
    written = 0

    def train(count: int, steps: int) -> None:
        for number in range(steps):
            run(optimizer, weights, range(number, number + 1), slice(count))
            optimizer.commit()

    def written_there() -> int:
        assert optimizer._disk is not None
        return optimizer._disk.store.disk.stats().written_bytes

    for count in range(1, len(weights)):
        train(count, 5)
        written += written_there()
        optimizer.add_param_group({"params": weights[count]})
    with pytest.raises(StorageError, match="write_limit"):
        train(len(weights), 1000)
    assert limit - 200_000 < written + written_there() <= limit


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_in_place_of_the_folder_is_named(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file"):
        on_disk(make_weights(), tmp_path / place)
