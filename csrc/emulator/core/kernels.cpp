#include "emulator/core/kernels.hpp"

#include <cxxabi.h>

#include <cstdlib>
#include <memory>
#include <utility>

#include "emulator/core/clock/clock.hpp"
#include "emulator/core/config.hpp"

namespace spillover::emulator {
namespace {

// The name as the source code has it; a name that is not mangled stays as it is.
std::string demangled(const std::string& name) {
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> text(
      abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status), &std::free);
  return status == 0 ? text.get() : name;
}

}  // namespace

void Kernels::add(RegisteredKernel kernel) {
  const auto [position, is_new] = kernels_.try_emplace(kernel.name);
  RegisteredKernel& place = position->second;
  // The name stays where it is: queued operations point to its characters.
  if (is_new) {
    place.name = position->first;
    place.title = demangled(place.name);
  }
  place.body = kernel.body;
  place.user = kernel.user;
  place.parameter_bytes = std::move(kernel.parameter_bytes);
  place.accesses = nullptr;
}

std::vector<KernelAccess> RegisteredKernel::accesses_of(
    const spillover_emulator_launch_shape& shape, void** parameters) const {
  if (accesses == nullptr) return {};
  std::vector<spillover_emulator_range> ranges(16);
  for (bool is_all = false; !is_all;) {
    const std::size_t count =
        accesses(parameters, &shape, accesses_user, ranges.data(), ranges.size());
    is_all = count <= ranges.size();
    ranges.resize(count);
  }
  std::vector<KernelAccess> found;
  for (const spillover_emulator_range& range : ranges) {
    found.push_back(
        {reinterpret_cast<Address>(range.pointer), range.size_bytes, range.is_write != 0});
  }
  return found;
}

OperationCost launch_cost(const Clock& clock, const RegisteredKernel& kernel,
                          const std::vector<KernelAccess>& accesses) {
  if (!clock.enabled()) return {};
  std::uint64_t size_bytes = 0;
  for (const KernelAccess& access : accesses) size_bytes += access.size_bytes;
  OperationCost cost = clock.bytes_bound_cost(size_bytes);
  cost.name = kernel.title.c_str();
  return cost;
}

bool Kernels::declare(const std::string& name, spillover_emulator_kernel_accesses accesses,
                      void* user) {
  const auto position = kernels_.find(name);
  if (position == kernels_.end()) return false;
  position->second.accesses = accesses;
  position->second.accesses_user = user;
  return true;
}

RegisteredKernel* Kernels::find(const std::string& name) {
  const auto position = kernels_.find(name);
  if (position != kernels_.end()) return &position->second;
  if (!std::exchange(reported_[name], true) || config().verbose) {
    report("kernel %s has no body on the host, so it cannot run on the emulated device",
           demangled(name).c_str());
  }
  return nullptr;
}

const RegisteredKernel* Kernels::check(const void* handle) const {
  for (const auto& [name, kernel] : kernels_) {
    if (&kernel == handle) return &kernel;
  }
  return nullptr;
}

KernelLaunch::KernelLaunch(const RegisteredKernel& kernel,
                           const spillover_emulator_launch_shape& shape, void** parameters)
    : body_(kernel.body), user_(kernel.user), shape_(shape) {
  for (std::size_t i = 0; i < kernel.parameter_bytes.size(); ++i) {
    const auto* bytes = static_cast<const unsigned char*>(parameters[i]);
    values_.emplace_back(bytes, bytes + kernel.parameter_bytes[i]);
  }
}

void KernelLaunch::run(void* launch) {
  const std::unique_ptr<KernelLaunch> self(static_cast<KernelLaunch*>(launch));
  self->call();
}

void KernelLaunch::call() {
  std::vector<void*> parameters;
  for (auto& value : values_) parameters.push_back(value.data());
  body_(parameters.data(), &shape_, user_);
}

KernelBody KernelLaunch::shared(std::unique_ptr<KernelLaunch> launch) {
  KernelBody body;
  body.run = [](void* argument, char*, std::size_t) {
    // A body may write to its arguments, as a kernel to its parameters: each launch has new ones.
    KernelLaunch(*static_cast<const KernelLaunch*>(argument)).call();
    return static_cast<int>(CUDA_SUCCESS);
  };
  body.argument = launch.release();
  body.release = [](void* argument) { delete static_cast<KernelLaunch*>(argument); };
  return body;
}

KernelBody repeated(void (*function)(void*), void* argument) {
  using Call = std::pair<void (*)(void*), void*>;
  KernelBody body;
  body.run = [](void* call, char*, std::size_t) {
    const auto& [called, with] = *static_cast<const Call*>(call);
    called(with);
    return static_cast<int>(CUDA_SUCCESS);
  };
  body.argument = new Call(function, argument);
  body.release = [](void* call) { delete static_cast<Call*>(call); };
  return body;
}

void KernelLaunch::drop(void* launch) {
  delete static_cast<KernelLaunch*>(launch);
}

}  // namespace spillover::emulator
