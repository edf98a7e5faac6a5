#include "emulator/aten/operator_kernel.hpp"

#include <ATen/core/List.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstring>
#include <utility>

#include "emulator/aten/accesses.hpp"
#include "emulator/aten/alias_map.hpp"
#include "emulator/aten/captured_call.hpp"
#include "emulator/aten/dry_run.hpp"
#include "emulator/aten/operands.hpp"
#include "emulator/aten/random.hpp"
#include "emulator/aten/workspace.hpp"
#include "emulator/core/c_api.h"

namespace spillover::emulator {
namespace {

using Values = c10::SmallVector<c10::IValue, 8>;

// Finds the device that the arguments are on, and refuses a mixture as CUDA's kernels do: with the
// CPU kernels, cuda + cpu would silently succeed.
class Placement {
 public:
  Placement(const OperatorPlan& plan, const c10::IValue* arguments) : plan_(plan) {
    for (size_t i = 0; i < plan.arguments.size(); ++i) {
      const c10::IValue& value = arguments[i];
      if (value.isTensor()) {
        see(value.toTensor());
      } else if (plan.arguments[i].kind == ArgumentKind::kTensorList && value.isList()) {
        for (const c10::IValue& element : value.toListRef()) {
          if (element.isTensor()) see(element.toTensor());
        }
      } else if (plan.arguments[i].kind == ArgumentKind::kDevice && value.isDevice()) {
        requested_ = value.toDevice().index();
      }
    }
    if (device_ < 0) device_ = requested_;
    if (device_ < 0) device_ = c10::cuda::current_device();
    if (conflict_.has_value() && saw_device_ && !is_spread()) raise_conflict();
  }

  c10::DeviceIndex device() const { return device_; }

  // Lists of tensors on several devices, which CUDA takes one by one.
  bool is_spread() const {
    return plan_.takes_spread_lists && conflict_.has_value() && conflict_->is_cuda();
  }

 private:
  void see(const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    if (tensor.is_cuda()) {
      saw_device_ = true;
      if (device_ < 0) device_ = tensor.device().index();
      if (tensor.device().index() != device_) conflict_ = tensor.device();
    } else if (tensor.dim() > 0) {
      conflict_ = tensor.device();
    }
  }

  void raise_conflict() const {
    if (plan_.allows_host_tensors) return;
    TORCH_CHECK(false,
                "Expected all tensors to be on the same device, but found at least two devices, ",
                c10::Device(c10::DeviceType::CUDA, device_), " and ", *conflict_,
                "! (when checking arguments of ", plan_.name, ")");
  }

  const OperatorPlan& plan_;
  c10::DeviceIndex device_ = -1;
  c10::DeviceIndex requested_ = -1;
  bool saw_device_ = false;
  std::optional<c10::Device> conflict_;
};

// Asking torch for a stream's handle switches devices there and back, which the default stream, the
// most common one, does not need: its handle is null.
cudaStream_t raw_stream(const c10::cuda::CUDAStream& stream) {
  return stream.id() == 0 ? nullptr : stream.stream();
}

// One call of one operator: the conversion of its arguments and results.
class OperatorCall {
 public:
  OperatorCall(const OperatorPlan& plan, const c10::cuda::CUDAStream& stream)
      : plan_(plan),
        device_(stream.device_index()),
        stream_(raw_stream(stream)),
        checking_(hazards_enabled()) {}

  // Replaces the arguments on the stack by what the CPU kernel works on, keeps the originals, and
  // waits until the kernel may read them.
  void begin(c10::IValue* arguments) {
    for (size_t i = 0; i < plan_.arguments.size(); ++i) {
      originals_.push_back(std::move(arguments[i]));
      arguments[i] = convert(originals_.back(), plan_.arguments[i]);
    }
    enter();
    ranges_.clear();
  }

  // Replaces the results on the stack by CUDA tensors.
  void convert_results(torch::jit::Stack* stack, size_t first, const CostRule& cost_rule,
                       const TemporaryRule& temporary_rule) {
    aliases_.commit_resizes(arrivals_);
    for (const Arrival& resized : arrivals_) {
      ranges_.push_back({resized.target, resized.size_bytes, /*is_write=*/1});
    }
    for (size_t i = first; i < stack->size(); ++i) {
      const size_t result = i - first;
      const bool known = result < plan_.returned_arguments.size();
      if (known && plan_.returned_arguments[result] >= 0) {
        (*stack)[i] = originals_[static_cast<size_t>(plan_.returned_arguments[result])];
      } else if (result >= 32 || (plan_.host_returns >> result & 1U) == 0) {
        convert_result((*stack)[i]);
      }
    }
    const c10::ArrayRef<c10::IValue> results(stack->data() + first, stack->size() - first);
    temporary_rule.allocate({plan_, originals_, results});
    fill_arrivals();
    if (clock_enabled()) {
      charge_kernel(stream_, plan_.name.c_str(), cost_rule({plan_, originals_, results}));
    }
    if (plan_.synchronizes_host || has_mask_) c10::cuda::stream_synchronize(stream_);
  }

