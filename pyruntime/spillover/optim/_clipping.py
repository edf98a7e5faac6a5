"""Clipping by the global norm, without a pass over memory for gradients that are on the host."""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Iterable

import torch

from spillover.optim._gradient_math import wide_dtype
from spillover.optim._gradient_placeholder import host_of
from spillover.optim._host_gradient import norms_of

# As in torch: keeps the quotient finite.
_EPSILON = 1e-6


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """Clip the norm of all gradients together, as ``torch.nn.utils.clip_grad_norm_``.

    The squared norms of gradients that were offloaded were gathered as they left the device, or
    as micro-steps were added up, and the factor is applied by the optimizer's own pass. Gradients
    on a device or the CPU are scaled in place.

    Parameters
    ----------
    parameters
        A tensor or several; those without ``.grad`` are left out.
    max_norm
        The largest norm that is left as it is.
    norm_type
        Order of the norm. Orders other than 2 cost a pass over the gradients on the host.
    error_if_nonfinite
        Raise where the norm is NaN or infinite, with the names of the parameters whose gradients
        have such elements. Otherwise gradients are scaled by what comes of it, as by torch.
    foreach
        Taken for torch's signature; it changes nothing.

    Returns
    -------
    The norm before clipping, of no dimension, on the device of the first gradient. It is float32,
    or float64 where a gradient is: torch rounds norms of bfloat16 gradients to three digits.

    Raises
    ------
    RuntimeError
        The norm is not finite, and ``error_if_nonfinite`` is set. Nothing is scaled then.

    Notes
    -----
    Blocks the host until the gradients have been computed, and those of several micro-steps been
    added up.
    """
    if isinstance(parameters, torch.Tensor):
        parameters = [parameters]
    else:
        is_generator = isinstance(parameters, types.GeneratorType)
        parameters = list(parameters)
        if is_generator and not parameters:
            warnings.warn(
                "`parameters` is an empty generator, no gradient clipping will occur.",
                stacklevel=3,
            )
    max_norm, norm_type = float(max_norm), float(norm_type)
    gradients = [one.grad for one in parameters if one.grad is not None]
    if not gradients:
        return torch.tensor(0.0)
    hosts = [host for host in map(host_of, gradients) if host is not None]
    others = [gradient for gradient in gradients if host_of(gradient) is None]
    norms = norms_of(hosts) if norm_type == 2.0 else [host.norm(norm_type) for host in hosts]
    if others:
        norms += _norms_of_tensors(others, norm_type)
    total = float(torch.linalg.vector_norm(torch.tensor(norms, dtype=torch.float64), norm_type))
    if error_if_nonfinite and not math.isfinite(total):
        of_hosts = zip(hosts, norms[: len(hosts)], strict=True)
        names = [host.owner.name for host, norm in of_hosts if not math.isfinite(norm)]
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite "
            f"({', '.join(names) or 'none of the offloaded ones'}), so it cannot be clipped. To "
            "disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )
    factor = max_norm / (total + _EPSILON)
    # Not min(): a factor of NaN stays one, as in torch.
    if not factor >= 1.0:
        for host in hosts:
            host.scale(factor)
        for gradient in others:
            gradient.mul_(factor)
    is_double = any(g.dtype in (torch.float64, torch.complex128) for g in gradients)
    dtype = torch.float64 if is_double else torch.float32
    return torch.full((), total, dtype=dtype, device=gradients[0].device)


def _norms_of_tensors(tensors: list[torch.Tensor], order: float) -> list[float]:
    """Of ordinary gradients, with a wait a device."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        # Those of complex elements are taken of their magnitudes, in the type that torch chooses.
        dtype = None if tensor.is_complex() else wide_dtype(tensor.dtype)
        norm = torch.linalg.vector_norm(tensor, order, dtype=dtype)
        by_device.setdefault(tensor.device, []).append(norm.double())
    return [norm for norms in by_device.values() for norm in torch.stack(norms).tolist()]
