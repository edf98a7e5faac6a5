"""Decides which modules of a model are streamed blocks, and which of them stay on the device.

Everything here only reads the model, so a wrong argument leaves it as it was.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch
from torch import nn

from spillover._errors import ConfigError
from spillover._units import parse_bytes

# A second group of blocks (the decoder beside the encoder) is streamed too unless it is this many
# times smaller than the largest group, when streaming it would cost more than it frees.
_GROUP_RATIO_MAX = 8


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of the distinct parameters of ``module`` and its children."""
    return sum(parameter.nbytes for parameter in module.parameters())


def find_blocks(model: nn.Module, blocks: Iterable[nn.Module] | str | None) -> dict[str, nn.Module]:
    """Blocks of ``model`` by their qualified names, in the order in which the model lists them.

    Raises
    ------
    ConfigError
        No block is found, or the blocks given do not fit the model.
    """
    if blocks is None:
        found = _detect(model)
    elif isinstance(blocks, str):
        found = _match(model, blocks)
    else:
        found = _listed(model, blocks)
    for name, block in found.items():
        for other_name, other in found.items():
            if other is not block and any(child is other for child in block.modules()):
                raise ConfigError(
                    f"block {other_name!r} lies inside block {name!r}; give one of the two"
                )
    return found


def _listed(model: nn.Module, blocks: Iterable[nn.Module]) -> dict[str, nn.Module]:
    try:
        wanted = list(blocks)
    except TypeError as error:
        raise ConfigError(
            "blocks must be a list of modules or a pattern for their names such as 'layers.*', not "
            f"{blocks!r}"
        ) from error
    names = {id(module): name for name, module in model.named_modules()}
    for block in wanted:
        if not isinstance(block, nn.Module):
            raise ConfigError(f"blocks must be modules of the model, not {type(block).__name__}")
        if id(block) not in names:
            raise ConfigError(f"a {type(block).__name__} in blocks is not a module of the model")
        if block is model:
            raise ConfigError("the model itself cannot be one of its blocks")
    if not wanted:
        raise ConfigError("blocks is empty; leave it out to have the blocks found")
    chosen = {id(block) for block in wanted}
    return {name: module for name, module in model.named_modules() if id(module) in chosen}


