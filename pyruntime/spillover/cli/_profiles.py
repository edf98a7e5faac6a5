"""``spillover profiles``: the hardware profiles that come with the package."""

from __future__ import annotations

from typing import Annotated, Any

import typer

app = typer.Typer(help="Hardware profiles for simulated time.", no_args_is_help=False)


@app.callback(invoke_without_command=True)
def profiles(context: typer.Context) -> None:
    """List the hardware profiles; `show NAME` prints one with its sources.

    A profile is a card, or a card, a host and a disk joined by +: rtx4090+desktop+gen4x1.
    """
    if context.invoked_subcommand is not None:
        return
    from rich.console import Console
    from rich.table import Table

    from spillover.emulator import DiskProfile, GpuProfile, HostProfile, load_profile
    from spillover.emulator._profiles import load_part, names

    console = Console()
    cards = Table("name", "card", "memory", "bf16", "bandwidth", "link in / out", "host", "disk")
    for name in names("gpu"):
        gpu = load_profile(name).gpu
        assert isinstance(gpu, GpuProfile)
        cards.add_row(
            name,
            gpu.title,
            f"{gpu.memory_gib:g} GiB",
            f"{gpu.peak_bf16_tflops:g} TFLOP/s",
            f"{gpu.memory_bandwidth_gb_s:g} GB/s",
            f"{gpu.pcie_to_device_gb_s:g} / {gpu.pcie_to_host_gb_s:g} GB/s",
            gpu.host,
            gpu.disk,
        )
    hosts = Table("name", "host", "memory", "CPU optimizer")
    for name in names("host"):
        host = load_part("host", name)
        assert isinstance(host, HostProfile)
        hosts.add_row(
            name,
            host.title,
            f"{host.memory_bandwidth_gb_s:g} GB/s",
            f"{host.optimizer_bandwidth_gb_s:g} GB/s",
        )
    disks = Table("name", "disk", "read", "write")
    for name in names("disk"):
        disk = load_part("disk", name)
        assert isinstance(disk, DiskProfile)
        disks.add_row(name, disk.title, f"{disk.read_gb_s:g} GB/s", f"{disk.write_gb_s:g} GB/s")
    for table in (cards, hosts, disks):
        table.columns[0].no_wrap = True
        console.print(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A name, names joined by +, or a .toml file.")],
    flat: Annotated[
        bool, typer.Option("--flat", help="As lines of section.key=value, for programs.")
    ] = False,
) -> None:
    """Print every number of a profile with its source."""
    from rich.console import Console
    from rich.table import Table

    from spillover.emulator import load_profile

    profile = load_profile(name)
    if flat:
        print(profile.flatten(), end="")
        return
    console = Console()
    parts: tuple[Any, ...] = profile.parts()
    for section, part in zip(("gpu", "host", "disk"), parts, strict=True):
        table = Table("number", "value", "source", title=f"{section}: {part.title} ({part.name})")
        for key in part.numbers():
            table.add_row(key, f"{getattr(part, key):g}", part.sources[key])
        console.print(table)
