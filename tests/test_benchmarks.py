"""Every benchmark runs in its quick form, so that none rots. Its timings are not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXPECTED = {
    "activations": {
        "peak_fraction.ours_host",
        "peak_fraction.ours_disk",
        "peak_fraction.save_on_cpu",
        "peak_fraction.torchtune_style",
        "peak_step_ms.plain",
        "peak_step_ms.ours_host",
        "peak_step_ms.save_on_cpu",
        "hook_us_per_tensor.ours",
        "hook_us_per_tensor.save_on_cpu",
        "hook_ratio",
        "host_pool_hit_rate",
        "simulated_slowdown.rtx4090_4k.ours",
        "simulated_slowdown.rtx4090_4k.save_on_cpu",
        "simulated_slowdown.rtx4090_4k.checkpoint",
        "simulated_over_bound.rtx4090_4k",
        "simulated_bound_over_plain.rtx4090_4k",
    },
    "allocator": {
        "utilisation.diffusion_unet.ours",
        "utilisation_mean.expandable",
        "priced_driver_ms.diffusion_unet.native",
        "stranding_gib.ours",
        "stranding_gib.native",
        "pair_ns.core.1MiB.4t",
        "pair_ns.torch.512B.1t.ours",
        "pair_ns.torch.64MiB.4t.native",
        "pair_ratio.torch.4KiB.2t",
        "oom_ladder_saved",
    },
    "clock": {
        "clock_repeatable",
        "clock_step_ms",
        "calibration_error_percent_median",
        "dry_peak_error_bytes_max",
        "dry_schedule_error",
        "simulated_slowdown.h100-pcie.save_on_cpu",
        "simulated_slowdown.h100-pcie.fsdp2_cpu_offload",
    },
    "crash": {
        "optimizer_kill_points_survived",
        "optimizer_kill_points_tried",
        "kill_points_survived",
        "kill_points_tried",
        "crash_points_survived",
        "crash_points_tried",
        "crash_points_lost_without_syncs",
    },
    "disk": {
        "write_gb_s.ours_threads",
        "write_gb_s.raw",
        "read_gb_s.ours_threads",
        "read_gb_s.raw",
        "ratio_to_raw.write.threads",
        "crc_gb_s",
    },
    "dry": {
        "dry_cases",
        "dry_peak_error_bytes_max",
        "dry_allocation_count_error_max",
        "dry_7b_seconds",
        "dry_7b_rss_gib",
    },
    "emulator": {
        "op_overhead_us_median",
        "opdb_pass",
        "opdb_bf16_pass",
        "hazard_kinds_caught",
        "hazard_false_alarms",
    },
    "optimizer": {
        "gparam_s.ours_fp32",
        "gparam_s.ours_mixed",
        "gparam_s.ours_8bit",
        "gparam_s.torch_fused",
        "ratio.fp32_to_best_peer",
        "fraction_of_stream",
        "fraction_of_stream_mixed",
        "stream_gb_s",
        "simulated_fraction_of_bound.rtx4090_accumulation_2",
        "simulated_fraction_of_no_offload.rtx4090_accumulation_2.ours",
        "simulated_fraction_of_no_offload.rtx4090_accumulation_2.fsdp2_cpu_offload",
        "equality_one_step_error",
        "equality_200_steps_error",
        "equality_bitwise.repeated",
        "equality_bitwise.disk",
        "equality_bitwise.overlap",
        "closed_loop_distance.ours",
        "closed_loop_distance.torch_fused",
        "closed_loop_distance.torch_fused_cuda",
        "bytes_per_parameter_error",
        "bytes_per_parameter.device.mixed",
        "bytes_per_parameter.host.mixed",
        "bytes_per_parameter.disk.mixed",
        "bytes_per_parameter.disk.disk_mixed",
        "bytes_per_parameter.host.auto_mixed",
        "bytes_per_parameter.host.mixed_8bit",
        "bytes_per_parameter.host.split",
        "bytes_per_parameter.host.fp32",
    },
    "sleep": {
        "sleep_wake_gib_s.ours",
        "sleep_wake_gib_s.raw_copy",
        "sleep_wake_ratio.ours",
        "sleep_freed_share.ours",
    },
    "transfer": {
        "ratio_to_raw.d2h",
        "ratio_to_raw.h2d",
        "ratio_to_raw.both",
        "per_transfer_us.out.single",
        "per_transfer_us.out.batched",
        "per_transfer_us.out.torch",
        "per_transfer_us.in.single",
        "per_transfer_us.in.batched",
        "per_transfer_us.in.torch",
        "host_bytes_over_stored.ours",
        "host_bytes_over_stored.ours_reserved",
        "host_bytes_over_stored.torch",
    },
    "trace": {
        "span_ns.off",
        "span_ns.on",
        "span_ns.on_threads",
        "clock_pair_ns",
        "python_span_ns.on",
        "record_function_ns.on",
        "export_s",
    },
}


def benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_benchmark_is_tested() -> None:
    assert set(benchmarks("--list").stdout.split()) == set(EXPECTED)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_quick(name: str, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    result = benchmarks(name, "--quick", "--json", str(file))
    assert result.returncode == 0, result.stderr
    metrics = json.loads(file.read_text())["metrics"]
    assert metrics.keys() >= EXPECTED[name]
    assert all(isinstance(value, int | float) for value in metrics.values())


def test_wrong_name_lists_the_right_ones() -> None:
    result = benchmarks("nothing")
    assert result.returncode == 2
    assert "emulator" in result.stderr
