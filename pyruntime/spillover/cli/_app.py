"""Commands of ``spillover``; each checks all of its input before it acts."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import spillover
from spillover._errors import SpilloverError
from spillover.cli import _bench, _doctor, _profiles, _replay, _store

app = typer.Typer(
    name="spillover",
    help="Train and run PyTorch models that do not fit in GPU memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(_profiles.app, name="profiles")
app.add_typer(_store.app, name="store")
app.command()(_bench.bench)
app.command()(_doctor.doctor)
app.command()(_replay.replay)

_PASS_THROUGH = {"allow_interspersed_args": False}


def main() -> None:
    """Run the command line; an error of ours is one sentence on stderr and exit code 2."""
    try:
        app()
    except SpilloverError as error:
        print(f"spillover: {error}", file=sys.stderr)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is done.")] = False,
) -> None:
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    if version:
        print(spillover.__version__)
        raise typer.Exit


@app.command(context_settings=_PASS_THROUGH)
def emulate(
    command: Annotated[
        list[str] | None,
        typer.Argument(help="Program and arguments, after --.", metavar="-- COMMAND..."),
    ] = None,
    vram: Annotated[
        str | None,
        typer.Option(help="Capacity of each device, such as 24GiB; else the profile's, or 8GiB."),
    ] = None,
    devices: Annotated[int | None, typer.Option(help="Number of devices, 1 to 16.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="When queued work runs: late, eager, threaded or random.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the random schedule.")] = None,
    hazards: Annotated[
        str | None,
        typer.Option(help="What unordered accesses do: off, count, warn (default) or raise."),
    ] = None,
    poison: Annotated[
        bool | None, typer.Option(help="Fill memory that the driver gives or takes with NaN.")
    ] = None,
    virtual_memory: Annotated[
        bool | None,
        typer.Option(help="Whether the devices have virtual memory management; else they have."),
    ] = None,
    clock: Annotated[
        bool | None, typer.Option(help="Keep virtual time and print what took how long.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="Card whose times are simulated, such as rtx4090.")
    ] = None,
    trace: Annotated[
        str | None, typer.Option(help="Write simulated time to this file, for Perfetto.")
    ] = None,
    dry: Annotated[
        bool | None,
        typer.Option("--dry/--compute", help="No bytes, only sizes; prints the peak at the end."),
    ] = None,
    unknown: Annotated[
        str | None,
        typer.Option(help="What a dry run's unknown values are to host code: error, zero or one."),
    ] = None,
    routing: Annotated[
        str | None,
        typer.Option(
            help="How a dry run's experts are chosen: uniform, or the busiest one's share of the "
            "mean, such as 1.5."
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write a dry run's report there, as JSON.", metavar="FILE")
    ] = None,
    tokens_per_step: Annotated[
        int | None,
        typer.Option(min=1, help="What a step trains on, for a dry run's tokens per second."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Say what works on this machine, and exit.")
    ] = False,
) -> None:
    """Run an unmodified CUDA script on emulated devices, child processes included.

    Options not given come from SPILLOVER_EMULATOR_VRAM, _DEVICES, _SCHEDULE, _SEED, _HAZARDS,
    _POISON, _VIRTUAL_MEMORY, _CLOCK, _PROFILE, _TRACE, _DRY, _UNKNOWN and _ROUTING. Compute runs on
    the CPU; how long it takes says nothing about a GPU, what the clock computes is simulated.
    """
    from spillover._errors import ConfigError
    from spillover.emulator import _check, _command, _dry, _options

    given = {
        name: value
        for name, value in {
            "vram": vram,
            "devices": devices,
            "schedule": schedule,
            "seed": seed,
            "hazards": hazards,
            "poison": poison,
            "virtual_memory": virtual_memory,
            "clock": clock,
            "profile": profile,
            "trace": trace,
            "dry": dry,
            "unknown": unknown,
            "routing": routing,
        }.items()
        if value is not None
    }
    options = _options.Options.from_environment(given=given, defaults={"hazards": "warn"})
    if check:
        sys.exit(_check.check(options))
    for name, value in (
        ("--report", report),
        ("--tokens-per-step", tokens_per_step),
        ("--unknown", unknown),
        ("--routing", routing),
    ):
        if value is not None and not options.dry:
            raise ConfigError(f"{name} is for dry runs; add --dry")
    if clock is False and options.clock:
        raise ConfigError("--no-clock contradicts --profile and --trace, which need the clock")
    if options.trace:
        _options.require_writable_place("--trace", Path(options.trace))
    if report is not None:
        _options.require_writable_place("--report", report.absolute())
        os.environ[_dry.REPORT_VARIABLE] = str(report.absolute())
    if tokens_per_step is not None:
        os.environ[_dry.TOKENS_VARIABLE] = str(tokens_per_step)
    _command.replace_process(command or [], options)


@app.command()
def build(
    clean: Annotated[bool, typer.Option("--clean", help="Remove what was built before.")] = False,
) -> None:
    """Compile the parts that are bound to the installed torch, ahead of their first use."""
    from spillover import _build

    if clean:
        _build.clean()
    for path in _build.build_all():
        print(path)


@app.command(context_settings={**_PASS_THROUGH, "ignore_unknown_options": True})
def run(
    script: Annotated[
        str, typer.Argument(help="The Python script, or -m MODULE.", metavar="(SCRIPT | -m MODULE)")
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Its arguments.", metavar="[ARGS]...")
    ] = None,
    limit: Annotated[
        str | None,
        typer.Option(help="What the pool may hold of a device, such as 20GiB.", metavar="BYTES"),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A setting of docs/allocator.md; may be repeated.", metavar="KEY=VALUE"
        ),
    ] = None,
    record_trace: Annotated[
        Path | None,
        typer.Option(help="Write what it allocates on device 0, for replay.", metavar="FILE.csv"),
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(
            help="Write when bytes moved and who waited, for Perfetto; %p in the name is the "
            "process, and then those that it starts write, too.",
            metavar="FILE.json",
        ),
    ] = None,
) -> None:
    """Run an unmodified script or module with Spillover's allocator in place of PyTorch's own.

    So are the Python processes that it starts, such as torchrun's and DataLoader's workers.
    """
    from spillover._errors import ConfigError
    from spillover.cli import _run

    settings = list(setting or [])
    if limit is not None:
        if "," in limit:
            raise ConfigError(
                f"--limit {limit!r} is more than a size; give other settings by --set KEY=VALUE"
            )
        settings.append(f"limit={limit}")
    _run.replace_process([script, *(arguments or [])], settings, record_trace, trace)
