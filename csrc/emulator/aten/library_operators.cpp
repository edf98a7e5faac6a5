// Operators of other libraries than torch, such as torchvision's nms: where they have a CPU and a
// CUDA kernel, the CPU kernel runs in the CUDA kernel's place. Python calls this for the operators
// that a library brought, after it was loaded; under the GIL, so one thread at a time.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>

#include <memory>
#include <string_view>
#include <vector>

#include "emulator/aten/operator_kernel.hpp"
#include "emulator/aten/plan.hpp"

namespace spillover::emulator {
namespace {

// Those whose CUDA kernel waits, since it must know how large the result is.
bool is_synchronizing(std::string_view name) {
  return name == "torchvision::nms";
}

bool returns_view(const c10::FunctionSchema& schema) {
  for (const c10::Argument& result : schema.returns()) {
    const c10::AliasInfo* info = result.alias_info();
    if (info != nullptr && !info->isWrite()) return true;
  }
  return false;
}

// Torch warns about each kernel that is replaced, which is what this is for.
class NoWarnings final : public c10::WarningHandler {
 public:
  void process(const c10::Warning&) override {}
};

// Never destroyed: the dispatcher may be gone by then.
std::vector<c10::RegistrationHandleRAII>& registrations() {
  static auto* const handles = new std::vector<c10::RegistrationHandleRAII>();
  return *handles;
}

bool adopt(const c10::OperatorName& name) {
  const auto op = c10::Dispatcher::singleton().findSchema(name);
  if (!op || !op->hasKernelForDispatchKey(c10::DispatchKey::CPU) ||
      !op->hasKernelForDispatchKey(c10::DispatchKey::CUDA) || returns_view(op->schema())) {
    return false;
  }
  NoWarnings silent;
  const c10::WarningUtils::WarningHandlerGuard guard(&silent);
  OperatorPlan plan(op->schema());
  plan.synchronizes_host = is_synchronizing(op->schema().name());
  registrations().push_back(c10::Dispatcher::singleton().registerImpl(
      name, c10::DispatchKey::CUDA,
      c10::KernelFunction::makeFromBoxedFunctor(
          std::make_unique<EmulatedOperator>(std::move(plan), std::nullopt)),
      std::nullopt, nullptr, "spillover emulator"));
  return true;
}

}  // namespace
}  // namespace spillover::emulator

// 1 where the operator's CPU kernel now serves for CUDA, too; 0 where it stays as it is; -1 where
// the dispatcher refused.
extern "C" __attribute__((visibility("default"))) int spillover_emulator_adopt_operator(
    const char* name, const char* overload) noexcept {
  try {
    return spillover::emulator::adopt(c10::OperatorName(name, overload)) ? 1 : 0;
  } catch (const c10::Error&) {
    return -1;
  }
}
