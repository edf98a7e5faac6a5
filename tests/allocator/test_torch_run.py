"""`spillover run`, SPILLOVER=1, and an allocator that comes too late."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

_IS_INSTALLED = """
import torch
import spillover.allocator
assert spillover.allocator.is_installed()
x = torch.ones(1 << 20, device="cuda")
assert spillover.allocator.stats()["allocated_bytes.all.current"] == 4 << 20
"""


@pytest.fixture
def spillover_run(tmp_path: Path) -> Run:
    """Run `spillover run` on an emulated device, in an empty folder."""

    def run(
        *arguments: str, code: int = 0, standard_input: str = "", **env: str
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "spillover", "emulate", "--vram", "1GiB", "--"]
        result = subprocess.run(
            [*command, sys.executable, "-m", "spillover", "run", *arguments],
            cwd=tmp_path,
            input=standard_input,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            env={**os.environ, **env},
        )
        assert result.returncode == code, result.stdout + result.stderr
        return result

    return run


def script(folder: Path, text: str, name: str = "program.py") -> str:
    (folder / name).write_text(text)
    return name


def test_a_script_gets_its_arguments_and_its_folder(spillover_run: Run, tmp_path: Path) -> None:
    script(tmp_path, "value = 7", "beside.py")
    name = script(
        tmp_path,
        textwrap.dedent(
            """
            import sys
            import beside
            assert sys.argv == ["program.py", "--epochs", "3", "--limit", "x"], sys.argv
            assert __name__ == "__main__" and beside.value == 7
            """
        )
        + _IS_INSTALLED,
    )
    spillover_run(name, "--epochs", "3", "--limit", "x")


def test_a_module_gets_its_arguments(spillover_run: Run, tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    script(package, "", "__init__.py")
    script(
        package,
        textwrap.dedent(
            """
            import sys
            from package import inner
            assert sys.argv[1:] == ["--epochs", "3"], sys.argv
            assert sys.argv[0].endswith("__main__.py") and inner.value == 7
            """
        )
        + _IS_INSTALLED,
        "__main__.py",
    )
    script(package, "value = 7", "inner.py")
    spillover_run("-m", "package", "--epochs", "3")


@pytest.mark.parametrize(
    "options",
    [
        ["--limit", "512MiB", "--set", "wait_max=5s"],
        pytest.param(["--set", "limit=512MiB,wait_max=5s"], marks=pytest.mark.soak),
    ],
)
def test_settings_reach_the_children_too(
    spillover_run: Run, tmp_path: Path, options: list[str]
) -> None:
    check = (
        _IS_INSTALLED
        + """
settings = spillover.allocator.Pool().settings()
assert (settings["limit"], settings["wait_max"]) == (512 << 20, 5.0), settings
"""
    )
    script(tmp_path, check, "child.py")
    name = script(
        tmp_path,
        check + "import subprocess, sys; subprocess.run([sys.executable, 'child.py'], check=True)",
    )
    spillover_run(*options, name, SPILLOVER_ALLOCATOR="wait_max=1s,limit=1GiB")


@pytest.mark.soak
def test_workers_of_torchrun_and_spawn_have_it(spillover_run: Run, tmp_path: Path) -> None:
    script(tmp_path, _IS_INSTALLED, "worker.py")
    name = script(
        tmp_path,
        textwrap.dedent("""
        import torch.multiprocessing
        import subprocess, sys
        import worker

        def work(rank):
            import worker

        if __name__ == "__main__":
            torch.multiprocessing.spawn(work, nprocs=1)
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
            subprocess.run([*torchrun, "worker.py"], check=True)
        """),
    )
    spillover_run(name)


def test_a_program_is_what_python_would_make_of_it(spillover_run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "application"
    folder.mkdir()
    script(folder, "import sys; assert sys.path[0].endswith('application')", "__main__.py")
    spillover_run("application")
    name = script(
        tmp_path,
        """
import atexit, os, pickle, sys, threading, time
class Own: pass
def use_own():
    print(pickle.loads(pickle.dumps(Own())))
def use_later():
    threading.main_thread().join()
    use_own()
atexit.register(use_own)
threading.Thread(target=use_later).start()
os.chdir("/")
assert os.path.exists(__file__)
""",
    )
    result = spillover_run(name)
    assert result.stdout.count("__main__.Own object") == 2, result.stdout + result.stderr


def test_a_program_may_come_from_standard_input(spillover_run: Run) -> None:
    text = "import sys; assert sys.argv == ['-', 'x'], sys.argv" + _IS_INSTALLED
    spillover_run("-", "x", standard_input=text)


def test_exit_codes_and_exceptions_are_the_programs(spillover_run: Run, tmp_path: Path) -> None:
    spillover_run(script(tmp_path, "raise SystemExit(7)"), code=7)
    result = spillover_run(script(tmp_path, "raise KeyError('mine')"), code=1)
    assert "KeyError: 'mine'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.py"], "there is no script 'missing.py'"),
        (["--limt", "1GiB", "x.py"], "there is no option '--limt'"),
        (["-m"], "-m needs the name of a module"),
        (["--set", "limits=1GiB", "x.py"], "the nearest is 'limit'"),
        (
            ["--limit", "1GiB,fraction=0.5", "x.py"],
            "--limit '1GiB,fraction=0.5' is more than a size; give other settings by --set",
        ),
        (["--record-trace", "nowhere/x.csv", "x.py"], "there is no folder"),
        (["--record-trace", ".", "x.py"], "'.' is a folder; give the name of a file in it"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    spillover_run: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    script(tmp_path, "print('ran')", "x.py")
    result = subprocess.run(
        [sys.executable, "-m", "spillover", "run", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert "ran" not in result.stdout


@pytest.mark.parametrize(
    "first",
    ["import torch, spillover", pytest.param("import spillover, torch", marks=pytest.mark.soak)],
)
def test_the_variable_installs_it(run_emulated: Run, first: str) -> None:
    run_emulated(first + "\n" + _IS_INSTALLED, env={"SPILLOVER": "1"})


def test_nothing_happens_without_the_variable(run_emulated: Run) -> None:
    run_emulated("import spillover, torch; assert not spillover.allocator.is_installed()")


def test_nothing_of_ours_stays_on_torch(run_emulated: Run) -> None:
    run_emulated(
        """
        import sys
        import torch
        assert "spillover._torch_import" not in type(torch.__spec__.loader).__module__
        assert torch.__loader__ is torch.__spec__.loader
        assert not [f for f in sys.meta_path if "_torch_import" in type(f).__module__]
        """
    )


def test_too_late_says_where_cuda_began(run_emulated: Run) -> None:
    result = run_emulated(
        """
        import torch
        def first_use():
            return torch.zeros(1, device="cuda")
        first_use()
        try:
            spillover.allocator.install()
        except spillover.StateError as error:
            print(error)
        """
    )
    assert re.search(r"initialised \(at .*:6: ", result.stdout), result.stdout


def test_too_late_for_spillover_itself() -> None:
    code = """
        import sys
        import torch
        torch.cuda.is_initialized = lambda: True
        import spillover
        try:
            spillover.allocator.install()
        except spillover.StateError as error:
            print(error)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert "(before spillover was imported)" in result.stdout, result.stdout + result.stderr
