"""What importing the package does and does not do, and its public names."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

import spillover
from spillover._units import format_bytes, parse_bytes


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **env},
    )


def test_import_loads_neither_torch_nor_a_driver() -> None:
    result = run(
        """
        import sys
        import spillover, spillover.allocator, spillover.emulator, spillover.cli, spillover._core
        assert "torch" not in sys.modules, "torch was imported"
        libraries = {line.split("/")[-1].strip() for line in open("/proc/self/maps")}
        cuda = [name for name in libraries if name.startswith(("libcuda", "libtorch", "libc10"))]
        assert not cuda, cuda
        """
    )
    assert result.returncode == 0, result.stderr


def test_all_names_resolve() -> None:
    for name in spillover.__all__:
        assert getattr(spillover, name) is not None
    assert dir(spillover) == sorted(spillover.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = spillover.nothing


BLOCK_TORCH = """
    import sys
    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name == "torch" or name.startswith("torch."):
                raise ModuleNotFoundError("No module named 'torch'", name="torch")
    sys.meta_path.insert(0, Blocker())
"""


def test_without_torch_everything_imports_and_says_what_is_missing() -> None:
    result = run(
        textwrap.dedent(BLOCK_TORCH)
        + textwrap.dedent(
            """
            import spillover, spillover.allocator, spillover.emulator, spillover.cli
            for action in (spillover.allocator.install, lambda: spillover.offload_activations,
                           lambda: spillover.optim.AdamW, lambda: spillover.stream_parameters,
                           lambda: spillover.TransferEngine(host="1MiB")):
                try:
                    action()
                except Exception as error:
                    assert "pip install torch" in str(error), error
                    assert "\\n" not in str(error).strip(), error
                else:
                    raise AssertionError(action)
            """
        )
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("has_cuda", [True, False], ids=["no device", "torch without CUDA"])
def test_without_a_device_what_needs_one_says_so(has_cuda: bool) -> None:
    # What a build without CUDA does at the first use of a device, which no other code can see.
    without_cuda = """
        def refuse():
            raise AssertionError("Torch not compiled with CUDA enabled")
        torch.version.cuda, torch.cuda._lazy_init = None, refuse
        torch.cuda.is_available = lambda: False
    """
    result = run(
        "import torch\n"
        + textwrap.dedent("" if has_cuda else without_cuda)
        + textwrap.dedent(
            """
            import spillover
            model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
            for action in (lambda: spillover.TransferEngine(host="1MiB"),
                           lambda: spillover.TransferEngine(device="cuda:0", host="1MiB"),
                           lambda: spillover.stream_parameters(model)):
                try:
                    action()
                except spillover.ConfigError as error:
                    assert "needs a CUDA device" in str(error), error
                    assert "\\n" not in str(error).strip(), error
                else:
                    raise AssertionError(action)
            """
        ),
        CUDA_VISIBLE_DEVICES="",
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [("20GiB", 20 << 30), ("1.5 MiB", 3 << 19), ("512MB", 512_000_000), (7, 7), ("64", 64)],
)
def test_parse_bytes(text: str | int, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "-1GiB", "3 parsecs", "GiB", -1, True, None, 1.5])
def test_parse_bytes_names_what_is_wrong(text: object) -> None:
    with pytest.raises(spillover.ConfigError, match="limit"):
        parse_bytes(text, name="limit")  # type: ignore[arg-type]


def test_format_bytes() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.50 KiB",
        "3.00 TiB",
    ]


def test_switch_rejects_other_values() -> None:
    result = run("import spillover._settings as s; s.enabled()", SPILLOVER="maybe")
    assert "SPILLOVER='maybe' is not understood" in result.stderr


def test_errors_are_what_callers_catch() -> None:
    import torch

    assert issubclass(spillover.ConfigError, ValueError)
    assert issubclass(spillover.HostOutOfMemory, MemoryError)
    assert issubclass(spillover.StorageError, OSError)
    assert issubclass(spillover.DiskFull, spillover.StorageError)
    assert issubclass(spillover.CorruptData, spillover.StorageError)
    assert issubclass(spillover.StateError, RuntimeError)
    assert issubclass(spillover.DeviceOutOfMemory, torch.OutOfMemoryError)
    for name in spillover.__all__:
        value = getattr(spillover, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, spillover.SpilloverError)
