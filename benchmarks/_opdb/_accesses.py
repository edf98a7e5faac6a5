"""Whether the checker is told what operators really touch, seen from a second stream.

While an operator of ``op_db`` runs, every ATen call below autograd is looked at: which bytes of its
arguments changed, and which results are new. A stream that nothing orders after the call then asks
the checker for access, without touching memory. Reading bytes that changed, or a new result, must
be a hazard: otherwise a write is missing. Reading an argument that neither changed nor is declared
to be written must be none: otherwise a read, or a view, counts as a write.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from spillover.emulator import _libraries

#: Their results have no content yet, so nothing was written.
_UNWRITTEN = {
    "aten::_efficientzerotensor",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::empty_permuted",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::resize_",
    "aten::set_",
}


#: They wait on the host for their result's size or value, which orders everything after them.
_SYNCHRONIZING = {
    "aten::_local_scalar_dense",
    "aten::_to_copy",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::linalg_lstsq",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave",
    "aten::unique_consecutive",
    "aten::unique_dim",
}


def _library() -> ctypes.CDLL:
    library = _libraries.driver()
    pointer = ctypes.c_void_p
    library.spillover_emulator_host_pointer.restype = pointer
    library.spillover_emulator_host_pointer.argtypes = [pointer]
    library.spillover_emulator_operator_begin.argtypes = [
        pointer,
        ctypes.c_char_p,
        ctypes.POINTER(_libraries.Range),
        ctypes.c_size_t,
    ]
    return library


class Audit(TorchDispatchMode):
    """Looks at every ATen call while it is active; ``defects`` says what was wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.defects: list[str] = []
        self._library = _library()
        self._probe_stream = torch.cuda.Stream()

    def __torch_dispatch__(
        self,
        function: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        keywords = kwargs or {}
        arguments = _dense_on_device((args, keywords))
        # From here on only the call below is unordered before the probe stream.
        torch.cuda.synchronize()
        before = {key: self._bytes_of(storage) for key, storage in _storages(arguments).items()}
        result = function(*args, **keywords)
        declared = _declared_writes(function, args, keywords)
        # Storages that the call gave to an argument, as set_ does, have no bytes from before.
        after = {key: s for key, s in _storages(arguments).items() if key in before}
        self._inspect(function._schema.name, after, before, declared, result)
        torch.cuda.synchronize()
        return result

    def _inspect(
        self,
        name: str,
        storages: dict[int, torch.UntypedStorage],
        before: dict[int, bytes],
        declared: set[int],
        result: Any,
    ) -> None:
        written = {
            key for key, storage in storages.items() if self._bytes_of(storage) != before[key]
        }
        for key, storage in storages.items():
            hazard = self._reading_is_a_hazard(storage)
            if hazard and key not in written and key not in declared:
                self.defects.append(f"{name}: an argument that is only read counts as written")
            elif not hazard and key in written and name not in _SYNCHRONIZING:
                self.defects.append(f"{name}: an argument is written and the checker is not told")
        if name in _UNWRITTEN or name in _SYNCHRONIZING:
            return
        for key, storage in _storages(_dense_on_device(result)).items():
            if key not in storages and not self._reading_is_a_hazard(storage):
                self.defects.append(f"{name}: a result is written and the checker is not told")

    def _bytes_of(self, storage: torch.UntypedStorage) -> bytes:
        address = self._library.spillover_emulator_host_pointer(storage.data_ptr())
        return ctypes.string_at(address, storage.nbytes())

    def _reading_is_a_hazard(self, storage: torch.UntypedStorage) -> bool:
        stream = self._probe_stream.cuda_stream
        access = _libraries.Range(storage.data_ptr(), storage.nbytes(), 0)
        status = self._library.spillover_emulator_operator_begin(
            stream, b"probe", ctypes.byref(access), 1
        )
        return bool(status)


def _dense_on_device(tree: Any) -> list[Tensor]:
    tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [t for t in tensors if t.is_cuda and t.layout == torch.strided]


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """The tensors' storages that have bytes, by identity."""
    storages = (t.untyped_storage() for t in tensors)
    return {s._cdata: s for s in storages if s.nbytes() and s.data_ptr()}


def _declared_writes(
    function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> set[int]:
    """Storages of the arguments that the schema declares to be written."""
    written = []
    for index, argument in enumerate(function._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        if index < len(arguments):
            written.append(arguments[index])
        else:
            written.append(keywords.get(argument.name))
    return set(_storages(_dense_on_device(written)))