def _match(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        # A star also matches dots, so what lies inside a match is left to that match.
        if name and not inside and fnmatch.fnmatchcase(name, pattern):
            found[name] = module
    if not found:
        raise ConfigError(
            f"no module's name matches blocks={pattern!r}; names look like "
            f"{', '.join(repr(name) for name, _ in list(model.named_modules())[1:4])}"
        )
    return found


def _is_group(module: nn.Module) -> bool:
    """Whether the children are repeated blocks that are called one by one."""
    if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
        return False
    children = list(module)
    kind = type(children[0])
    # A ModuleList has no forward: hooks on it would never run.
    return kind is not nn.ModuleList and all(
        type(child) is kind and next(child.parameters(), None) is not None for child in children
    )


def _groups(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Outermost groups below ``module``, except that a group of groups is looked into."""
    if _is_group(module) and not all(_is_group(child) for child in module.children()):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _groups(f"{name}.{child_name}" if name else child_name, child)


def _detect(model: nn.Module) -> dict[str, nn.Module]:
    groups = [(name, group, parameter_bytes(group)) for name, group in _groups("", model)]
    if not groups:
        raise ConfigError(
            "no repeated blocks were found: the model has no nn.ModuleList or nn.Sequential with "
            "two or more children of one class; name them with blocks="
        )
    largest = max(size_bytes for _, _, size_bytes in groups)
    found: dict[str, nn.Module] = {}
    for name, group, size_bytes in groups:
        if size_bytes * _GROUP_RATIO_MAX < largest:
            continue
        for child_name, child in group.named_children():
            # One module listed several times (a shared layer) is one block.
            if not any(child is block for block in found.values()):
                found[f"{name}.{child_name}" if name else child_name] = child
    return found


def choose_resident(sizes: list[int], resident: int | str) -> frozenset[int]:
    """Indices of the blocks that stay on the device.

    They are spread evenly over the model, so that the compute of each resident block hides a part
    of the copy of the streamed block after it.

    Parameters
    ----------
    sizes
        Bytes of each block.
    resident
        An int is a number of blocks; a text such as ``"512MiB"`` is a number of bytes.
    """
    if isinstance(resident, bool) or not isinstance(resident, int | str):
        raise ConfigError(
            f"resident must be a number of blocks or a size such as '512MiB', not {resident!r}"
        )
    if isinstance(resident, int):
        if resident < 0:
            raise ConfigError(f"resident must not be negative, got {resident}")
        return _spread(min(resident, len(sizes)), len(sizes))
    budget = parse_bytes(resident, name="resident")
    for count in range(len(sizes), 0, -1):
        chosen = _spread(count, len(sizes))
        if sum(sizes[index] for index in chosen) <= budget:
            return chosen
    return frozenset()


def _spread(count: int, total: int) -> frozenset[int]:
    return frozenset((2 * index + 1) * total // (2 * count) for index in range(count))


def streamed_parameters(
    model: nn.Module, blocks: dict[str, nn.Module]
) -> dict[str, list[nn.Parameter]]:
    """The parameters that each of ``blocks`` may stream, each parameter once.

    A parameter that another block or the rest of the model uses as well (tied weights) is left out:
    it stays on the device, where every user finds it.

    Raises
    ------
    ConfigError
        A parameter is of a kind that cannot be streamed, or shares memory with another one.
    """
    owners: dict[nn.Parameter, set[str]] = {}
    inside: dict[int, str] = {
        id(module): name for name, block in blocks.items() for module in block.modules()
    }
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, set()).add(inside.get(id(module), ""))
    chosen: dict[str, list[nn.Parameter]] = {name: [] for name in blocks}
    for parameter, users in owners.items():
        owner = next(iter(users))
        if len(users) == 1 and owner:
            _check_kind(owner, parameter)
            chosen[owner].append(parameter)
    for name, block in blocks.items():
        for module in block.modules():
            if isinstance(module, nn.RNNBase):
                raise ConfigError(
                    f"block {name!r} contains {type(module).__name__}, which keeps a list of its "
                    "own weights and cannot be streamed; leave it out of blocks="
                )
    _check_memory(model, chosen)
    return chosen


def _check_kind(name: str, parameter: nn.Parameter) -> None:
    if parameter.device.type == "meta":
        raise ConfigError(f"block {name!r} has weights on the meta device; materialise them first")
    if type(parameter.data) is not torch.Tensor or parameter.layout is not torch.strided:
        raise ConfigError(
            f"block {name!r} has a weight of type {type(parameter.data).__name__} "
            f"({parameter.layout}); only ordinary dense tensors can be streamed"
        )
    if parameter.is_inference():
        raise ConfigError(
            f"block {name!r} has a weight made under torch.inference_mode(), which has no version "
            "to tell changes by; make the model outside of it"
        )


def _check_memory(model: nn.Module, chosen: dict[str, list[nn.Parameter]]) -> None:
    """Refuse different parameters over the same bytes: moving them would cut the tie."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    streamed = {id(parameter) for parameters in chosen.values() for parameter in parameters}
    extents = sorted(
        (str(parameter.device), parameter.data_ptr(), parameter.nbytes, id(parameter))
        for parameter in model.parameters()
        if parameter.numel() and parameter.device.type != "meta"
    )
    for (device, start, size_bytes, one), (other_device, other_start, _, other) in pairwise(
        extents
    ):
        overlap = device == other_device and start + size_bytes > other_start
        if overlap and (one in streamed or other in streamed):
            raise ConfigError(
                f"{names[one]!r} and {names[other]!r} are different parameters over the same "
                "memory; tie weights by using one Parameter in both places"
            )
