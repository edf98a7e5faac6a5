"""``spillover.DurableStore`` on files that somebody damaged: found, named, healed if possible."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from durable_cases import ENTRIES, EXTENT, FILE, Open, assert_holds, get, put, some

import spillover
from spillover import CorruptData, DurableStore, StorageError


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def damage(folder: Path, where: str) -> None:
    """Flip a bit of the primary's file, of which the table has one block."""
    manifest_bytes = 4096 * 257
    offsets = {
        "header": [100],
        "table": [4100],
        "first": [8200],
        "second": [12300],
        "both": [8200, 12300],
        "manifest": [16384 + manifest_bytes + 3],  # The second slot, which has commit 1.
    }
    for offset in offsets[where]:
        flip(folder / FILE, offset)


@pytest.mark.parametrize("where", ["header", "table", "both", "manifest"])
def test_damage_is_never_taken_for_a_crash(
    open_store: Open, folders: list[Path], where: str
) -> None:
    with open_store() as store:
        put(store, 1)
        store.commit()
    damage(folders[0], where)
    with pytest.raises(CorruptData, match="does not check out") as caught:
        open_store()
    assert caught.value.filename == str(folders[0])
    DurableStore.delete(folders)
    assert [*folders[0].iterdir(), *folders[1].iterdir()] == []


@pytest.mark.parametrize("where", ["first", "second"])
def test_one_damaged_record_is_healed(open_store: Open, folders: list[Path], where: str) -> None:
    with open_store() as store:
        put(store, 1)
        store.commit()
    damage(folders[0], where)
    with open_store() as store:
        assert store.sequence == 1
    damage(folders[0], "second" if where == "first" else "first")
    store = open_store()
    assert store.sequence == 1
    assert_holds(store, dict.fromkeys(ENTRIES, 1))


def test_damaged_data_is_found_and_named(open_store: Open, folders: list[Path]) -> None:
    with open_store() as store:
        put(store, 1)
        store.commit()
    data = some("weight", 1)[EXTENT : EXTENT + 64]  # In the second folder.
    path = folders[1] / FILE
    flip(path, path.read_bytes().index(data))
    store = open_store()
    for act in (lambda: get(store, "weight"), store.verify):
        with pytest.raises(CorruptData, match="entry 'weight'") as caught:
            act()
        assert caught.value.filename == str(folders[1])
    assert_holds(store, {"bias": 1, "flag": 1})
    put(store, 2, "weight")
    store.commit()
    store.verify()


def test_newer_format_is_an_error(tmp_path: Path) -> None:
    DurableStore(tmp_path, {"a": 1}).close()
    path = tmp_path / FILE
    block = bytearray(path.read_bytes()[:4092])
    block[8] = 2
    block += spillover._core.crc32c(block).to_bytes(4, "little")
    with path.open("r+b") as file:
        file.write(block)
    with pytest.raises(StorageError, match="format version 2") as caught:
        DurableStore(tmp_path)
    assert caught.value.errno == errno.ENOTSUP
