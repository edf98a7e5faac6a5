"""The optimizers that users make: torch's arguments, and ours beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from spillover._core import HostPool
from spillover._disk import Folder
from spillover.optim import _algorithms
from spillover.optim._algorithms import Group, check_nesterov
from spillover.optim._gradients import Anomalies
from spillover.optim._host_optimizer import HostOptimizer
from spillover.optim._host_state import Master, StateOptions
from spillover.optim._kernels import MomentFormat
from spillover.optim._overlap import Modules
from spillover.optim._tiers import Tier

Number = float | torch.Tensor


class Adam(HostOptimizer):
    """Adam (Kingma and Ba, 2015) as in ``torch.optim.Adam``, with state on the host.

    Options and notes are those of :class:`AdamW`; ``weight_decay`` is added to the gradient, unless
    ``decoupled_weight_decay`` is set.
    """

    algorithm = _algorithms.ADAM
    torch_class: ClassVar[type[torch.optim.Optimizer] | None] = torch.optim.Adam

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        tier: Tier = "host",
        directory: Folder | Sequence[Folder] | None = None,
        host_budget: int | str | None = None,
        commit_every: int | Literal["auto"] | None = "auto",
        module: nn.Module | None = None,
        write_limit: int | str | None = None,
        moments: MomentFormat = "float32",
        master: Master = "float32",
        pool: HostPool | None = None,
        offload_gradients: bool = False,
        gradient_anomalies: Anomalies | None = None,
        overlap: Modules | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(
            params,
            defaults,
            tier=self._tier_options(
                tier, directory, host_budget, commit_every, module, write_limit
            ),
            state=StateOptions(moments, master),
            pool=pool,
            offload_gradients=offload_gradients,
            gradient_anomalies=gradient_anomalies,
            overlap=overlap,
        )


class AdamW(Adam):
    """AdamW (Loshchilov and Hutter, 2019) as in ``torch.optim.AdamW``, with state on the host.

    The state is in pinned host memory, set aside when the optimizer is made. ``step()`` brings
    gradients to the host in their own type, updates in one pass over memory on all cores, which
    also unscales and clips offloaded gradients and rounds new weights, and sends those back. It
    blocks the host until the last gradient has arrived and been applied. Kernels launched on the
    current stream after ``step()`` see the new weights. Gradients may be freed or changed when it
    returns. Pinned staging is at most 64 MiB a device.

    Parameters
    ----------
    params
        Parameters or groups of them: float32, bfloat16 or float16, on CUDA devices or on the host
        (as the weights that :func:`spillover.stream_parameters` streams), mixed as they come.
    lr, betas, eps, weight_decay, amsgrad, maximize
        As in ``torch.optim.AdamW``.
    foreach, fused
        Taken for torch's signature; they change nothing.
    capturable, differentiable
        Must be False.
    tier
        Where the state lives. ``"host"``: pinned host memory. ``"disk"``: files in ``directory``,
        from which it passes through at most 96 MiB of pinned memory. ``"auto"``: the host up to
        ``host_budget``, the rest on disk. Results are the same bits. All that is on either is made
        durable by commits, from which :func:`spillover.optim.resume` goes on after a kill.
    directory
        A folder, or several on different disks, for this optimizer alone. What was committed there
        is never overwritten: without :func:`resume` the first ``step()`` raises StateError.
    host_budget
        The most bytes of state in host memory with ``tier="auto"``. None: what there is.
    commit_every
        ``step()`` commits after so many steps, 10 unless said otherwise. None: only
        :meth:`commit` does, where your iteration ends, with what else you need.
    module
        The model, whose buffers and other parameters are committed, too.
    write_limit
        The most bytes that may be written to disk, to spare flash memory.
    moments
        ``"float32"``; ``"bfloat16"``, with stochastic rounding, an error below 2^-7 of the value;
        or ``"blockwise8"``, in 8 bits with a scale for 256 elements, an error of at most 1.4 % of
        the largest of them (``docs/optimizer.md`` has the bounds).
    master
        What low-precision weights are rounded from: ``"float32"``, or ``"split"``, which keeps 16
        bits beside each bfloat16 weight that is on the host, where both together are the master
        (ties round away from zero). Other low-precision weights have float32 masters then, too.
    pool
        Where pinned memory of state comes from, by default the process's pool.
    offload_gradients
        Gradients leave the device as backward makes them, by :func:`offload_gradients` with its
        defaults, and ``.grad`` is a placeholder. Gradients that the caller has offloaded with other
        options are taken as well.
    gradient_anomalies
        What ``step()`` does about gradients with NaN or infinity that were offloaded: ``"raise"``
        :class:`NonFiniteGradient` before anything changes, ``"warn"``, or nothing.
    overlap
        The module that uses the weights, or several: updates then run on a thread, in the order of
        forward, under what follows ``step()``. Each module waits for its own weights, and whatever
        else uses a weight in Python for that one. Weights, state and losses are bit for bit those
        of steps that do not overlap. :meth:`synchronize` waits for all, which is needed before code
        that gets weights without torch's functions; ``docs/optimizer.md`` has the list. A step's
        failure on the thread is raised by whatever waits next.

    Raises
    ------
    ConfigError
        An option is out of range, or a parameter is of another type, has gaps in memory or is a
        DTensor.
    HostOutOfMemory
        There is no pinned memory for the state; the message has the bytes. Nothing has changed.

    Notes
    -----
    LR schedulers, ``add_param_group``, hooks and closures work as usual. GradScaler works through
    ``unscale_``, which ``scaler.step`` calls by itself. ``state_dict()`` has torch's format and can
    be exchanged with ``torch.optim.AdamW`` both ways; masters of low-precision weights are under
    the additional key ``"master"``, and start from the weight where a checkpoint has none. State in
    8 bits is in checkpoints in float32, and the same again when it is loaded.

    With ``SPILLOVER=0`` the constructor returns a ``torch.optim.AdamW``.

    Examples
    --------
    >>> optimizer = spillover.optim.AdamW(model.parameters(), lr=1e-4, moments="blockwise8")
    """

    algorithm = _algorithms.ADAMW
    torch_class = torch.optim.AdamW

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        tier: Tier = "host",
        directory: Folder | Sequence[Folder] | None = None,
        host_budget: int | str | None = None,
        commit_every: int | Literal["auto"] | None = "auto",
        module: nn.Module | None = None,
        write_limit: int | str | None = None,
        moments: MomentFormat = "float32",
        master: Master = "float32",
        pool: HostPool | None = None,
        offload_gradients: bool = False,
        gradient_anomalies: Anomalies | None = None,
        overlap: Modules | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            tier=tier,
            directory=directory,
            host_budget=host_budget,
            commit_every=commit_every,
            module=module,
            write_limit=write_limit,
            moments=moments,
            master=master,
            pool=pool,
            offload_gradients=offload_gradients,
            gradient_anomalies=gradient_anomalies,
            overlap=overlap,
        )

    def _complete_group(self, group: Group) -> None:
        super()._complete_group(group)
        # A checkpoint of torch's Adam says otherwise; torch's AdamW takes it over so, too.
        group["decoupled_weight_decay"] = True


class SGD(HostOptimizer):
    """SGD with momentum and Nesterov momentum as in ``torch.optim.SGD``, with state on the host.

    Options beside torch's, errors and notes are those of :class:`AdamW`. Without momentum there is
    no state but masters.
    """

    algorithm = _algorithms.SGD
    torch_class = torch.optim.SGD

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: Number = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        tier: Tier = "host",
        directory: Folder | Sequence[Folder] | None = None,
        host_budget: int | str | None = None,
        commit_every: int | Literal["auto"] | None = "auto",
        module: nn.Module | None = None,
        write_limit: int | str | None = None,
        moments: MomentFormat = "float32",
        master: Master = "float32",
        pool: HostPool | None = None,
        offload_gradients: bool = False,
        gradient_anomalies: Anomalies | None = None,
        overlap: Modules | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(
            params,
            defaults,
            tier=self._tier_options(
                tier, directory, host_budget, commit_every, module, write_limit
            ),
            state=StateOptions(moments, master),
            pool=pool,
            offload_gradients=offload_gradients,
            gradient_anomalies=gradient_anomalies,
            overlap=overlap,
        )

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_nesterov(group)


class Lion(HostOptimizer):
    """Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, algorithm 2).

    Options beside ``lr``, ``betas``, ``weight_decay`` (decoupled) and ``maximize``, errors and
    notes are those of :class:`AdamW`. Torch has no such class, so the state on the host is used
    with ``SPILLOVER=0`` as well.
    """

    algorithm = _algorithms.LION

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-4,
        betas: tuple[Number, Number] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        tier: Tier = "host",
        directory: Folder | Sequence[Folder] | None = None,
        host_budget: int | str | None = None,
        commit_every: int | Literal["auto"] | None = "auto",
        module: nn.Module | None = None,
        write_limit: int | str | None = None,
        moments: MomentFormat = "float32",
        master: Master = "float32",
        pool: HostPool | None = None,
        offload_gradients: bool = False,
        gradient_anomalies: Anomalies | None = None,
        overlap: Modules | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(
            params,
            defaults,
            tier=self._tier_options(
                tier, directory, host_budget, commit_every, module, write_limit
            ),
            state=StateOptions(moments, master),
            pool=pool,
            offload_gradients=offload_gradients,
            gradient_anomalies=gradient_anomalies,
            overlap=overlap,
        )


class Adagrad(HostOptimizer):
    """Adagrad (Duchi et al., 2011) as in ``torch.optim.Adagrad``, with state on the host.

    Options beside torch's, errors and notes are those of :class:`AdamW`. As torch's, it has its
    state from the start.
    """

    algorithm = _algorithms.ADAGRAD
    torch_class = torch.optim.Adagrad

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        tier: Tier = "host",
        directory: Folder | Sequence[Folder] | None = None,
        host_budget: int | str | None = None,
        commit_every: int | Literal["auto"] | None = "auto",
        module: nn.Module | None = None,
        write_limit: int | str | None = None,
        moments: MomentFormat = "float32",
        master: Master = "float32",
        pool: HostPool | None = None,
        offload_gradients: bool = False,
        gradient_anomalies: Anomalies | None = None,
        overlap: Modules | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(
            params,
            defaults,
            tier=self._tier_options(
                tier, directory, host_budget, commit_every, module, write_limit
            ),
            state=StateOptions(moments, master),
            pool=pool,
            offload_gradients=offload_gradients,
            gradient_anomalies=gradient_anomalies,
            overlap=overlap,
        )
