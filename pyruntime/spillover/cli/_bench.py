"""``spillover bench``: measures this machine and writes a hardware profile of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench(
    profile_out: Annotated[Path, typer.Option(help="The .toml file to write.")],
    gpu: Annotated[bool, typer.Option(help="Measure the CUDA device.")] = True,
    disk: Annotated[
        list[Path] | None, typer.Option(help="A folder on a disk to measure; repeat for several.")
    ] = None,
    like: Annotated[
        str, typer.Option(help="Card whose profile fills in what cannot be measured.")
    ] = "a100-sxm",
    host_like: Annotated[str, typer.Option(help="The same for the host.")] = "desktop",
    disk_like: Annotated[str, typer.Option(help="The same for the disk.")] = "gen4x1",
    size: Annotated[str, typer.Option(help="Bytes of each copy, loop and file.")] = "1GiB",
    matmul_size: Annotated[int, typer.Option(help="Rows of the matrices.")] = 8192,
    rounds: Annotated[int, typer.Option(help="Repetitions; the fastest counts.")] = 5,
    allow_emulated: Annotated[
        bool,
        typer.Option("--allow-emulated", help="Write GPU numbers of an emulated device."),
    ] = False,
) -> None:
    """Measure this machine and write a hardware profile of it.

    Writes `size` bytes to each folder in each round. The file works wherever a profile's name does:
    spillover profiles show my.toml.
    """
    from rich.console import Console
    from rich.table import Table

    from spillover._errors import ConfigError
    from spillover.bench import BenchOptions, measure_profile, write_profile

    options = BenchOptions(
        like=like,
        host_like=host_like,
        disk_like=disk_like,
        gpu=gpu,
        folders=tuple(disk or ()),
        size=size,
        matmul_size=matmul_size,
        rounds=rounds,
        allow_emulated=allow_emulated,
    )
    if profile_out.suffix != ".toml":
        raise ConfigError(f"--profile-out {str(profile_out)!r} must end in .toml")
    if not profile_out.resolve().parent.is_dir():
        raise ConfigError(f"there is no folder {str(profile_out.resolve().parent)!r} to write to")
    found = measure_profile(options)
    write_profile(found, profile_out)
    console = Console()
    for section, measured in found.items():
        table = Table("number", "value", title=f"{section}: {measured.title}")
        for key, value in measured.numbers.items():
            table.add_row(key, f"{value:.4g}")
        console.print(table)
        console.print(f"{measured.source}; the rest is {measured.extends}'s")
    console.print(f"written to {profile_out}")
