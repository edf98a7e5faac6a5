"""Whether GPUDirect Storage works is found out, with a stand-in for NVIDIA's library."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spillover import _core
from spillover.emulator import StorageFault, faults

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"


def headers() -> Path:
    found = sorted(Path(torch.__file__).parents[1].glob("nvidia/*/include/cufile.h"))
    if not found:
        pytest.skip("NVIDIA's cufile.h is not installed")
    return found[0].parent


def compiler() -> str:
    return os.environ.get("CC") or (sysconfig.get_config_var("CC") or "cc").split()[0]


Build = Callable[..., Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    def build(*options: str) -> Path:
        out = tmp_path_factory.mktemp("cufile") / "libstand_in.so"
        command = [compiler(), "-shared", "-fPIC", "-I", str(headers()), *options]
        source = HERE / "stand_in_cufile.c"
        subprocess.run([*command, str(source), "-o", str(out), "-ldl"], check=True)
        return out

    return build


@pytest.fixture(scope="module")
def library(build: Build) -> Path:
    return build()


@pytest.fixture(autouse=True)
def direct(tmp_path: Path) -> None:
    try:
        os.close(os.open(tmp_path, os.O_RDWR | os.O_TMPFILE | os.O_DIRECT, 0o600))
    except OSError as error:
        pytest.skip(f"this file system refuses O_DIRECT: {error}")


def probe(library: Path, folder: Path) -> _core.GpuDirectAnswer:
    answer = _core.probe_gpu_direct(str(library), str(folder), 0)
    assert answer.works == (answer.reason == "")
    assert list(folder.iterdir()) == []
    return answer


def assert_nothing_is_held(library: Path) -> None:
    opened = ctypes.CDLL(str(library))
    for name in ("open", "files", "buffers"):
        assert ctypes.c_int.in_dll(opened, f"stand_in_{name}").value == 0, name


@pytest.mark.parametrize("option", [None, "STAND_IN_SHORT"])
def test_works(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str | None
) -> None:
    if option is not None:
        monkeypatch.setenv(option, "1")
    answer = probe(library, tmp_path)
    assert answer.reason == ""
    assert answer.library_version == 1150
    assert_nothing_is_held(library)


@pytest.mark.parametrize(
    ("call", "code", "reason"),
    [
        ("cuFileGetVersion", 5005, "cuFileGetVersion: cuFile error 5005"),
        ("cuFileDriverOpen", 5001, "cuFileDriverOpen: cuFile error 5001, the kernel has no nvid"),
        ("cuFileDriverOpen", 5011, r"error of the CUDA driver \(999\)"),
        ("cuFileGetParameterBool", 5022, "cuFileGetParameterBool: cuFile error 5022"),
        ("cuFileHandleRegister", 5008, "not supported on this file system"),
        ("cuFileBufRegister", 5036, "memory could not be pinned"),
        ("cuFileWrite", 28, "cuFileWrite: No space left"),
        ("cuFileWrite", 5030, "cuFileWrite: cuFile error 5030"),
        ("cuFileRead", 5, "cuFileRead: Input/output error"),
        ("cuFileRead", 5034, "switched off by cuFile's configuration"),
    ],
)
def test_call_that_fails_is_the_reason(
    library: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    code: int,
    reason: str,
) -> None:
    monkeypatch.setenv("STAND_IN_FAIL", call)
    monkeypatch.setenv("STAND_IN_CODE", str(code))
    answer = probe(library, tmp_path)
    assert not answer.works
    with pytest.raises(RuntimeError, match=reason):
        raise RuntimeError(answer.reason)
    assert_nothing_is_held(library)


@pytest.mark.parametrize("call", ["cuFileBufDeregister", "cuFileDriverClose"])
def test_call_that_fails_at_the_end_takes_nothing_back(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setenv("STAND_IN_FAIL", call)
    assert probe(library, tmp_path).works


@pytest.mark.parametrize("how", ["STAND_IN_OPEN", "STAND_IN_FAIL"])
def test_compatibility_mode_counts_as_not_working(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setenv(how, "cuFileSetParameterBool")
    assert "compatibility mode is on" in probe(library, tmp_path).reason
    assert_nothing_is_held(library)


def test_success_that_moves_nothing_is_found(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_LOSES", "1")
    assert probe(library, tmp_path).reason == (
        "cuFileWrite reported success, and other bytes arrived"
    )


def test_missing_library(tmp_path: Path) -> None:
    answer = probe(Path("libcufile_of_nobody.so.0"), tmp_path)
    assert "libcufile_of_nobody.so.0" in answer.reason
    assert answer.library_version == 0


def test_library_that_is_too_old(
    library: Path, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    early = build("-DWITHOUT_PARAMETERS")
    answer = probe(early, tmp_path)
    assert "has no cuFileSetParameterBool, cuFileGetParameterBool; install CUDA" in answer.reason
    monkeypatch.setenv("STAND_IN_VERSION", "1070")
    for each in (library, early):
        answer = probe(each, tmp_path)
        assert answer.reason.startswith("libcufile 1.7 is too old; install CUDA 12.9 or later")
        assert answer.library_version == 1070


def test_folder_and_device_that_cannot_be_used(library: Path, tmp_path: Path) -> None:
    with faults(storage=[StorageFault("open", error="EINVAL", call=2)]):
        assert "refuses O_DIRECT" in probe(library, tmp_path).reason
    answer = _core.probe_gpu_direct(str(library), str(tmp_path), 99)
    assert "device 99 does not exist" in answer.reason
    assert_nothing_is_held(library)


def test_declarations_are_those_of_the_header(tmp_path: Path) -> None:
    code = """
        #include <cufile.h>
        #include <type_traits>
        #include <utility>
        #include "tiers/cufile_abi.hpp"
        namespace ours = spillover::cufile;
        static_assert(sizeof(ours::Status) == sizeof(CUfileError_t));
        static_assert(offsetof(ours::Status, driver_code) == offsetof(CUfileError_t, cu_err));
        static_assert(sizeof(ours::Descriptor) == sizeof(CUfileDescr_t));
        static_assert(offsetof(ours::Descriptor, file) == offsetof(CUfileDescr_t, handle));
        static_assert(offsetof(ours::Descriptor, operations) == offsetof(CUfileDescr_t, fs_ops));
        static_assert(ours::kOpaqueDescriptor == CU_FILE_HANDLE_TYPE_OPAQUE_FD);
        static_assert(ours::kAllowCompatMode == CUFILE_PARAM_PROPERTIES_ALLOW_COMPAT_MODE);
        static_assert(ours::kForceCompatMode == CUFILE_PARAM_FORCE_COMPAT_MODE);
        static_assert(ours::kCudaDriverError == CU_FILE_CUDA_DRIVER_ERROR);
        static_assert(std::is_same_v<ours::Handle, CUfileHandle_t>);
        static_assert(std::is_same_v<decltype(ours::Functions::read), decltype(&cuFileRead)>);
        static_assert(std::is_same_v<decltype(ours::Functions::write), decltype(&cuFileWrite)>);
        // The others differ in names of structs and enumerations alone.
        template <class T> struct Count;
        template <class R, class... A> struct Count<R (*)(A...)> {
          static constexpr std::pair value{sizeof...(A), (sizeof(A) + ... + 0)};
        };
        #define SPILLOVER_COMPARE(member, symbol, result, arguments) \\
          static_assert(Count<decltype(ours::Functions::member)>::value == \\
                        Count<decltype(&HEADER_##member)>::value);
        #define HEADER_get_version cuFileGetVersion
        #define HEADER_set_bool cuFileSetParameterBool
        #define HEADER_get_bool cuFileGetParameterBool
        #define HEADER_open_driver cuFileDriverOpen
        #define HEADER_close_driver cuFileDriverClose
        #define HEADER_register_file cuFileHandleRegister
        #define HEADER_unregister_file cuFileHandleDeregister
        #define HEADER_register_memory cuFileBufRegister
        #define HEADER_unregister_memory cuFileBufDeregister
        #define HEADER_read cuFileRead
        #define HEADER_write cuFileWrite
        SPILLOVER_CUFILE_FUNCTIONS(SPILLOVER_COMPARE)
    """
    source = tmp_path / "compare.cpp"
    source.write_text(code)
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-fsyntax-only", "-I", str(CSRC)]
    result = subprocess.run(
        [*command, "-isystem", str(headers()), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
