#include "emulator/aten/dry_run.hpp"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <iterator>
#include <string_view>
#include <utility>

#include "emulator/aten/dry_kernels.hpp"
#include "emulator/aten/dry_masks.hpp"
#include "emulator/aten/dry_twins.hpp"
#include "emulator/aten/dry_values.hpp"
#include "emulator/aten/routing.hpp"
#include "emulator/core/dry_api.h"

namespace spillover::emulator {
namespace {

thread_local const char* operator_of_thread = nullptr;

// Arguments of the emulation's own kernels that these read on the host: offsets of packed sequences
// and positions of random streams, which are small and so have values.
constexpr std::string_view kArgumentsReadByOwnKernels[] = {
    "cu_seqlens_k",  "cu_seqlens_q", "cum_seq_k", "cum_seq_q", "offset",
    "philox_offset", "philox_seed",  "rng_state", "seed",      "seqlen_k",
};

// A GPU's kernel sets it where a gradient is not finite. A dry run's gradients are taken as finite.
constexpr std::string_view kFoundInfArgument = "found_inf";

// What LAPACK's kernels say of a factorisation; 0 says that it succeeded, and is taken so.
constexpr std::string_view kInfo = "info";

bool is_read_by_own_kernel(const ArgumentPlan& argument) {
  return std::find(std::begin(kArgumentsReadByOwnKernels), std::end(kArgumentsReadByOwnKernels),
                   argument.name) != std::end(kArgumentsReadByOwnKernels);
}

// One operator on one thread's stack.
class DryCall {
 public:
  DryCall(const OperatorPlan& plan, const std::optional<c10::KernelFunction>& own_kernel,
          const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : plan_(plan),
        own_kernel_(own_kernel),
        op_(op),
        stack_(stack),
        first_(stack->size() - plan.arguments.size()),
        arguments_(stack->begin() + static_cast<ptrdiff_t>(first_), stack->end()) {}

  void run(c10::function_ref<void()> run_for_real) {
    const bool known = inputs_are_known() && written_are_small();
    if (known && plan_.writes_in_place) return finish_real(run_for_real);
    if (!known) refuse_values_on_host();
    if (!run_meta(known) || (known && results_are_small())) {
      torch::jit::drop(*stack_, stack_->size() - first_);
      stack_->insert(stack_->end(), arguments_.begin(), arguments_.end());
      return finish_real(run_for_real);
    }
    finish_phantom();
  }

  void run_on_host() {
    on_host_ = true;
    run_meta(/*may_run_for_real=*/false);
    finish_phantom();
    for (size_t i = first_; i < stack_->size(); ++i) give_host_memory((*stack_)[i]);
    for_each_tensor([](const at::Tensor& tensor, const ArgumentPlan& argument) {
      if (argument.is_written) bind_unknown_to_storage(tensor);
    });
  }

 private:
  template <typename Function>
  void for_each_tensor(Function&& function) const {
    for (size_t i = 0; i < arguments_.size(); ++i) {
      const ArgumentPlan& argument = plan_.arguments[i];
      if (arguments_[i].isTensor()) {
        if (arguments_[i].toTensor().defined()) function(arguments_[i].toTensor(), argument);
      } else if (argument.kind == ArgumentKind::kTensorList && arguments_[i].isList()) {
        for (const c10::IValue& element : arguments_[i].toListRef()) {
          if (element.isTensor() && element.toTensor().defined()) {
            function(element.toTensor(), argument);
          }
        }
      }
    }
  }

  bool inputs_are_known() const {
    for (size_t i = 0; i < arguments_.size(); ++i) {
      const ArgumentPlan& argument = plan_.arguments[i];
      if (argument.is_overwritten) continue;
      if (arguments_[i].isTensor()) {
        if (!is_known(arguments_[i].toTensor())) return false;
      } else if (argument.kind == ArgumentKind::kTensorList && arguments_[i].isList()) {
        for (const c10::IValue& element : arguments_[i].toListRef()) {
          if (element.isTensor() && !is_known(element.toTensor())) return false;
        }
      }
    }
    return true;
  }

  bool written_are_small() const {
    bool small = true;
    for_each_tensor([&](const at::Tensor& tensor, const ArgumentPlan& argument) {
      if (argument.is_written) small = small && is_small(tensor);
    });
    return small;
  }

  void finish_real(c10::function_ref<void()> run_for_real) {
    run_for_real();
    for_each_tensor([](const at::Tensor& tensor, const ArgumentPlan& argument) {
      if (argument.is_written) set_known(tensor, true);
    });
  }

  // Operators whose result is a number for the host, or as long as the data says.
  void refuse_values_on_host() const {
    if (plan_.synchronizes_host && !size_is_given() && !selects_by_known_mask(plan_, arguments_)) {
      refuse_unknown(plan_.name,
                     "the size of its result depends on data that is not known. A mixture of "
                     "experts runs where it is said how it routes: --routing uniform "
                     "(SPILLOVER_EMULATOR_ROUTING)");
    }
    if (!indexes_by_masks()) return;
    for_each_tensor([&](const at::Tensor& tensor, const ArgumentPlan& argument) {
      if (argument.kind == ArgumentKind::kTensorList && is_mask(tensor) && !is_known(tensor)) {
        refuse_unknown(plan_.name,
                       "indexing by a mask gives as many elements as the mask has, and "
                       "it is not known");
      }
    });
  }

  bool size_is_given() const {
    return plan_.name == "aten::equal" ||
           (plan_.name == "aten::repeat_interleave.Tensor" && !arguments_[1].isNone());
  }

  // Not index_put_, which writes where the mask says.
  bool indexes_by_masks() const {
    return plan_.synchronizes_for_masks && !plan_.returned_arguments.empty() &&
           plan_.returned_arguments[0] < 0;
  }

  c10::IValue meta_argument(const c10::IValue& value, const ArgumentPlan& argument) {
    switch (argument.kind) {
      case ArgumentKind::kTensor:
        return value.isTensor() ? c10::IValue(meta_tensor(value.toTensor(), argument)) : value;
      case ArgumentKind::kTensorList: {
        if (!value.isList()) return value;
        const c10::impl::GenericList list = value.toList();
        c10::impl::GenericList converted(list.elementType());
        converted.reserve(list.size());
        for (const c10::IValue& element : value.toListRef()) {
          if (!element.isTensor()) {
            converted.push_back(element);
          } else if (indexes_by_masks() && is_mask(element.toTensor())) {
            for (const at::Tensor& places : places_of(element.toTensor())) {
              converted.push_back(twins_.twin(places));
            }
          } else {
            converted.push_back(meta_tensor(element.toTensor(), argument));
          }
        }
        return converted;
      }
      case ArgumentKind::kGenerator:
        return c10::IValue();  // its offset has moved on already
      case ArgumentKind::kDevice:
        return c10::Device(c10::DeviceType::Meta);
      case ArgumentKind::kOther:
        return value;
    }
    return value;
  }

  at::Tensor meta_tensor(const at::Tensor& host, const ArgumentPlan& argument) {
    if (!host.defined() || !host.is_cpu() || host.layout() != at::kStrided) return host;
    // Kernels take numbers that are tensors on the CPU as they are.
    if (host.unsafeGetTensorImpl()->is_wrapped_number()) return host;
    if (!on_host_ && host.dim() == 0 && !aliases_device(host)) return host;
    if (own_kernel_ && is_read_by_own_kernel(argument) && is_known(host)) return host;
    at::Tensor meta = twins_.twin(host);
    if (argument.is_written) written_.push_back({host, meta});
    return meta;
  }

  // False where the operator has no rule for its shapes but may run for real.
  bool run_meta(bool may_run_for_real) {
    if (plan_.writes_in_place) {
      torch::jit::drop(*stack_, arguments_.size());
      for (const int index : plan_.returned_arguments) {
        stack_->push_back(arguments_[static_cast<size_t>(index)]);
      }
      return true;
    }
    for (size_t i = 0; i < arguments_.size(); ++i) {
      (*stack_)[first_ + i] = meta_argument(arguments_[i], plan_.arguments[i]);
    }
    const c10::DispatchKeySet meta_keys(c10::DispatchKey::Meta);
    const MetaScope scope;
    try {
      if (selects_by_known_mask(plan_, arguments_)) {
        torch::jit::drop(*stack_, arguments_.size());
        stack_->emplace_back(selected_by_mask(arguments_));
      } else if (const c10::KernelFunction* phantom = find_phantom_kernel(plan_.name)) {
        phantom->callBoxed(op_, meta_keys, stack_);
      } else if (own_kernel_) {
        own_kernel_->callBoxed(op_, meta_keys, stack_);
      } else {
        op_.redispatchBoxed(meta_keys, stack_);
      }
    } catch (const c10::NotImplementedError&) {
      if (may_run_for_real) return false;
      refuse_unknown(plan_.name,
                     "nothing but its data tells what it returns (it has no meta kernel)");
    } catch (c10::Error& error) {
      if (may_run_for_real) return false;
      error.add_context("spillover dry run: the shapes of " + plan_.name + " were asked for");
      throw;
    } catch (const std::exception&) {
      if (may_run_for_real) return false;
      throw;
    }
    return true;
  }

  bool results_are_small() const {
    const auto counts = [&](const at::Tensor& tensor) {
      return !twins_.is_fresh(tensor) ||
             tensor.storage().nbytes() <= known_bytes_max(tensor.scalar_type());
    };
    for (const Written& written : written_) {
      if (written.meta.storage().nbytes() > known_bytes_max(written.meta.scalar_type()) &&
          written.meta.storage().nbytes() > written.host.storage().nbytes()) {
        return false;
      }
    }
    for (size_t i = first_; i < stack_->size(); ++i) {
      const c10::IValue& value = (*stack_)[i];
      if (value.isTensor() && value.toTensor().defined() && !counts(value.toTensor())) return false;
      if (!value.isTensorList()) continue;
      for (const c10::IValue& element : value.toListRef()) {
        if (element.toTensor().defined() && !counts(element.toTensor())) return false;
      }
    }
    return true;
  }

  void finish_phantom() {
    for_each_tensor([&](const at::Tensor& tensor, const ArgumentPlan& argument) {
      if (!argument.is_written || argument.name == kFoundInfArgument) return;
      set_known(tensor, false);
      note_producer(tensor, plan_.name.c_str());
    });
    for (const Written& written : written_) {
      if (!on_host_) {
        twins_.commit(written.host, written.meta);
      } else if (written.host.sizes() != written.meta.sizes()) {
        written.host.resize_(written.meta.sizes());
        set_known(written.host, false);
      }
    }
    for (size_t i = first_; i < stack_->size(); ++i) convert_result((*stack_)[i], i - first_);
    if (on_host_) return;
    assume_success();
    if (const auto experts = routed_experts(plan_, arguments_)) stack_->back() = *experts;
  }

  void assume_success() {
    const auto& returns = op_.schema().returns();
    for (size_t i = 0; i < returns.size(); ++i) {
      c10::IValue& value = (*stack_)[first_ + i];
      if (returns[i].name() != kInfo || !value.isTensor()) continue;
      if (plan_.returned_arguments[i] < 0) {
        value = at::zeros(value.toTensor().sizes(), value.toTensor().options());
      } else {
        value.toTensor().zero_();
        set_known(value.toTensor(), true);
      }
    }
  }

  void convert_result(c10::IValue& value, size_t index) const {
    const bool is_argument =
        index < plan_.returned_arguments.size() && plan_.returned_arguments[index] >= 0;
    if (is_argument) {
      value = arguments_[static_cast<size_t>(plan_.returned_arguments[index])];
    } else if (value.isTensor()) {
      value = twins_.to_host(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> converted;
      for (const c10::IValue& element : value.toListRef()) {
        converted.push_back(twins_.to_host(element.toTensor()));
      }
      value = std::move(converted);
    }
  }

  // Results of operators on the host are ordinary tensors there.
  static void give_host_memory(c10::IValue& value) {
    if (value.isTensor()) {
      value = with_host_memory(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> converted;
      for (const c10::IValue& element : value.toListRef()) {
        converted.push_back(with_host_memory(element.toTensor()));
      }
      value = std::move(converted);
    }
  }

  static at::Tensor with_host_memory(const at::Tensor& tensor) {
    if (!tensor.defined() || !is_phantom(tensor.storage().data())) return tensor;
    at::Tensor memory = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options());
    set_known(memory, false);
    bind_unknown_to_storage(memory);
    return memory;
  }

  struct Written {
    at::Tensor host;
    at::Tensor meta;
  };

  const OperatorPlan& plan_;
  const std::optional<c10::KernelFunction>& own_kernel_;
  const c10::OperatorHandle& op_;
  torch::jit::Stack* const stack_;
  const size_t first_;
  const c10::SmallVector<c10::IValue, 8> arguments_;
  MetaTwins twins_;
  c10::SmallVector<Written, 4> written_;
  bool on_host_ = false;
};

// The one operator that returns a truth about data.
bool answer_equal(const OperatorPlan& plan, torch::jit::Stack* stack) {
  if (plan.name != "aten::equal") return false;
  const at::Tensor self = stack->at(stack->size() - 2).toTensor();
  const at::Tensor other = stack->back().toTensor();
  if (self.sizes() == other.sizes() && is_known(self) && is_known(other)) return false;
  const bool equal =
      self.sizes() == other.sizes() && unknown_value(plan.name, self.storage().data()) != 0;
  torch::jit::drop(*stack, 2);
  stack->emplace_back(equal);
  return true;
}

}  // namespace

bool dry_run_enabled() {
  static const bool enabled = spillover_emulator_is_dry() != 0;
  return enabled;
}

void begin_dry_operator(const OperatorPlan& plan) {
  operator_of_thread = plan.name.c_str();
}

void run_dry(const OperatorPlan& plan, const std::optional<c10::KernelFunction>& own_kernel,
             const c10::OperatorHandle& op, torch::jit::Stack* stack,
             c10::function_ref<void()> run_for_real) {
  if (answer_equal(plan, stack)) return;
  DryCall(plan, own_kernel, op, stack).run(run_for_real);
}

void run_phantom_on_host(const OperatorPlan& plan, const c10::OperatorHandle& op,
                         torch::jit::Stack* stack) {
  static const std::optional<c10::KernelFunction> no_kernel;
  const c10::impl::ExcludeDispatchKeyGuard below_autograd(
      c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset);
  DryCall(plan, no_kernel, op, stack).run_on_host();
}

bool take_arrival(const void* target, const void* bytes, size_t size_bytes) {
  if (bytes == nullptr) return false;  // in place: whoever wrote them knows
  const bool is_real = !is_phantom(bytes);
  spillover_emulator_set_known(target, size_bytes, is_real ? 1 : 0);
  if (!is_real) note_producer(target, size_bytes, operator_of_thread);
  return is_real;
}

bool copy_phantom(const at::Tensor& self, const at::Tensor& source) {
  operator_of_thread = "aten::copy_";
  if (is_known(source) && is_small(self)) return false;
  TORCH_CHECK(at::is_expandable_to(source.sizes(), self.sizes()), "The size of the source (",
              source.sizes(), ") cannot be expanded to that of the target (", self.sizes(), ")");
  set_known(self, false);
  note_producer(self, operator_of_thread);
  return true;
}

void finish_real_copy(const at::Tensor& self) {
  set_known(self, true);
}

const char* last_dry_operator() {
  return operator_of_thread;
}

}  // namespace spillover::emulator