 private:
  c10::IValue convert(const c10::IValue& value, const ArgumentPlan& argument) {
    switch (argument.kind) {
      case ArgumentKind::kTensor:
        if (!value.isTensor() || !is_device_tensor(value.toTensor())) return value;
        return alias(value.toTensor(), argument.is_written);
      case ArgumentKind::kTensorList:
        return value.isList() ? convert_list(value, argument.is_written) : value;
      case ArgumentKind::kGenerator:
        return host_generator(value, device_);
      case ArgumentKind::kDevice:
        return c10::Device(c10::DeviceType::CPU);
      case ArgumentKind::kOther:
        return value;
    }
    return value;
  }

  c10::IValue convert_list(const c10::IValue& value, bool is_written) {
    const c10::impl::GenericList list = value.toList();
    c10::impl::GenericList converted(list.elementType());
    converted.reserve(list.size());
    for (const c10::IValue& element : value.toListRef()) {
      if (element.isTensor() && is_device_tensor(element.toTensor())) {
        const at::Tensor& tensor = element.toTensor();
        has_mask_ |= plan_.synchronizes_for_masks && is_mask(tensor);
        converted.push_back(alias(tensor, is_written));
      } else {
        converted.push_back(element);
      }
    }
    return converted;
  }

  static bool is_mask(const at::Tensor& tensor) {
    return tensor.scalar_type() == at::kBool || tensor.scalar_type() == at::kByte;
  }

  at::Tensor alias(const at::Tensor& tensor, bool is_written) {
    if (checking_) append_ranges(tensor, is_written, ranges_);
    return aliases_.alias(tensor, is_written);
  }

