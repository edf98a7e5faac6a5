// Decides for every ATen operator with a CUDA kernel whether the emulation replaces it, keeps it or
// refuses it, and registers the replacements. Runs once, while the library is loaded after torch.
#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>

#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "emulator/aten/accesses.hpp"
#include "emulator/aten/copy.hpp"
#include "emulator/aten/cost.hpp"
#include "emulator/aten/dry_run.hpp"
#include "emulator/aten/dry_values.hpp"
#include "emulator/aten/host_access.hpp"
#include "emulator/aten/operator_kernel.hpp"
#include "emulator/aten/own_kernels.hpp"
#include "emulator/aten/plan.hpp"
#include "emulator/aten/sparse_kernel.hpp"

namespace spillover::emulator {
namespace {

using c10::DispatchKey;

// CUDA's own code stays for operators that launch nothing themselves: they allocate, change
// metadata, ask the device for its properties, or copy through the runtime. Views stay too; see
// is_view.
const std::unordered_set<std::string_view> kKeptOperators = {
    "aten::_efficientzerotensor",
    "aten::_foreach_copy_",       // Ours, from copy.hpp.
    "aten::_fused_sdp_choice",    // Reads device properties; the same choice as on a GPU.
    "aten::_local_scalar_dense",  // Must really synchronise the stream.
    "aten::_pin_memory",
    "aten::_to_sparse",  // These are made of dense operators.
    "aten::_to_sparse_bsc",
    "aten::_to_sparse_bsr",
    "aten::_to_sparse_csc",
    "aten::_to_sparse_csr",
    "aten::_use_cudnn_ctc_loss",  // Answers no while cuDNN is off, or absent.
    "aten::_use_miopen_ctc_loss",
    "aten::empty",
    "aten::empty_strided",
    "aten::is_pinned",
    "aten::is_set_to",
    "aten::record_stream",
    "aten::resize_",
    "aten::set_",
};

// Operators without a CUDA kernel in the dispatcher whose composite kernel would pick one by
// itself.
const std::unordered_set<std::string_view> kChoosingOperators = {
    "aten::_convolution",
    "aten::convolution",
    "aten::convolution_backward",
    "aten::convolution_backward_overrideable",
    "aten::convolution_overrideable",
};

const char* reason_for_refusal(std::string_view name) {
  if (name.find("cudnn") != std::string_view::npos) return "the emulated device has no cuDNN";
  if (name.find("miopen") != std::string_view::npos) return "it belongs to AMD's ROCm";
  if (name.find("triton") != std::string_view::npos) return "it runs a Triton kernel";
  if (name.find("_cslt_") != std::string_view::npos) return "the emulated device has no cuSPARSELt";
  return "it has a CUDA kernel only, and no CPU kernel to run instead";
}

// A return that aliases an argument without being written is a view: the same code on every device.
bool is_view(const c10::FunctionSchema& schema) {
  for (const c10::Argument& result : schema.returns()) {
    const c10::AliasInfo* info = result.alias_info();
    if (info != nullptr && !info->isWrite()) return true;
  }
  return false;
}

bool has_kernel(const c10::OperatorHandle& op, DispatchKey key) {
  return op.hasKernelForDispatchKey(key);
}

bool runs_on_cpu(const c10::OperatorHandle& op) {
  return has_kernel(op, DispatchKey::CPU) ||
         has_kernel(op, DispatchKey::CompositeExplicitAutograd) ||
         has_kernel(op, DispatchKey::CompositeExplicitAutogradNonFunctional) ||
         has_kernel(op, DispatchKey::CompositeImplicitAutograd);
}

bool is_random_without_generator(const c10::OperatorHandle& op, const OperatorPlan& plan) {
  if (plan.generator_index >= 0) return false;
  for (const at::Tag tag : op.getTags()) {
    if (tag == at::Tag::nondeterministic_seeded) return true;
  }
  return false;
}

// Makes all registrations and keeps their handles. Never destroyed: the dispatcher may be gone by
// then.
class Registrar {
 public:
  Registrar() {
    add_attention_kernels(own_kernels_);
    add_varlen_attention_kernels(own_kernels_);
    add_efficient_attention_kernels(own_kernels_);
    add_normalization_kernels(own_kernels_);
    add_recurrent_kernels(own_kernels_);
    add_elementwise_kernels(own_kernels_);
    add_upcast_kernels(own_kernels_);
    add_statistics_kernels(own_kernels_);
    add_softmax_kernels(own_kernels_);
    add_embedding_kernels(own_kernels_);
  }

