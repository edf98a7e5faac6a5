#include "emulator/core/clock/profile.hpp"

#include <charconv>
#include <cmath>

namespace spillover::emulator {
namespace {

struct Default {
  const char* key;
  double value;
};

// A made-up card of round numbers, for a clock without a profile.
constexpr Default kDefaults[] = {
    {"gpu.peak_fp64_tflops", 1},
    {"gpu.peak_fp32_tflops", 50},
    {"gpu.peak_tf32_tflops", 50},
    {"gpu.peak_fp16_tflops", 100},
    {"gpu.peak_bf16_tflops", 100},
    {"gpu.peak_fp8_tflops", 200},
    {"gpu.peak_int8_tops", 200},
    {"gpu.sm_count", 100},
    {"gpu.matmul_efficiency", 0.8},
    {"gpu.matmul_k_ramp", 128},
    {"gpu.convolution_efficiency", 0.6},
    {"gpu.attention_forward_efficiency", 0.7},
    {"gpu.attention_backward_efficiency", 0.6},
    {"gpu.attention_key_ramp", 64},
    {"gpu.attention_head_ramp", 32},
    {"gpu.memory_bandwidth_gb_s", 1000},
    {"gpu.memory_efficiency", 0.9},
    {"gpu.l2_mib", 64},
    {"gpu.l2_bandwidth_gb_s", 3000},
    {"gpu.kernel_ramp_us", 2},
    {"gpu.kernel_gap_us", 1},
    {"gpu.launch_latency_us", 4},
    {"gpu.copy_latency_us", 2},
    {"gpu.pcie_to_device_gb_s", 25},
    {"gpu.pcie_to_host_gb_s", 25},
    {"gpu.pcie_duplex_gb_s", 50},
    {"gpu.peer_gb_s", 25},
    {"gpu.pageable_to_device_gb_s", 8},
    {"gpu.pageable_to_host_gb_s", 8},
    {"host.operator_us", 6},
    {"host.launch_us", 4},
    {"host.graph_launch_us", 4},
    {"host.event_us", 2},
    {"host.stream_call_us", 1},
    {"host.query_us", 1},
    {"host.wait_us", 2},
    {"host.allocation_us", 100},
    {"host.free_us", 100},
    {"host.mapping_us", 20},
    {"host.function_us", 10},
    {"host.launch_queue_depth", 1024},
    {"host.memory_bandwidth_gb_s", 80},
    {"host.optimizer_bandwidth_gb_s", 60},
    {"host.pin_gb_s", 4},
    {"disk.read_gb_s", 6},
    {"disk.write_gb_s", 4},
    {"disk.read_latency_us", 80},
    {"disk.write_latency_us", 30},
};

// Values beyond this are no hardware, and could overflow sums of nanoseconds.
constexpr double kValueMax = 1e9;
constexpr double kNanosecondsMax = 1e15;

}  // namespace

Nanoseconds to_nanoseconds(double value) {
  if (!(value > 0)) return 0;
  return static_cast<Nanoseconds>(std::ceil(value < kNanosecondsMax ? value : kNanosecondsMax));
}

ClockProfile::ClockProfile() {
  for (const Default& entry : kDefaults) values_.emplace(entry.key, entry.value);
}

std::string ClockProfile::read(std::string_view text) {
  while (!text.empty()) {
    const std::size_t end = text.find('\n');
    const std::string_view line = text.substr(0, end);
    text = end == std::string_view::npos ? std::string_view() : text.substr(end + 1);
    if (line.empty()) continue;
    const std::size_t equals = line.find('=');
    if (line.substr(0, equals).ends_with(".name")) continue;  // a text
    double number = 0;
    const char* const last = line.data() + line.size();
    const bool is_number = equals != std::string_view::npos && [&] {
      const auto [stopped, error] = std::from_chars(line.data() + equals + 1, last, number);
      return error == std::errc() && stopped == last;
    }();
    if (!is_number || !(number >= 0 && number <= kValueMax)) {
      return "SPILLOVER_EMULATOR_PROFILE_VALUES has the line '" + std::string(line) +
             "': use section.key=number, from 0 to 1e9.";
    }
    values_.insert_or_assign(std::string(line.substr(0, equals)), number);
  }
  // What is divided by.
  for (const char* key : {"gpu.pcie_to_device_gb_s",
                          "gpu.pcie_to_host_gb_s",
                          "gpu.pcie_duplex_gb_s",
                          "gpu.pageable_to_device_gb_s",
                          "gpu.pageable_to_host_gb_s",
                          "gpu.memory_bandwidth_gb_s",
                          "gpu.memory_efficiency",
                          "gpu.l2_bandwidth_gb_s",
                          "gpu.peer_gb_s",
                          "gpu.sm_count",
                          "host.memory_bandwidth_gb_s",
                          "host.optimizer_bandwidth_gb_s",
                          "host.pin_gb_s",
                          "disk.read_gb_s",
                          "disk.write_gb_s",
                          "host.query_us",
                          "host.launch_queue_depth",
                          "gpu.peak_fp64_tflops",
                          "gpu.peak_fp32_tflops",
                          "gpu.peak_tf32_tflops",
                          "gpu.peak_fp16_tflops",
                          "gpu.peak_bf16_tflops",
                          "gpu.peak_fp8_tflops",
                          "gpu.peak_int8_tops"}) {
    if (at(key) > 0) continue;
    return std::string("SPILLOVER_EMULATOR_PROFILE_VALUES has ") + key +
           "=0: use a number above 0.";
  }
  return "";
}

double ClockProfile::at(std::string_view key) const {
  const auto found = values_.find(key);
  return found == values_.end() ? 0 : found->second;
}

Nanoseconds ClockProfile::microseconds(std::string_view key) const {
  return to_nanoseconds(at(key) * 1000);
}

Nanoseconds ClockProfile::transfer(std::uint64_t bytes, std::string_view rate_key) const {
  return to_nanoseconds(static_cast<double>(bytes) / at(rate_key));
}

std::int64_t ClockProfile::rate(std::string_view key) const {
  return static_cast<std::int64_t>(at(key) * 1000);
}

}  // namespace spillover::emulator
