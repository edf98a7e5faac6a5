"""torch's own allocator settings while the pool is installed."""

from __future__ import annotations

from collections.abc import Callable

from torch_process import TorchProcess

WARNINGS = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import spillover
    import torch
    assert spillover.allocator.install(adapter="full")
    torch.ones(1, device="cuda")
    torch.ones(1).pin_memory()
told = [str(warning.message) for warning in caught if "has no effect" in str(warning.message)]
pool = spillover.allocator.Pool(0)
"""


def test_settings_of_torch(run_emulated: Callable[..., object]) -> None:
    """Each key is honoured, needless, or named with the reason why it has no effect."""
    run_emulated(
        WARNINGS
        + """
for key in ("max_split_size_mb", "garbage_collection_threshold"):
    assert sum(f"setting {key} " in text for text in told) == 1, (key, told)
assert len(told) == 2, told
before = torch.cuda.memory_allocated()
x = torch.empty(33 << 20, dtype=torch.uint8, device="cuda")
assert torch.cuda.memory_allocated() - before == 40 << 20
assert pool.settings()["fraction"] == 0.25
assert torch.cuda.get_per_process_memory_fraction() == 0.25
""",
        env={
            "PYTORCH_ALLOC_CONF": "backend:native,expandable_segments:True,max_split_size_mb:64,"
            "roundup_power2_divisions:[16:1,>:4], garbage_collection_threshold:0.8,"
            "pinned_use_background_threads:True,per_process_memory_fraction:0.25"
        },
    )


def test_refusals_and_which_setting_comes_first(run_emulated: Callable[..., object]) -> None:
    run_emulated(
        """
        import os
        import torch
        import spillover
        for text, words in {
            "backend:cudaMallocAsync": "leave 'backend' out to use the pool, or set SPILLOVER=0",
            "per_process_memory_fraction:1.5": "per_process_memory_fraction is invalid: '1.5' is",
        }.items():
            os.environ["PYTORCH_ALLOC_CONF"] = text
            if text.startswith("per_process"):
                del os.environ["SPILLOVER_ALLOCATOR"]
            try:
                spillover.allocator.install(adapter="full")
            except spillover.ConfigError as error:
                assert words in str(error), error
            else:
                raise AssertionError("no error")
            assert not spillover.allocator.is_installed()

        # torch's older variable hides the other one; the pool's own setting hides both.
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "per_process_memory_fraction:0.25"
        os.environ["SPILLOVER_ALLOCATOR"] = "fraction=0.5"
        assert spillover.allocator.install(adapter="full")
        assert spillover.allocator.Pool(0).settings()["fraction"] == 0.5
        """,
        env={"SPILLOVER_ALLOCATOR": "fraction=0.5"},
    )


def test_changes_while_installed(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        import warnings

        def change(text):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch._C._accelerator_setAllocatorSettings(text)
            return [str(warning.message) for warning in caught]

        (told,) = change("backend:native,max_non_split_rounding_mb:32")
        assert "max_non_split_rounding_mb has no effect" in told, told
        assert change("max_non_split_rounding_mb:64") == []
        (told,) = change("expandable_segments:False")
        assert "virtual_memory=off" in told, told
        assert change("expandable_segments:True,pinned_use_background_threads:False") == []
        for text, words in {
            "backend:cudaMallocAsync": "leave 'backend' out",
            "no_such_key:1": "no_such_key",
        }.items():
            try:
                change(text)
            except Exception as error:
                assert words in str(error), error
            else:
                raise AssertionError(text)
        assert torch.ones(3, device="cuda").sum().item() == 3
        """
    )


def test_sizes_are_rounded_as_torch_is_told(torch_with_pool: TorchProcess) -> None:
    torch_with_pool.run(
        """
        def sizes(size_bytes):
            before = torch.cuda.memory_stats()
            x = torch.empty(size_bytes, dtype=torch.uint8, device="cuda")
            after = torch.cuda.memory_stats()
            return tuple(
                after[f"{key}.all.allocated"] - before[f"{key}.all.allocated"]
                for key in ("requested_bytes", "allocated_bytes", "active_bytes")
            )

        def check(settings, expected):
            torch._C._accelerator_setAllocatorSettings(settings)
            # The second time it may come from a thread's magazine.
            for size_bytes, block_bytes in [*expected.items(), *expected.items()]:
                assert sizes(size_bytes) == (size_bytes, block_bytes, block_bytes), (
                    settings, size_bytes, block_bytes, sizes(size_bytes)
                )

        every = {
            84 * MiB: 96 * MiB,  # 64, 80, 96, ...
            64 * MiB: 64 * MiB,
            64 * MiB + 1: 80 * MiB,
            3 * MiB // 2: 3 * MiB // 2,
            700_000: 786_432,
            # The divisions would be finer than blocks are.
            2047: 2048,
            1: 512,
        }
        check("roundup_power2_divisions:4", every)
        some = {84 * MiB: 88 * MiB, 130 * MiB: 192 * MiB, 100 * MiB + 1: 104 * MiB}
        check("roundup_power2_divisions:[64:8,128:2,256:1,>:1]", some)
        exact = {84 * MiB: 84 * MiB, 700_000: 700_416}
        check("roundup_power2_divisions:1", exact)
        check("roundup_power2_divisions:4", {84 * MiB: 96 * MiB})
        check("pinned_use_background_threads:False", exact)  # What is not named is set back.
        try:
            torch._C._accelerator_setAllocatorSettings("roundup_power2_divisions:3")
        except Exception as error:
            assert "power of 2" in str(error), error
        else:
            raise AssertionError("no error")
        check("", exact)

        # Sizes that differ a little take turns in one block.
        torch._C._accelerator_setAllocatorSettings("roundup_power2_divisions:4")
        places = set()
        for size_mib in (81, 96, 85, 90):
            x = torch.empty(size_mib * MiB, dtype=torch.uint8, device="cuda")
            places.add(x.data_ptr())
            del x
        torch._C._accelerator_setAllocatorSettings("")
        assert len(places) == 1, places
        """
    )
