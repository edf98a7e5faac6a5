"""Optimizers whose state is on disk: the same bits as on the host, commits, resuming, faults."""

from __future__ import annotations

import copy
import errno
import io
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from host_cases import CLASSES, Pair, copies, make_weights, masters, step
from torch import nn

import spillover
from spillover import ConfigError, CorruptData, DiskFull, HostOutOfMemory, HostPool, StateError
from spillover.emulator import StorageFault, faults
from spillover.optim import AdamW, _disk_layout, _staging, resume

each_class = pytest.mark.parametrize("pair", CLASSES, ids=str)
each_moments = pytest.mark.parametrize("moments", ["float32", "bfloat16", "blockwise8"])


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """State then passes in more units than the ring has, and weights in several slots."""
    monkeypatch.setattr(_disk_layout, "UNIT_BYTES_MAX", 4 << 10)
    monkeypatch.setattr(_staging, "_SLOT_BYTES_MAX", 4 << 10)
    monkeypatch.setattr(_staging, "_stagings", {})


def on_disk(pair: Pair, weights: list[nn.Parameter], folder: Path, **options: Any) -> Any:
    options = {"tier": "disk", "directory": folder, **pair.options, **options}
    return pair.ours(weights, **options)


def run(optimizer: Any, weights: list[nn.Parameter], numbers: range, dtype: torch.dtype) -> None:
    for number in numbers:
        step(optimizer, weights, number, dtype)


def assert_equal_state(one: Any, other: Any) -> None:
    """Bit for bit."""
    first, second = one.state_dict(), other.state_dict()
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for key, entry in first["state"].items():
        assert entry.keys() == second["state"][key].keys()
        for name, value in entry.items():
            assert torch.equal(value, second["state"][key][name]), (key, name)


# ---- equality ----------------------------------------------------------------------------------


@each_class
@each_moments
@pytest.mark.parametrize(
    ("dtype", "device", "master"),
    [
        (torch.float32, "cuda", "float32"),
        (torch.bfloat16, "cuda", "float32"),
        (torch.bfloat16, "cpu", "split"),
        (torch.float16, "cpu", "float32"),
    ],
)
def test_disk_and_auto_are_the_host_tier_bit_for_bit(
    pair: Pair, moments: str, dtype: torch.dtype, device: str, master: str, tmp_path: Path
) -> None:
    form = {"moments": moments, "master": master}
    weights = make_weights(dtype, device)
    others, twins = copies(weights), copies(weights)
    host = pair.ours(weights, **pair.options, **form)
    disk = on_disk(pair, others, tmp_path / "disk", commit_every=2, **form)
    auto = on_disk(pair, twins, tmp_path / "auto", tier="auto", host_budget=9000, **form)
    for optimizer, chosen in ((host, weights), (disk, others), (auto, twins)):
        run(optimizer, chosen, range(2), dtype)
        with torch.no_grad():  # What something else writes is the master from then on.
            chosen[1][:50].fill_(0.5)
        run(optimizer, chosen, range(2, 4), dtype)
    for optimizer, chosen in ((disk, others), (auto, twins)):
        assert all(map(torch.equal, weights, chosen))
        assert all(map(torch.equal, masters(host, weights), masters(optimizer, chosen)))
        assert_equal_state(host, optimizer)
    assert disk.stats().host_bytes == 0
    assert 0 <= auto.stats().host_bytes <= 9000


@pytest.mark.parametrize("offloads", [False, True])
def test_overlap_and_offloaded_gradients(offloads: bool, tmp_path: Path) -> None:
    def train(**options: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3)).to("cuda")
        optimizer = AdamW(
            model.parameters(), lr=0.1, offload_gradients=offloads, overlap=model, **options
        )
        for seed in range(4):
            value = torch.randn(8, 40, generator=torch.Generator().manual_seed(seed)).cuda()
            model(value).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.synchronize()
        return [parameter.detach().cpu() for parameter in model.parameters()]

    assert all(map(torch.equal, train(), train(tier="disk", directory=tmp_path, commit_every=3)))


