#include "allocator/out_of_memory.hpp"

#include <algorithm>
#include <array>
#include <cstdio>

#include "base/bytes.hpp"

namespace spillover {
namespace {

constexpr size_t kTagsMax = 8;  // that are named one by one

std::string gave(size_t size_bytes) {
  return " (gave " + format_bytes(size_bytes) + ")";
}

// torch's largest unit is GiB, and programs read the number that was asked for in its words.
std::string format_for_torch(size_t size_bytes) {
  if (size_bytes < kTiB) return format_bytes(size_bytes);
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.2f GiB",
                static_cast<double>(size_bytes) / static_cast<double>(kGiB));
  return text.data();
}

std::string describe_duration(std::chrono::milliseconds duration) {
  const auto count = duration.count();
  if (count < 10'000) return std::to_string(count) + " ms";
  return std::to_string((count + 500) / 1000) + " s";
}

std::string describe_tags(const OutOfMemoryReport& report) {
  if (report.tags.empty()) return "";
  std::string text = "By tag: ";
  const size_t named_count = std::min(report.tags.size(), kTagsMax);
  for (size_t i = 0; i < named_count; ++i) {
    if (i != 0) text += ", ";
    text += report.tags[i].first + " " + format_bytes(report.tags[i].second);
  }
  size_t rest_bytes = 0;
  for (size_t i = named_count; i < report.tags.size(); ++i) rest_bytes += report.tags[i].second;
  if (rest_bytes != 0) {
    text += ", " + std::to_string(report.tags.size() - named_count) + " others " +
            format_bytes(rest_bytes);
  }
  return text + ". ";
}

std::string describe_attempts(const OutOfMemoryReport& report) {
  const LadderAttempts& attempts = report.attempts;
  std::string text = "Tried: blocks that threads keep" + gave(attempts.kept_bytes) + ", waiting " +
                     describe_duration(attempts.waited) + " for streams" +
                     gave(attempts.waited_bytes);
  if (attempts.has_waited_for_device)
    text += ", waiting for the device" + gave(attempts.device_bytes);
  if (attempts.has_returned_idle) {
    text += ", returning idle memory to the driver" + gave(attempts.returned_bytes);
  }
  if (report.is_captured) {
    return text + "; a graph is being recorded, for which nothing else may be tried. ";
  }
  if (attempts.reclaimer_count == 0) {
    text += ", reclaimers (there are none)";
  } else {
    text += ", " + std::to_string(attempts.reclaimer_count) +
            (attempts.reclaimer_count == 1 ? " reclaimer (says that it freed "
                                           : " reclaimers (say that they freed ") +
            format_bytes(attempts.reclaimed_bytes) + ")";
  }
  if (report.has_upstream) return text + ". ";
  return text + ", blocks that their stream still uses (none fits). ";
}

// The settings that would help, most likely first.
std::string describe_settings(const OutOfMemoryReport& report) {
  std::string text;
  if (report.has_upstream && !report.is_limited()) {
    text +=
        "The allocator of this private pool (torch.cuda.MemPool) gave no memory, and other memory "
        "does not serve the pool. ";
  }
  if (report.is_limited()) {
    const size_t request_bytes = std::min(report.requested_bytes, report.total_bytes);
    size_t needed_bytes =
        round_up(report.reserved_bytes - report.cached_bytes, kMiB) + round_up(request_bytes, kMiB);
    // What is free lies between live blocks, in chunks that these keep.
    if (needed_bytes <= report.limit_bytes) {
      needed_bytes = round_up(report.reserved_bytes, kMiB) + round_up(request_bytes, 2 * kMiB);
    }
    text += std::string(report.is_limit_fraction ? "The memory fraction" : "The setting 'limit'") +
            " allows the pool " + format_bytes(report.limit_bytes) + "; raise it to at least " +
            format_bytes(needed_bytes) + " with " +
            (report.is_limit_fraction ? "torch.cuda.set_per_process_memory_fraction or " : "") +
            "spillover.allocator.configure(" + (report.is_limit_fraction ? "fraction" : "limit") +
            "=...). ";
  }
  if (report.attempts.has_timed_out) {
    text += "The wait ended with wait_max, " + describe_duration(report.wait_max) +
            ", while streams still used freed memory; a longer one is set with "
            "spillover.allocator.configure(wait_max=...). ";
  }
  if (!report.is_virtual && report.may_be_virtual &&
      report.cached_bytes >= report.requested_bytes) {
    text +=
        "Enough is cached, in pieces: virtual_memory=auto, set before the first allocation, "
        "puts them together. ";
  }
  if (report.private_bytes >= report.requested_bytes) {
    text += "Private pools (CUDA graphs, torch.cuda.MemPool) keep " +
            format_bytes(report.private_bytes) +
            " free for themselves; delete those that are not needed, or make MemPool with "
            "use_on_oom=True. ";
  }
  if (report.others_bytes() >= report.requested_bytes &&
      report.others_bytes() >= report.total_bytes / 8) {
    text += "Other processes, contexts and libraries hold " + format_bytes(report.others_bytes()) +
            " of the device. ";
  }
  return text;
}

}  // namespace

double OutOfMemoryReport::fragmentation() const {
  if (cached_bytes == 0) return 0.0;
  return static_cast<double>(cached_bytes - std::min(cached_bytes, largest_bytes)) /
         static_cast<double>(cached_bytes);
}

bool OutOfMemoryReport::is_limited() const {
  if (limit_bytes >= total_bytes) return false;
  const size_t room_bytes = limit_bytes - std::min(limit_bytes, reserved_bytes);
  return requested_bytes > room_bytes;
}

size_t OutOfMemoryReport::others_bytes() const {
  const size_t known_bytes = free_bytes + reserved_bytes;
  return total_bytes - std::min(total_bytes, known_bytes);
}

std::string describe_figures(const OutOfMemoryReport& report) {
  std::array<char, 16> percent{};
  std::snprintf(percent.data(), percent.size(), "%.1f %%", 100.0 * report.fragmentation());
  return "device " + std::to_string(report.device) +
         " is out of memory: " + format_bytes(report.requested_bytes) +
         " requested; the device has " + format_bytes(report.free_bytes) + " free of " +
         format_bytes(report.total_bytes) + "; this pool holds " +
         format_bytes(report.reserved_bytes) + ": " + format_bytes(report.allocated_bytes) +
         " allocated, " + format_bytes(report.waiting_bytes) + " waiting for streams, " +
         format_bytes(report.cached_bytes) + " cached. The largest free block has " +
         format_bytes(report.largest_bytes) + "; fragmentation is " + percent.data() + ".";
}

std::string describe_for_torch(const OutOfMemoryReport& report) {
  std::string text = "CUDA out of memory. Tried to allocate " +
                     format_for_torch(report.requested_bytes) + ". GPU " +
                     std::to_string(report.device) + " has a total capacity of " +
                     format_bytes(report.total_bytes) + " of which " +
                     format_bytes(report.free_bytes) + " is free.";
  if (report.limit_bytes < report.total_bytes) {
    text += " This process may use " + format_bytes(report.limit_bytes) + " of it.";
  }
  const size_t unallocated_bytes = report.waiting_bytes + report.cached_bytes;
  text += " Spillover's pool holds " + format_bytes(report.reserved_bytes) +
          ", other memory of this and other processes is " + format_bytes(report.others_bytes()) +
          ". Of the pool's memory " + format_bytes(report.allocated_bytes) +
          " is allocated by PyTorch, and " + format_bytes(unallocated_bytes) +
          " is reserved by PyTorch but unallocated";
  if (unallocated_bytes > 0) {
    std::array<char, 32> percent{};
    std::snprintf(percent.data(), percent.size(), " (%.0f %% fragmented)",
                  100.0 * report.fragmentation());
    text += ": " + format_bytes(report.waiting_bytes) + " is freed and still used by streams, " +
            format_bytes(report.cached_bytes) + " is free; the largest free block has " +
            format_bytes(report.largest_bytes) + percent.data();
  }
  return text + ". " + describe_details(report);
}

std::string describe_details(const OutOfMemoryReport& report) {
  return describe_tags(report) + describe_attempts(report) + describe_settings(report) +
         "Use a smaller batch, or move data off the device: spillover.offload_activations, "
         "spillover.stream_parameters, spillover.optim.";
}

}  // namespace spillover
