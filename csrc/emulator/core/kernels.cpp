#include "emulator/core/kernels.hpp"

#include <memory>
#include <utility>

#include "emulator/core/config.hpp"

namespace spillover::emulator {

void Kernels::add(RegisteredKernel kernel) {
  RegisteredKernel& place = kernels_[kernel.name];
  place = std::move(kernel);
}

RegisteredKernel* Kernels::find(const std::string& name) {
  const auto position = kernels_.find(name);
  if (position != kernels_.end()) return &position->second;
  if (!std::exchange(reported_[name], true) || config().verbose) {
    report("kernel %s has no body on the host, so it cannot run on the emulated device",
           name.c_str());
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
  std::vector<void*> parameters;
  for (auto& value : self->values_) parameters.push_back(value.data());
  self->body_(parameters.data(), &self->shape_, self->user_);
}

}  // namespace spillover::emulator
