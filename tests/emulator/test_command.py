"""`spillover emulate` and `spillover.emulator.enable` as a user meets them."""

from __future__ import annotations

import os
import py_compile
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from spillover import ConfigError, StateError, emulator
from spillover.emulator import Options

SCRIPT = """
import sys, torch
from torch.utils.data import DataLoader, TensorDataset

def main():
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4).to("cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(torch.arange(64.0).view(8, 8))
    for (batch,) in DataLoader(data, batch_size=4, num_workers=int(sys.argv[1]), pin_memory=True):
        loss = model(batch.cuda(non_blocking=True)).square().mean()
        loss.backward()
        optimizer.step()
    print("capacity", torch.cuda.mem_get_info()[1], "done")

if __name__ == "__main__":
    main()
"""


def emulate(*arguments: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "spillover", "emulate", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **kwargs,  # type: ignore[call-overload]
    )


@pytest.mark.parametrize("workers", [pytest.param("0", marks=pytest.mark.soak), "2"])
def test_unmodified_script(tmp_path: Path, workers: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    result = emulate("--vram", "256MiB", "--", "python", str(script), workers)
    assert result.returncode == 0, result.stderr
    assert f"capacity {256 << 20} done" in result.stdout
    assert "hazards: 0" in result.stderr


def test_child_processes_are_emulated_too(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            """
            import subprocess, sys
            sys.exit(subprocess.call([sys.executable, "-c",
                "import torch; print(torch.ones(3, device='cuda').sum().item())"]))
            """
        )
    )
    result = emulate("--", "python", str(script))
    assert (result.returncode, result.stdout.strip()) == (0, "3.0"), result.stderr


def test_devices_without_virtual_memory_are_so_in_children_too() -> None:
    code = """
import ctypes, subprocess, sys
driver, supported = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(7)
assert driver.cuInit(0) == 0
assert driver.cuDeviceGetAttribute(ctypes.byref(supported), 102, 0) == 0
print("supported", supported.value, flush=True)
if len(sys.argv) == 1:
    subprocess.run([sys.executable, "-c", sys.orig_argv[2], "child"], check=True)
"""
    result = emulate("--no-virtual-memory", "--", "python", "-c", code)
    assert (result.returncode, result.stdout) == (0, "supported 0\n" * 2), result.stderr
    result = emulate("--", "python", "-c", code)
    assert result.stdout == "supported 1\n" * 2, result.stderr


def test_exit_code_and_signal_reach_the_caller() -> None:
    assert emulate("--", "python", "-c", "raise SystemExit(7)").returncode == 7
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    assert emulate("--", "python", "-c", kill).returncode == -15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vram", "lots", "--", "true"], "vram='lots' is not a size"),
        (["--vram", "1KiB", "--", "true"], "vram must be 4MiB to 1TiB"),
        (["--vram", "9TiB", "--", "true"], "vram must be 4MiB to 1TiB"),
        (["--seed", "99999999999999999999", "--", "true"], "seed must be 0 to"),
        (["--schedule", "soon", "--", "true"], "schedule='soon' is not known; choose one of late"),
        (["--devices", "0", "--", "true"], "devices must be 1 to 16, got 0"),
        (["--", "no-such-program"], "there is no program 'no-such-program'"),
        ([], "name a command"),
        (["--", "python", "-I", "x.py"], "python -I leaves PYTHONPATH out, through which"),
        (["--", sys.executable, "-u", "-W", "ignore", "-BE", "-c", "1"], "python -E leaves"),
        (["--", "python3.11", "-X", "dev", "-S", "x.py"], "python -S leaves sitecustomize out"),
    ],
)
def test_wrong_input(arguments: list[str], message: str) -> None:
    result = emulate(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_another_interpreter_runs_until_it_wants_torch(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    python = str(bare / "bin" / "python")
    assert emulate("--", python, "-c", "print(5)").stdout == "5\n"
    result = emulate("--", python, "-c", "import torch")
    assert result.returncode == 2
    assert "cannot import spillover" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["-c", "print(5)", "-I"], ["-WE", "-c", "print(5)"], ["-W", "default::ImportWarning", "-c5"]],
)
def test_what_only_looks_like_isolation(arguments: list[str]) -> None:
    result = emulate("--", "python", *arguments)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("kind", ["module", "package", "bytecode"])
def test_a_hidden_sitecustomize_runs_too(tmp_path: Path, kind: str) -> None:
    if kind == "package":
        (tmp_path / "sitecustomize").mkdir()
        (tmp_path / "sitecustomize" / "__init__.py").write_text("from sitecustomize import part\n")
        (tmp_path / "sitecustomize" / "part.py").write_text("import sys; sys.hidden = 7\n")
    else:
        source = tmp_path / "sitecustomize.py"
        source.write_text("import sys; sys.hidden = 7\n")
        if kind == "bytecode":
            py_compile.compile(str(source), cfile=str(source.with_suffix(".pyc")))
            source.unlink()
    code = "import sys, sitecustomize; print(sys.hidden, sitecustomize.__file__)"
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = emulate("--", "python", "-c", code, env={**os.environ, "PYTHONPATH": path})
    assert result.stdout.startswith(f"7 {tmp_path}"), result.stderr