@each_class
@each_moments
def test_checkpoints_go_both_ways(pair: Pair, moments: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16
    weights = make_weights(dtype, "cpu")
    first = pair.ours(weights, **pair.options, moments=moments)
    run(first, weights, range(2), dtype)
    form = {"moments": moments, "master": "split"}
    chosen = [copies(weights), copies(weights)]
    host = pair.ours(chosen[0], **pair.options, **form)
    disk = on_disk(pair, chosen[1], tmp_path / "a", **form)
    for optimizer, its_weights in zip((host, disk), chosen, strict=True):
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        optimizer.load_state_dict(torch.load(file, weights_only=True))
        run(optimizer, its_weights, range(2, 3), dtype)
    assert_equal_state(host, disk)

    others = copies(chosen[1])
    again = on_disk(pair, others, tmp_path / "b", **form)
    again.load_state_dict(disk.state_dict())
    assert_equal_state(host, again)
    for optimizer, its_weights in ((host, chosen[0]), (again, others)):
        run(optimizer, its_weights, range(3, 5), dtype)
    assert_equal_state(host, again)


def test_a_large_checkpoint_is_in_files_and_can_be_mapped(tmp_path: Path) -> None:
    weights = [nn.Parameter(torch.ones(700, 500))]
    weights[0].grad = torch.full((700, 500), 0.5)
    optimizer = AdamW(weights, tier="disk", directory=tmp_path / "a", commit_every=None)
    optimizer.step()
    state = optimizer.state_dict()
    maps = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "a") in maps
    torch.save(state, tmp_path / "state.pt")
    twins = copies(weights)
    twins[0].grad = weights[0].grad
    other = AdamW(twins, tier="disk", directory=tmp_path / "b", commit_every=None)
    other.load_state_dict(torch.load(tmp_path / "state.pt", mmap=True))
    optimizer.step()
    other.step()
    assert torch.equal(weights[0], twins[0])
    assert torch.equal(state["state"][0]["exp_avg"], torch.full((700, 500), 0.05))
    with (
        faults(storage=[StorageFault("read", error="EIO", times=None)]),
        pytest.raises(spillover.StorageError),
    ):
        optimizer.state_dict()


# ---- commits -----------------------------------------------------------------------------------


def make_trained(
    folder: Path | list[Path], seed: int = 0, **options: Any
) -> tuple[nn.Module, AdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(20, 60), nn.BatchNorm1d(60), nn.Dropout(0.3), nn.Linear(60, 3)
    ).to("cuda")
    model[3].bias.requires_grad_(False)
    options = {"tier": "disk", "directory": folder, "module": model, "lr": 0.1, **options}
    return model, AdamW(model.named_parameters(), **options)


def train(model: nn.Module, optimizer: Any, scheduler: Any = None) -> None:
    value = torch.randn(16, 20, device="cuda") * random.random()
    model(value).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    if scheduler is not None:
        scheduler.step()