  void convert_result(c10::IValue& value) {
    if (value.isTensor()) {
      value = to_device(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> converted;
      for (const c10::IValue& element : value.toListRef()) {
        converted.push_back(to_device(element.toTensor()));
      }
      value = std::move(converted);
    }
  }

  at::Tensor to_device(const at::Tensor& host) {
    if (!host.defined() || !host.device().is_cpu()) return host;
    TORCH_CHECK_NOT_IMPLEMENTED(host.layout() == at::kStrided, "spillover emulator: operator ",
                                plan_.name, " is not emulated where it returns a tensor of layout ",
                                host.layout(), "; run it on the CPU");
    if (c10::StorageImpl* storage = aliases_.device_storage_of(host)) return view(host, storage);
    at::Tensor device = allocate_like(host);
    if (checking_) append_ranges(device, /*is_written=*/true, ranges_);
    return device;
  }

  // A result that is a view of an argument, though the schema does not say so.
  static at::Tensor view(const at::Tensor& host, c10::StorageImpl* storage) {
    c10::Storage shared(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(storage));
    at::Tensor device = at::detail::make_tensor<c10::TensorImpl>(
        std::move(shared), c10::DispatchKeySet(c10::DispatchKey::CUDA), host.dtype());
    c10::TensorImpl* impl = device.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    if (host.is_conj()) impl->_set_conj(true);
    if (host.is_neg()) impl->_set_neg(true);
    return device;
  }

  // A new CUDA tensor that is to have a CPU result's bytes. It is put together here and not by
  // torch's factory, whose checks of devices and options are a large part of what a small operator
  // costs.
  at::Tensor allocate_like(const at::Tensor& host) {
    // Equal strides on both sides: the covering extent can be copied at once, gaps included.
    int64_t extent = host.numel() == 0 ? 0 : 1;
    for (int64_t i = 0; extent != 0 && i < host.dim(); ++i) {
      extent += (host.size(i) - 1) * host.stride(i);
    }
    const size_t size_bytes = static_cast<size_t>(extent) * host.element_size();
    c10::Allocator* allocator = c10::cuda::CUDACachingAllocator::get();
    at::Tensor device = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(c10::Storage::use_byte_size_t(), size_bytes, allocator->allocate(size_bytes),
                     allocator, /*resizable=*/true),
        c10::DispatchKeySet(c10::DispatchKey::CUDA), host.dtype());
    c10::TensorImpl* impl = device.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(host.sizes(), host.strides());
    if (host.is_conj()) impl->_set_conj(true);
    if (host.is_neg()) impl->_set_neg(true);
    if (host.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    if (size_bytes != 0) {
      arrivals_.push_back(
          {device.storage().data(), host.const_data_ptr(), size_bytes, host.storage()});
    }
    return device;
  }

  void enter() {
    const OperandScope operands(plan_, originals_.data(), originals_.size());
    begin_operator(stream_, plan_.name.c_str(), ranges_);
  }

  // Writes the results into the memory that was allocated for them. While the kernel ran, another
  // host thread may have made this stream wait for a copy into this very memory, and then freed it:
  // on a device the kernel would come after that wait, so the operator begins once more.
  void fill_arrivals() {
    if (arrivals_.empty() && ranges_.empty()) return;
    enter();
    for (const Arrival& arrival : arrivals_) {
      if (is_dry_ && !take_arrival(arrival.target, arrival.bytes, arrival.size_bytes)) continue;
      if (arrival.bytes == nullptr) continue;
      std::memcpy(spillover_emulator_host_pointer(arrival.target), arrival.bytes,
                  arrival.size_bytes);
    }
  }

  const OperatorPlan& plan_;
  const c10::DeviceIndex device_;
  const cudaStream_t stream_;
  const bool checking_;
  const bool is_dry_ = dry_run_enabled();
  bool has_mask_ = false;
  AliasMap aliases_;
  Values originals_;
  RangeList ranges_;
  Arrivals arrivals_;
};

bool has_several_devices() {
  static const bool several = c10::cuda::device_count() > 1;
  return several;
}

}  // namespace

EmulatedOperator::EmulatedOperator(OperatorPlan plan, std::optional<c10::KernelFunction> kernel)
    : plan_(std::move(plan)),
      cost_rule_(plan_),
      temporary_rule_(plan_),
      kernel_(std::move(kernel)) {}

void EmulatedOperator::run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) const {
  const c10::DispatchKeySet host_keys(c10::DispatchKey::CPU);
  if (kernel_) {
    kernel_->callBoxed(op, host_keys, stack);
    return;
  }
  try {
    op.redispatchBoxed(host_keys, stack);
  } catch (c10::NotImplementedError& error) {
    error.add_context("spillover emulator: operator " + plan_.name +
                      " ran on its CPU kernel, which lacks this case");
    throw;
  }
}

void EmulatedOperator::operator()(const c10::OperatorHandle& op, c10::DispatchKeySet,
                                  torch::jit::Stack* stack) const {
  const size_t first = stack->size() - plan_.arguments.size();
  const Placement placement(plan_, stack->data() + first);
  if (placement.is_spread()) [[unlikely]] {
    // The CPU's kernel of such an operator is a loop over operators that choose their device.
    const c10::impl::ExcludeDispatchKeyGuard below_autograd(
        c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset);
    return op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  // With one device there is nothing to switch, and asking for the current one costs time.
  const c10::cuda::OptionalCUDAGuard device_guard(
      has_several_devices() ? std::optional(c10::Device(c10::DeviceType::CUDA, placement.device()))
                            : std::nullopt);
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(placement.device());
  // Autograd and autocast have had their turn: the CPU operators below must not have one too.
  const c10::impl::ExcludeDispatchKeyGuard below_autograd(
      c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset);
  const DeviceWorkScope device_work;
  if (C10_UNLIKELY(dry_run_enabled())) begin_dry_operator(plan_);
  if (plan_.uses_cublas) ensure_cublas_workspace(stream);
  if (C10_UNLIKELY(is_capturing(stream))) {
    const auto call = [this, op](torch::jit::Stack* copies) { run_on_host(op, copies); };
    return capture_call(plan_, cost_rule_, call, stream, stack);
  }

  OperatorCall call(plan_, stream);
  call.begin(stack->data() + first);
  if (C10_UNLIKELY(dry_run_enabled())) {
    run_dry(plan_, kernel_, op, stack, [&] { run_on_host(op, stack); });
  } else {
    run_on_host(op, stack);
  }
  call.convert_results(stack, first, cost_rule_, temporary_rule_);
}

void UnsupportedOperator::operator()(const c10::OperatorHandle& op, c10::DispatchKeySet,
                                     torch::jit::Stack*) const {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "spillover emulator: operator ",
                              c10::toString(op.operator_name()), " is not emulated (", reason_,
                              "); run it on the CPU, or on a real GPU");
}

}  // namespace spillover::emulator