def test_an_incomplete_installation_changes_nothing(tmp_path: Path) -> None:
    code = """
        import os, pathlib, sys
        import spillover
        from spillover.emulator import _libraries

        folder = pathlib.Path(sys.argv[1])
        for path in _libraries.folder().iterdir():
            if path.name.startswith("lib") and path.name != "libcudart.so.13":
                (folder / path.name).symlink_to(path)
        _libraries.folder = lambda: folder
        before = dict(os.environ)
        try:
            spillover.emulator.enable()
        except spillover.StateError as error:
            assert f"lacks libcudart.so.13 in {folder}; reinstall" in str(error), error
        else:
            raise AssertionError("no error")
        (folder / "libcudart.so.13").write_text("no library")
        try:
            spillover.emulator.enable()
        except spillover.StateError as error:
            assert "libcudart.so.13 does not load" in str(error), error
        else:
            raise AssertionError("no error")
        assert dict(os.environ) == before
        assert not spillover.emulator.is_enabled()
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_a_file_that_is_no_program(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("nothing that starts")
    assert "is not executable" in emulate("--", str(script)).stderr
    script.chmod(0o755)
    assert "cannot be started" in emulate("--", str(script)).stderr


def test_tolist_of_pinned_memory_is_seen(run_emulated) -> None:
    run_emulated(
        """
        import torch
        source = torch.ones(1000, device="cuda")
        host = source.to("cpu", non_blocking=True)
        try:
            host.tolist()
        except Exception as error:
            assert "hazard" in str(error), error
        else:
            raise AssertionError("the read before the synchronisation was not reported")
        torch.cuda.synchronize()
        host.tolist()
        """
    )


def test_run_leaves_a_script_its_own_exceptions(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys, torch\nprint(sys.argv[1:], sys.path[0])\ninput()\n")
    result = emulate(
        "--",
        sys.executable,
        "-m",
        "spillover",
        "run",
        str(script),
        "a",
        "-b",
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 1
    assert result.stdout == f"['a', '-b'] {tmp_path}\n"
    assert "EOFError" in result.stderr


def test_check_reports_what_works() -> None:
    result = emulate("--check", "--vram", "256MiB")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "training" in result.stdout
    assert "fails" not in result.stdout


def test_enable_after_torch_is_an_error() -> None:
    code = "import torch, spillover; spillover.emulator.enable()"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "came after 'import torch'" in result.stderr


def test_asking_for_torch_before_importing_it(run_emulated) -> None:
    """Many libraries probe for torch; the import that follows is emulated all the same."""
    run_emulated(
        """
        import importlib.util
        for _ in range(2):
            assert importlib.util.find_spec("torch") is not None
        import torch
        assert torch.ones(3, device="cuda").sum().item() == 3
        assert type(torch.__spec__.loader).__name__ == "SourceFileLoader"
        """
    )


def test_a_forked_child_may_use_the_device_that_its_parent_did_not(run_emulated) -> None:
    run_emulated(
        """
        import os, torch
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.ones(3, device="cuda").sum().item() == 3 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        """
    )


def test_enable_twice() -> None:
    assert emulator.is_enabled()
    with pytest.raises(StateError, match="enabled already"):
        emulator.enable(vram="1GiB")


def test_devices_that_were_used_stay_as_they_are() -> None:
    import torch

    torch.ones(1, device="cuda")
    schedule = os.environ["SPILLOVER_EMULATOR_SCHEDULE"]
    with pytest.raises(StateError, match="were used already"):
        emulator.reconfigure(vram="1GiB", schedule="threaded")
    assert os.environ["SPILLOVER_EMULATOR_SCHEDULE"] == schedule
    with pytest.raises(ConfigError, match="schedule"):
        emulator.reconfigure(schedule="soon")  # type: ignore[arg-type]


def test_options_change_until_a_device_is_used(run_emulated) -> None:
    run_emulated(
        """
        import os, torch
        from spillover import emulator

        emulator.reconfigure(vram="64MiB")
        child = os.fork()
        if child == 0:
            emulator.reconfigure(devices=2)
        count = torch.cuda.device_count()
        total = torch.cuda.get_device_properties(0).total_memory
        if child == 0:
            os._exit(0 if (count, total) == (2, 64 << 20) else 1)
        assert (count, total) == (1, 64 << 20)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        torch.zeros(1, device="cuda")
        child = os.fork()
        if child == 0:
            try:
                emulator.reconfigure(devices=2)
            except spillover.StateError:
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        """
    )


def test_spillover_0_leaves_torch_alone() -> None:
    code = """
        import spillover
        assert spillover.emulator.enable() is False
        import torch
        assert not torch.cuda.is_available()
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        env={"SPILLOVER": "0", "PATH": "/usr/bin:/bin"},
    )
    assert result.returncode == 0, result.stderr


def test_options_from_environment() -> None:
    options = Options.from_environment(
        {"SPILLOVER_EMULATOR_VRAM": "64MiB", "SPILLOVER_EMULATOR_SEED": "5"},
        given={"schedule": "random"},
        defaults={"hazards": "warn"},
    )
    assert options == Options(vram="64MiB", seed=5, schedule="random", hazards="warn")
    with pytest.raises(ConfigError, match="SPILLOVER_EMULATOR_SEED='x' is not a number"):
        Options.from_environment({"SPILLOVER_EMULATOR_SEED": "x"})
    assert Options(vram="1GiB") == Options(vram=1 << 30)
    assert Options() == Options(vram="8GiB")
    assert Options(profile="rtx4090").vram_bytes == 24 << 30
    assert Options(profile="rtx4090", vram="8GiB").vram_bytes == 8 << 30
    assert Options.from_environment({"SPILLOVER_EMULATOR_POISON": "off"}).poison is False
    with pytest.raises(ConfigError, match="poison must be True or False"):
        Options(poison="off")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="SPILLOVER_EMULATOR_POISON='yes' is not known"):
        Options.from_environment({"SPILLOVER_EMULATOR_POISON": "yes"})
