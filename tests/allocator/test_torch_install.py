"""Installing the pool: when it works and when it refuses."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

from torch_process import TorchProcess


def test_is_idempotent_and_says_so(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        assert allocator.is_installed()
        assert allocator.install()
        torch.ones(1, device="cuda")
        assert allocator.install(adapter="full")
        try:
            allocator.install(adapter="plain")
        except __import__("spillover").StateError as error:
            assert "full" in str(error)
        else:
            raise AssertionError("no error")
        """
    )


def test_switch_and_refusals(run_emulated: Callable[..., object]) -> None:
    run_emulated(
        """
        import os
        import spillover

        def refused(error_type, *words, **options):
            try:
                spillover.allocator.install(**options)
            except error_type as error:
                assert all(word in str(error) for word in words), error
            else:
                raise AssertionError("no error")
            assert not spillover.allocator.is_installed()

        # The switch leaves torch alone, and does not even load it.
        os.environ["SPILLOVER"] = "0"
        assert spillover.allocator.install() is False
        assert not spillover.allocator.is_installed()
        del os.environ["SPILLOVER"]
        refused(spillover.ConfigError, "'best'", adapter="best")

        import torch
        torch.ones(1, device="cuda")
        refused(spillover.StateError, "before the first CUDA tensor")
        assert torch.cuda.get_allocator_backend() == "native"
        assert torch.ones(1, device="cuda").item() == 1
        """
    )


def test_plain_adapter_without_a_compiler(
    run_emulated: Callable[..., object], tmp_path: Path
) -> None:
    # The emulated device has its operators by then: only the adapter is to be built.
    code = f"""
        import torch
        import os, warnings
        os.environ["CXX"] = "/nonexistent/c++"
        os.environ["SPILLOVER_CACHE_DIR"] = {str(tmp_path / "cache")!r}
        import spillover
        try:
            spillover.allocator.install(adapter="full")
        except spillover.BuildError as error:
            assert "g++" in str(error)
        else:
            raise AssertionError("no error")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert spillover.allocator.install()
        assert "With it memory histories, sharing" in str(caught[0].message), caught
        assert caught[0].filename == "<string>", caught[0].filename

        MiB = 1 << 20
        a = torch.ones(10 * MiB, dtype=torch.uint8, device="cuda")
        assert a.sum().item() == 10 * MiB
        assert spillover.allocator.stats()["allocated_bytes.all.current"] >= 10 * MiB
        assert torch.cuda.memory_allocated() >= 10 * MiB
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            copy = a.to("cpu", non_blocking=True)
        a.record_stream(side)
        address = a.data_ptr()
        del a
        other = torch.ones(10 * MiB, dtype=torch.uint8, device="cuda")
        assert other.data_ptr() != address
        del other
        torch.cuda.synchronize()
        try:
            torch.empty(1 << 40, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError as error:
            assert "out of memory" in str(error), error
        else:
            raise AssertionError("no error")
        torch.cuda.empty_cache()
        spillover.allocator.check_invariants()
        assert spillover.allocator.stats()["reserved_bytes.all.current"] < 10 * MiB
        """
    run_emulated(textwrap.dedent(code))


def test_what_keeps_the_adapter_from_being_compiled(
    run_emulated: Callable[..., object], tmp_path: Path
) -> None:
    """Whatever it is, "full" says it in a sentence and "auto" goes on with the plain adapter."""
    code = f"""
        import torch
        import logging, os, pathlib, warnings
        import spillover

        folder = pathlib.Path({str(tmp_path)!r})
        (folder / "shared").mkdir()
        (folder / "shared").chmod(0o777)
        texts = []
        handler = logging.Handler()
        handler.emit = lambda record: texts.append(record.getMessage())
        logging.getLogger("spillover").addHandler(handler)
        for variable, value, error_type in [
            ("CXX", "g++ '-m64", spillover.ConfigError),
            ("SPILLOVER_CACHE_DIR", "~nosuchuser", spillover.ConfigError),
            ("SPILLOVER_CACHE_DIR", str(folder / "shared"), spillover.ConfigError),
            ("SPILLOVER_CACHE_DIR", "/proc/self/task", spillover.BuildError),
        ]:
            before = os.environ.get(variable)
            os.environ[variable] = value
            try:
                spillover.allocator.install(adapter="full")
            except error_type as error:
                assert "set " in str(error) or "run " in str(error), error
            else:
                raise AssertionError("no error")
            if value != "/proc/self/task":
                os.environ.pop(variable)
                if before is not None:
                    os.environ[variable] = before
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert spillover.allocator.install()
        assert [text for text in texts if "plain pluggable" in text] == [str(caught[0].message)]
        assert torch.ones(3, device="cuda").sum().item() == 3
        assert spillover.allocator.stats()["allocation.all.allocated"] > 0
        """
    run_emulated(textwrap.dedent(code))
