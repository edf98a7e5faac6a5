#include "optim/dispatch.hpp"

#include <atomic>
#include <cstdlib>

#include "base/error.hpp"
#include "optim/kernel_table.hpp"

namespace spillover {
namespace {

constexpr const char* kVariable = "SPILLOVER_OPTIM_ISA";

// Those that are built and that this processor runs, the fastest last.
std::vector<const KernelTable*> usable_kernels() {
  std::vector<const KernelTable*> found{portable_kernels()};
#if defined(__x86_64__)
  // These ask for the operating system's support of the registers, too.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    found.push_back(avx2_kernels());
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    found.push_back(avx512_kernels());
  }
#endif
  found.push_back(neon_kernels());
  std::erase(found, nullptr);
  return found;
}

const std::vector<const KernelTable*>& usable() {
  static const auto& found = *new std::vector<const KernelTable*>(usable_kernels());
  return found;
}

const KernelTable* named(const std::string& name, const std::string& asked_by) {
  std::string all;
  for (const KernelTable* table : usable()) {
    if (name == table->name) return table;
    all += (all.empty() ? "" : ", ") + std::string(table->name);
  }
  throw ConfigError(asked_by + "'" + name +
                    "' is no instruction set that this processor runs; it runs: " + all);
}

const KernelTable* chosen() {
  const char* name = std::getenv(kVariable);
  if (name == nullptr || *name == '\0') return usable().back();
  return named(name, std::string(kVariable) + "=");
}

std::atomic<const KernelTable*> g_kernels{nullptr};

}  // namespace

const KernelTable& kernels() {
  const KernelTable* found = g_kernels.load(std::memory_order_acquire);
  if (found == nullptr) {
    found = chosen();
    g_kernels.store(found, std::memory_order_release);
  }
  return *found;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const KernelTable* table : usable()) names.emplace_back(table->name);
  return names;
}

std::string instruction_set() {
  return kernels().name;
}

void set_instruction_set(const std::string& name) {
  g_kernels.store(named(name, ""), std::memory_order_release);
}

}  // namespace spillover