@pytest.mark.parametrize("tier", ["disk", "auto"])
def test_who_resumes_ends_where_the_run_that_went_on_ends(tier: str, tmp_path: Path) -> None:
    options = {"tier": tier, "commit_every": None}
    model, optimizer = make_trained(tmp_path, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    assert resume(tmp_path) is None
    random.seed(7)
    for _ in range(3):
        train(model, optimizer, scheduler)
    extra = {"scheduler": scheduler.state_dict(), "place": (3, [1.5], b"x", None)}
    assert optimizer.commit(extra) == 1
    for _ in range(2):
        train(model, optimizer, scheduler)
    expected = copy.deepcopy(model.state_dict())
    optimizer.close()  # As the end of the process does.

    model, optimizer = make_trained(tmp_path, seed=5, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    random.seed(8)
    with pytest.raises(StateError, match="resume"):
        train(model, optimizer)
    resumed = resume(tmp_path, optimizer)
    assert resumed is not None
    assert resumed.step == 3
    assert resumed.extra == extra
    scheduler.load_state_dict(resumed.extra["scheduler"])
    optimizer.zero_grad()
    for _ in range(2):
        train(model, optimizer, scheduler)
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_steps_commit_by_themselves_and_may_be_taken_back(tmp_path: Path) -> None:
    model, optimizer = make_trained(tmp_path, commit_every=2)
    before: dict[str, Any] = {}
    for number in range(5):
        train(model, optimizer)
        if number == 3:
            before = copy.deepcopy(model.state_dict())
    resumed = resume(tmp_path, optimizer)
    assert resumed is not None
    assert (resumed.step, resumed.extra) == (4, None)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_what_is_there_already_is_not_overwritten(tmp_path: Path) -> None:
    model, optimizer = make_trained(tmp_path, commit_every=1)
    train(model, optimizer)
    optimizer.close()
    with pytest.raises(ConfigError, match="other parameters or options"):
        AdamW([nn.Parameter(torch.ones(10))], tier="disk", directory=tmp_path)
    model, optimizer = make_trained(tmp_path)
    with pytest.raises(StateError, match="holds a commit of AdamW that was not resumed"):
        optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(StateError, match="choose another directory"):
        optimizer.commit()
    with pytest.raises(StateError, match="no optimizer of this process"):
        resume(tmp_path / "elsewhere")


def test_a_directory_is_known_by_its_other_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        (tmp_path / f"link to {folder.name}").symlink_to(folder)
    links = [tmp_path / "link to one", tmp_path / "link to two"]
    model, optimizer = make_trained(links, commit_every=1)
    train(model, optimizer)
    monkeypatch.chdir(tmp_path)
    for names in (links, folders, folders[::-1], ["one", "link to two"]):
        assert resume(names) is not None
    for names in (links[:1], [*folders, tmp_path], [tmp_path / "three", *links[1:]]):
        with pytest.raises(StateError, match="no optimizer of this process"):
            resume(names)


# ---- errors ------------------------------------------------------------------------------------


def test_options_that_do_not_fit() -> None:
    weights = make_weights()
    for options, message in (
        ({"tier": "disk"}, "needs directory"),
        ({"directory": "x"}, "directory is for"),
        ({"tier": "disk", "directory": "x", "host_budget": "1GiB"}, "host_budget"),
        ({"tier": "disk", "directory": "x", "commit_every": 0}, "commit_every=0"),
        ({"tier": "nowhere"}, "'host', 'disk' or 'auto'"),
        ({"tier": "device"}, "torch.optim.AdamW"),
    ):
        with pytest.raises(ConfigError, match=message):
            AdamW(weights, **options)  # type: ignore[arg-type]


def test_room_is_looked_for_before_training(tmp_path: Path) -> None:
    weights = make_weights()
    with pytest.raises(HostOutOfMemory, match=r"pinned host memory.*bytes on disk"):
        AdamW(weights, tier="disk", directory=tmp_path, pool=HostPool(limit=8 << 10))
    full = StorageFault("allocate", error="ENOSPC", times=None)
    with faults(storage=[full]), pytest.raises(DiskFull, match=r"bytes of pinned host.*on disk"):
        AdamW(weights, tier="disk", directory=tmp_path)
    assert not [each for each in tmp_path.rglob("*") if each.stat().st_size > 4096]
    count = sum(weight.numel() for weight in weights)
    stats = AdamW(weights, tier="disk", directory=tmp_path / "next").stats()
    # Two slots of two moments and the weight, and what aligns them.
    assert 2 * 12 <= stats.bytes_per_parameter["disk"] <= 2 * 12 + 2 * 64 * 12 / count
    assert stats.bytes_per_parameter["host"] == stats.bytes_per_parameter["device"] == 0


@pytest.mark.parametrize(
    ("moments", "moment_bytes"), [("float32", 4.0), ("bfloat16", 2.0), ("blockwise8", 1.015625)]
)
@pytest.mark.parametrize(
    ("dtype", "master", "master_bytes"),
    [
        (torch.float32, "float32", 0),
        (torch.float16, "float32", 4),
        (torch.bfloat16, "float32", 4),
        (torch.bfloat16, "split", 2),
    ],
)
@pytest.mark.parametrize("pair", CLASSES[1:3], ids=str)
def test_bytes_per_parameter_are_those_of_the_documentation(
    pair: Pair,
    moments: str,
    moment_bytes: float,
    dtype: torch.dtype,
    master: str,
    master_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_disk_layout, "UNIT_BYTES_MAX", 16 << 20)
    moment_count = 2 if pair.name.startswith("adam") else 1
    state = moment_count * moment_bytes + master_bytes
    disk = 2 * state + 2 * dtype.itemsize
    for options, expected in (
        ({}, {"device": 0, "host": state, "disk": 0}),
        ({"tier": "disk"}, {"device": 0, "host": 0, "disk": disk}),
        ({"tier": "auto"}, {"device": 0, "host": state, "disk": disk}),
    ):
        weights = [nn.Parameter(torch.zeros(512, 512, dtype=dtype)) for _ in range(2)]
        folder = {"directory": tmp_path / str(options)} if options else {}
        form = {"moments": moments, "master": master}
        optimizer = pair.ours(weights, **pair.options, **form, **options, **folder)
        assert optimizer.stats().bytes_per_parameter == expected


@pytest.mark.parametrize("operation", ["read", "write"])
def test_a_step_whose_disk_fails_is_repeated(operation: str, tmp_path: Path) -> None:
    weights = make_weights(torch.bfloat16)
    twins = copies(weights)
    host = AdamW(twins, lr=0.1)
    optimizer = AdamW(weights, lr=0.1, tier="disk", directory=tmp_path, commit_every=None)
    run(host, twins, range(3), torch.bfloat16)
    run(optimizer, weights, range(2), torch.bfloat16)
    # Else the fault may strike a write that is still under way; the next step repeats those.
    optimizer.commit()

    def last_step() -> None:
        run(optimizer, weights, range(2, 3), torch.bfloat16)
        optimizer.commit()

    fault = StorageFault(operation, error="EIO", times=1)
    with faults(storage=[fault]), pytest.raises(spillover.StorageError) as caught:
        last_step()
    assert caught.value.errno == errno.EIO
    # A write may fail when the step is over, in the commit.
    if caught.value.__dict__.get("__notes__"):
        optimizer.step()
    optimizer.commit()
    assert all(map(torch.equal, weights, twins))
    assert all(map(torch.equal, masters(optimizer, weights), masters(host, twins)))


def test_a_commit_that_fails_can_be_taken_back(tmp_path: Path) -> None:
    weights = make_weights(torch.bfloat16)
    optimizer = AdamW(weights, tier="disk", directory=tmp_path, commit_every=1)
    run(optimizer, weights, range(1), torch.bfloat16)
    values = copies(weights)
    with (
        faults(storage=[StorageFault("sync", error="EIO", times=None)]),
        pytest.raises(spillover.StorageError) as caught,
    ):
        run(optimizer, weights, range(1, 2), torch.bfloat16)
    assert "must not be repeated" in caught.value.__notes__[-1]
    with pytest.raises(spillover.StorageError, match="a commit failed"):
        run(optimizer, weights, range(2, 3), torch.bfloat16)
    resumed = resume(tmp_path, optimizer)
    assert resumed is not None
    assert resumed.step == 1
    assert all(map(torch.equal, weights, values))
    twins = make_weights(torch.bfloat16)
    host = AdamW(twins)
    run(host, twins, range(2), torch.bfloat16)
    run(optimizer, weights, range(1, 2), torch.bfloat16)
    assert all(map(torch.equal, masters(optimizer, weights), masters(host, twins)))


def test_a_disk_that_is_full_keeps_what_was_committed(tmp_path: Path) -> None:
    weights = make_weights()
    optimizer = AdamW(weights, tier="disk", directory=tmp_path, commit_every=1, write_limit=150_000)
    values: list[nn.Parameter] = []

    def train_until_it_is_full() -> None:
        for number in range(9):
            run(optimizer, weights, range(number, number + 1), torch.float32)
            values[:] = copies(weights)

    with pytest.raises(DiskFull, match="write"):
        train_until_it_is_full()
    assert values
    optimizer.close()
    others = make_weights(seed=3)
    fresh = AdamW(others, tier="disk", directory=tmp_path, commit_every=1)
    resumed = fresh.resume()
    assert resumed is not None
    assert resumed.step > 0
    assert all(map(torch.equal, others, values))


def test_a_bit_that_flips_is_found_and_the_last_commit_is_kept(tmp_path: Path) -> None:
    weights = make_weights()
    optimizer = AdamW(weights, tier="disk", directory=tmp_path, commit_every=1)
    run(optimizer, weights, range(1), torch.float32)
    flipped = StorageFault("read", "flip", times=5)
    with faults(storage=[flipped]), pytest.raises(CorruptData):
        run(optimizer, weights, range(1, 2), torch.float32)
    optimizer.step()
    twins = make_weights()
    host = AdamW(twins)
    run(host, twins, range(2), torch.float32)
    assert all(map(torch.equal, weights, twins))


def test_what_is_not_done_with_state_on_disk_says_so(tmp_path: Path) -> None:
    weights = make_weights()
    optimizer = AdamW(weights, tier="disk", directory=tmp_path)
    with pytest.raises(StateError, match="cannot be copied or pickled"):
        copy.deepcopy(optimizer)
    with pytest.raises(StateError, match="tier='disk'"):
        AdamW(weights).commit()
    with pytest.raises(ConfigError, match="a commit cannot hold a object"):
        optimizer.commit({"what": object()})
    assert spillover.stats().others["optimizer"]


# ---- what a program does beside ----------------------------------------------------------------


def two_alike(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40)).to("cuda")


def test_a_frozen_weight_that_is_written_through_data_is_committed(tmp_path: Path) -> None:
    model, optimizer = make_trained(tmp_path, commit_every=1)
    train(model, optimizer)
    model[3].bias.data.fill_(7.0)  # Changes no version of the parameter.
    train(model, optimizer)
    optimizer.close()
    model, optimizer = make_trained(tmp_path, seed=4)
    optimizer.resume()
    assert torch.equal(model[3].bias.cpu(), torch.full((3,), 7.0))


def test_weights_of_one_shape_in_another_order_are_refused(tmp_path: Path) -> None:
    model = two_alike()
    optimizer = AdamW(model.named_parameters(), tier="disk", directory=tmp_path)
    optimizer.commit()
    optimizer.close()
    named = list(two_alike().named_parameters())
    other = AdamW([*named[2:], *named[:2]], tier="disk", directory=tmp_path)
    with pytest.raises(ConfigError, match=r"another order.*0\.weight"):
        other.resume()
    other.close()
    # A wrapper such as torch.compile's gives all of them other names.
    renamed = [(f"_orig_mod.{name}", each) for name, each in named]
    assert AdamW(renamed, tier="disk", directory=tmp_path).resume() is not None


@pytest.mark.parametrize("tier", ["disk", "auto"])
def test_one_that_is_closed_changes_nothing_and_is_not_found(tier: str, tmp_path: Path) -> None:
    closed = []
    for number in range(8):
        model, optimizer = make_trained(tmp_path, tier=tier, commit_every=None)
        # Whether anything was committed or not.
        assert (resume(tmp_path) is None) == (number == 0)
        optimizer.commit()
        optimizer.close()
        optimizer.close()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(StateError, match="closed"):
            train(model, optimizer)
        for call in (optimizer.commit, optimizer.resume):
            with pytest.raises(StateError, match="closed"):
                call()
        after = model.state_dict()
        assert all(
            torch.equal(after[name], value)
            for name, value in before.items()
            if "running" not in name and "num_batches" not in name
        )
        closed.append(optimizer)
    with pytest.raises(StateError, match="no optimizer of this process"):
        resume(tmp_path)


@pytest.mark.parametrize("commit_every", [None, 2])
def test_a_step_that_is_finished_after_a_failure_counts_once(
    commit_every: int | None, tmp_path: Path
) -> None:
    model = two_alike()
    optimizer = AdamW(
        model.parameters(),
        tier="disk",
        directory=tmp_path,
        commit_every=commit_every,
        overlap=model,
    )

    def backward() -> None:
        optimizer.zero_grad()
        model(torch.ones(4, 40, device="cuda")).square().sum().backward()

    def last_step() -> None:
        optimizer.step()
        optimizer.synchronize()

    backward()
    last_step()
    backward()
    fault = StorageFault("read", error="EIO", times=1)
    with faults(storage=[fault]), pytest.raises(spillover.StorageError) as caught:
        last_step()
    assert not any("must not be repeated" in each for each in caught.value.__notes__)
    optimizer.synchronize()
    optimizer.commit()  # It is complete.
    optimizer.step()
    optimizer.commit()
    assert float(optimizer.state[model[0].weight]["step"]) == 2
    resumed = optimizer.resume()
    assert resumed is not None
    assert resumed.step == 2


def test_buffers_that_have_no_place_are_named(tmp_path: Path) -> None:
    model, optimizer = make_trained(tmp_path)
    before = model[1].running_mean
    for value in (torch.ones(30, device="cuda"), torch.ones(90, device="cuda")):
        model[1].running_mean = value
        with pytest.raises(ConfigError, match=r"running_mean.*when the optimizer was made"):
            optimizer.commit()
    model[1].running_mean = before
    model.register_buffer("late", torch.ones(3))
    with pytest.raises(ConfigError, match=r"late.*when the optimizer was made"):
        optimizer.commit()
