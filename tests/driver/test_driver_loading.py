"""Finding the driver: late, by name, and with one clear sentence where there is none."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

import spillover
from spillover import _core


def run_without_driver(code: str) -> str:
    """Run code in a new process that has no emulated driver; gives its output."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def machine_has_driver() -> bool:
    code = "import ctypes; ctypes.CDLL('libcuda.so.1')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_importing_the_core_loads_no_driver_and_no_torch() -> None:
    output = run_without_driver(
        "import sys\n"
        "from spillover import _core\n"
        "names = [line.rstrip().rpartition('/')[2] for line in open('/proc/self/maps')]\n"
        "print([name for name in names if name.startswith(('libcuda', 'libcudart'))])\n"
        "print('torch' in sys.modules)\n"
    )
    assert output.split("\n")[:2] == ["[]", "False"]


@pytest.mark.skipif(machine_has_driver(), reason="this machine has a CUDA driver")
def test_a_missing_driver_is_one_clear_sentence() -> None:
    output = run_without_driver(
        "import spillover\n"
        "from spillover import _core\n"
        "assert not _core.driver_available()\n"
        "for call in (_core.driver_version, _core.device_count, _core.memory_info, _core.Pool):\n"
        "    try:\n"
        "        call()\n"
        "    except spillover.DriverError as error:\n"
        "        print(error)\n"
        "assert _core.device_of(4096) == -1\n"
    )
    lines = output.splitlines()
    assert len(lines) == 4
    for line in lines:
        assert line.startswith("no CUDA driver found (libcuda.so.1): ")
        assert "install the NVIDIA driver, or use spillover.emulator" in line


def test_the_driver_answers() -> None:
    assert _core.driver_available()
    assert _core.driver_version() >= 12000
    assert _core.device_count() >= 1
    free_bytes, total_bytes = _core.memory_info(0)
    assert 0 < free_bytes <= total_bytes


def test_the_version_is_the_drivers_own() -> None:
    version = ctypes.c_int()
    assert ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0
    assert _core.driver_version() == version.value


def test_a_device_that_does_not_exist_is_a_config_error() -> None:
    with pytest.raises(spillover.ConfigError, match="device 63 does not exist; there"):
        _core.memory_info(63)