  void register_all() {
    for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
      if (!name.name.starts_with("aten::")) continue;
      const auto op = c10::Dispatcher::singleton().findSchema(name);
      if (!op) continue;
      register_on_device(*op);
      register_sparse(*op, DispatchKey::SparseCUDA, DispatchKey::SparseCPU);
      register_sparse(*op, DispatchKey::SparseCsrCUDA, DispatchKey::SparseCsrCPU);
      if (hazards_enabled() || dry_run_enabled() || clock_enabled()) register_watch(*op);
    }
    add(c10::OperatorName("aten::copy_", ""), DispatchKey::CUDA,
        c10::KernelFunction::makeFromUnboxedFunction(TORCH_FN(copy_)));
    add(c10::OperatorName("aten::_foreach_copy_", ""), DispatchKey::CUDA,
        c10::KernelFunction::makeFromUnboxedFunction(TORCH_FN(foreach_copy_)));
    if (dry_run_enabled()) {
      add(c10::OperatorName("aten::_local_scalar_dense", ""), DispatchKey::CUDA,
          c10::KernelFunction::makeFromUnboxedFunction(TORCH_FN(scalar_of)));
    }
  }

 private:
  void register_on_device(const c10::OperatorHandle& op) {
    const c10::FunctionSchema& schema = op.schema();
    const std::string_view base = schema.name();
    if (!has_kernel(op, DispatchKey::CUDA) && kChoosingOperators.count(base) == 0) return;
    if (kKeptOperators.count(base) != 0 || is_view(schema)) return;

    OperatorPlan plan(schema);
    const auto own = own_kernels_.find(plan.name);
    if (own != own_kernels_.end()) {
      add_emulated(op, std::move(plan), own->second);
    } else if (!runs_on_cpu(op)) {
      add_unsupported(op, DispatchKey::CUDA, reason_for_refusal(base));
    } else if (is_random_without_generator(op, plan)) {
      add_unsupported(op, DispatchKey::CUDA, "it is random and takes no generator");
    } else {
      add_emulated(op, std::move(plan), std::nullopt);
    }
  }

  void register_sparse(const c10::OperatorHandle& op, DispatchKey key, DispatchKey host_key) {
    if (!has_kernel(op, key) || !launches_sparse_kernels(op.schema().name())) return;
    if (dry_run_enabled()) {
      add_unsupported(op, key,
                      "a dry run has no sparse tensors: how large they are depends on data");
    } else if (has_kernel(op, host_key)) {
      add(op.operator_name(), key,
          c10::KernelFunction::makeFromBoxedFunctor(
              std::make_unique<EmulatedSparseOperator>(OperatorPlan(op.schema()), host_key)));
    } else {
      add_unsupported(op, key, "the CPU has no kernel for sparse tensors to run instead");
    }
  }

  // See Note [Watching CPU operators].
  void register_watch(const c10::OperatorHandle& op) {
    const bool is_copy = op.schema().name() == "aten::copy_" && op.schema().overload_name().empty();
    if (!has_kernel(op, DispatchKey::CPU) && !is_copy) return;
    if (has_kernel(op, DispatchKey::BackendSelect) || is_view(op.schema())) return;
    if (op.schema().name() != "aten::_local_scalar_dense" &&
        kKeptOperators.count(op.schema().name()) != 0) {
      return;
    }
    OperatorPlan plan(op.schema());
    if (!plan.has_tensor_arguments) return;
    add(op.operator_name(), DispatchKey::BackendSelect,
        c10::KernelFunction::makeFromBoxedFunctor(
            std::make_unique<WatchedOperator>(std::move(plan))));
  }

  void add_emulated(const c10::OperatorHandle& op, OperatorPlan plan,
                    std::optional<c10::KernelFunction> kernel) {
    add(op.operator_name(), DispatchKey::CUDA,
        c10::KernelFunction::makeFromBoxedFunctor(
            std::make_unique<EmulatedOperator>(std::move(plan), std::move(kernel))));
  }

  void add_unsupported(const c10::OperatorHandle& op, DispatchKey key, const char* reason) {
    add(op.operator_name(), key,
        c10::KernelFunction::makeFromBoxedFunctor(std::make_unique<UnsupportedOperator>(reason)));
  }

  void add(const c10::OperatorName& name, DispatchKey key, c10::KernelFunction kernel) {
    handles_.push_back(c10::Dispatcher::singleton().registerImpl(
        name, key, std::move(kernel), std::nullopt, nullptr, "spillover emulator"));
  }

  KernelTable own_kernels_;
  std::vector<c10::RegistrationHandleRAII> handles_;
};

// Torch warns about every replaced kernel; replacing them is what this library is for.
class SilentWarnings final : public c10::WarningHandler {
 public:
  void process(const c10::Warning&) override {}
};

struct Loader {
  Loader() {
    spillover_emulator_follow_captured_values();
    SilentWarnings silent;
    const c10::WarningUtils::WarningHandlerGuard guard(&silent);
    static auto* const registrar = new Registrar();
    registrar->register_all();
    at::globalContext().setUserEnabledCuDNN(false);
    at::globalContext().setSDPUseCuDNN(false);
  }
};

const Loader loader;

}  // namespace
}  // namespace spillover::emulator
