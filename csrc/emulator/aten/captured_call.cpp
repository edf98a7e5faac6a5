#include "emulator/aten/captured_call.hpp"

#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "emulator/aten/accesses.hpp"
#include "emulator/aten/alias_map.hpp"
#include "emulator/aten/dry_run.hpp"
#include "emulator/aten/operator_kernel.hpp"
#include "emulator/aten/random.hpp"

namespace spillover::emulator {
namespace {

constexpr int kAssertError = 710;  // CUDA_ERROR_ASSERT: what a failed check in a GPU's kernel is

bool is_mask(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kBool || tensor.scalar_type() == at::kByte;
}

// Calls visit(tensor, is_written) for every tensor on the device among the arguments.
template <typename Visit>
void for_each_tensor(const OperatorPlan& plan, const c10::IValue* arguments, Visit&& visit) {
  for (size_t i = 0; i < plan.arguments.size(); ++i) {
    const ArgumentPlan& argument = plan.arguments[i];
    const c10::IValue& value = arguments[i];
    if (value.isTensor()) {
      if (is_device_tensor(value.toTensor())) visit(value.toTensor(), argument.is_written);
    } else if (argument.kind == ArgumentKind::kTensorList && value.isList()) {
      for (const c10::IValue& element : value.toListRef()) {
        if (element.isTensor() && is_device_tensor(element.toTensor())) {
          visit(element.toTensor(), argument.is_written);
        }
      }
    }
  }
}

// The argument with make(tensor, is_written) in place of every tensor.
template <typename Make>
c10::IValue replace_tensors(const c10::IValue& value, const ArgumentPlan& argument, Make&& make) {
  if (value.isTensor() && value.toTensor().defined()) {
    return make(value.toTensor(), argument.is_written);
  }
  if (argument.kind != ArgumentKind::kTensorList || !value.isList()) return value;
  c10::impl::GenericList replaced(value.toList().elementType());
  for (const c10::IValue& element : value.toListRef()) {
    if (element.isTensor() && element.toTensor().defined()) {
      replaced.push_back(make(element.toTensor(), argument.is_written));
    } else {
      replaced.push_back(element);
    }
  }
  return replaced;
}

// A CPU tensor's value as it is now. That it stands for a Python number decides the type of
// results.
at::Tensor value_of(const at::Tensor& tensor) {
  at::Tensor value = tensor.clone();
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
    value.unsafeGetTensorImpl()->set_wrapped_number(true);
  }
  return value;
}

// Device memory that a new result goes to.
struct Target {
  size_t result;
  size_t element;  // of a list
  void* bytes;     // where the CPU finds it
  size_t size_bytes;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
  at::ScalarType type;
};

// A launch may run on a thread of the device, which has a number of threads for CPU kernels of its
// own. Their number decides in which order sums are taken, so it has to be the program's.
class ThreadCountScope {
 public:
  explicit ThreadCountScope(int count) : previous_(at::get_num_threads()), count_(count) {
    if (count_ != previous_) at::set_num_threads(count_);
  }
  ~ThreadCountScope() {
    if (count_ != previous_) at::set_num_threads(previous_);
  }
  ThreadCountScope(const ThreadCountScope&) = delete;
  ThreadCountScope& operator=(const ThreadCountScope&) = delete;

 private:
  const int previous_;
  const int count_;
};

// What a node keeps: everything that a launch needs, and nothing that owns device memory.
class FrozenCall {
 public:
  FrozenCall(const OperatorPlan& plan, HostCall call) : plan_(plan), call_(std::move(call)) {}

  void freeze(const std::vector<c10::IValue>& originals) {
    AliasMap aliases;
    for (size_t i = 0; i < originals.size(); ++i) {
      const ArgumentPlan& argument = plan_.arguments[i];
      if (argument.kind == ArgumentKind::kDevice && originals[i].isDevice()) {
        arguments_.emplace_back(c10::Device(c10::DeviceType::CPU));
      } else if (argument.kind == ArgumentKind::kGenerator) {
        arguments_.emplace_back();
      } else {
        arguments_.push_back(
            replace_tensors(originals[i], argument, [&](const at::Tensor& tensor, bool is_written) {
              return is_device_tensor(tensor) ? aliases.alias(tensor, is_written)
                                              : value_of(tensor);
            }));
      }
    }
  }

  void add_target(Target target) { targets_.push_back(std::move(target)); }
  std::vector<CapturedPosition>& positions() { return positions_; }

  // For the node: one launch.
  static int run(void* call, char* error, size_t capacity) {
    try {
      static_cast<const FrozenCall*>(call)->launch();
      return 0;
    } catch (const c10::Error& failure) {
      std::snprintf(error, capacity, "%s", failure.what_without_backtrace());
    } catch (const std::exception& failure) {
      std::snprintf(error, capacity, "%s", failure.what());
    }
    return kAssertError;
  }

  static void release(void* call) { delete static_cast<FrozenCall*>(call); }

 private:
  void launch() const {
    // The thread may be in the middle of anything of torch's: only the CPU's kernels take part.
    const c10::impl::ForceDispatchKeyGuard below_everything(
        c10::default_included_set, c10::default_excluded_set |
                                       c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                       c10::autocast_dispatch_keyset | c10::python_ks);
    const DeviceWorkScope device_work;
    const ThreadCountScope thread_count(thread_count_);
    const ReplayedPositions replayed(positions_);
    torch::jit::Stack stack(arguments_.begin(), arguments_.end());
    for (size_t i = 0; i < stack.size(); ++i) {
      if (plan_.arguments[i].kind == ArgumentKind::kGenerator) stack[i] = replayed_generator();
    }
    call_(&stack);
    for (const Target& target : targets_) {
      const c10::IValue& value = stack.at(target.result);
      const at::Tensor result =
          value.isTensor() ? value.toTensor() : value.toListRef()[target.element].toTensor();
      TORCH_CHECK(result.sizes() == target.sizes && result.strides() == target.strides &&
                      result.scalar_type() == target.type,
                  "a result is ", result.scalar_type(), " ", result.sizes(), " and was ",
                  target.type, " ", c10::IntArrayRef(target.sizes), " when the graph was captured");
      std::memcpy(target.bytes, result.const_data_ptr(), target.size_bytes);
    }
  }

  const OperatorPlan& plan_;  // lives as long as the process
  HostCall call_;
  const int thread_count_ = at::get_num_threads();  // when the graph was captured
  std::vector<c10::IValue> arguments_;
  std::vector<CapturedPosition> positions_;
  std::vector<Target> targets_;
};

// One call while it is being captured.
class CapturedCall {
 public:
  CapturedCall(const OperatorPlan& plan, const c10::cuda::CUDAStream& stream)
      : plan_(plan), device_(stream.device_index()), stream_(stream.stream()), aliases_(stream_) {}

  void run(const CostRule& cost_rule, const HostCall& call, torch::jit::Stack* stack) {
    const size_t count = plan_.arguments.size();
    const auto first = stack->end() - static_cast<ptrdiff_t>(count);
    originals_.assign(first, stack->end());
    stack->erase(first, stack->end());
    refuse_waiting();
    auto frozen = std::make_unique<FrozenCall>(plan_, call);
    torch::jit::Stack results;
    {
      const RecordedPositions recorded(&frozen->positions());
      results = run_on_copies(call);
    }
    Arrivals resized;
    aliases_.commit_resizes(resized);
    for (const Arrival& arrival : resized) keep(arrival.target, arrival.bytes, arrival.size_bytes);
    frozen->freeze(originals_);
    for_each_tensor(plan_, originals_.data(), [&](const at::Tensor& tensor, bool is_written) {
      append_ranges(tensor, is_written, ranges_);
    });
    for (size_t i = 0; i < results.size(); ++i) convert_result(i, results[i], frozen.get());
    for (const CapturedPosition& position : frozen->positions()) {
      ranges_.push_back({position.seed, sizeof(int64_t), 0});
      ranges_.push_back({position.offset, sizeof(int64_t), 0});
    }
    const KernelCost cost =
        clock_enabled() ? cost_rule({plan_, originals_, results}) : KernelCost{};
    const int status = spillover_emulator_capture_kernel(
        stream_, plan_.name.c_str(), &FrozenCall::run, frozen.release(), &FrozenCall::release,
        ranges_.data(), ranges_.size(), cost.duration_ns, cost.device_bytes, cost.limit);
    C10_CUDA_CHECK(static_cast<cudaError_t>(status));
    for (c10::IValue& result : results) stack->push_back(std::move(result));
  }

 private:
  // Operators that wait for the device fail as the wait does, and end the capture.
  void refuse_waiting() const {
    bool waits = plan_.synchronizes_host;
    for (const c10::IValue& value : originals_) {
      if (!plan_.synchronizes_for_masks || !value.isList()) continue;
      for (const c10::IValue& element : value.toListRef()) {
        waits |= element.isTensor() && is_device_tensor(element.toTensor()) &&
                 is_mask(element.toTensor());
      }
    }
    if (waits) c10::cuda::stream_synchronize(stream_);
  }

  torch::jit::Stack run_on_copies(const HostCall& call) {
    for_each_tensor(plan_, originals_.data(), [&](const at::Tensor& tensor, bool is_written) {
      if (!is_written) return;
      const c10::StorageImpl* storage = tensor.storage().unsafeGetStorageImpl();
      if (storage->nbytes() == 0) return;
      spillover_emulator_capture_pointer(stream_, storage->data(), storage->nbytes(), 1);
    });
    torch::jit::Stack arguments;
    for (size_t i = 0; i < originals_.size(); ++i) {
      const ArgumentPlan& argument = plan_.arguments[i];
      if (argument.kind == ArgumentKind::kDevice) {
        arguments.emplace_back(c10::Device(c10::DeviceType::CPU));
      } else if (argument.kind == ArgumentKind::kGenerator) {
        arguments.emplace_back(host_generator(originals_[i], device_));
      } else {
        arguments.push_back(replace_tensors(
            originals_[i], argument, [&](const at::Tensor& tensor, bool is_written) {
              return is_device_tensor(tensor) ? aliases_.alias(tensor, is_written) : tensor;
            }));
      }
    }
    torch::jit::Stack results = arguments;
    try {
      call(&results);
      return results;
    } catch (const c10::IndexError&) {
      // Indices that the program fills in before it replays may be anything now.
      results = with_zero_indices(arguments);
    }
    call(&results);
    return results;
  }

  torch::jit::Stack with_zero_indices(const torch::jit::Stack& arguments) const {
    torch::jit::Stack changed;
    for (size_t i = 0; i < arguments.size(); ++i) {
      changed.push_back(replace_tensors(
          arguments[i], plan_.arguments[i], [](const at::Tensor& tensor, bool is_written) {
            const bool is_index = at::isIntegralType(tensor.scalar_type(), /*includeBool=*/false);
            return is_index && !is_written ? at::zeros_like(tensor) : tensor;
          }));
    }
    return changed;
  }

  void convert_result(size_t index, c10::IValue& value, FrozenCall* frozen) {
    const bool known = index < plan_.returned_arguments.size();
    if (known && plan_.returned_arguments[index] >= 0) {
      value = originals_[static_cast<size_t>(plan_.returned_arguments[index])];
    } else if (value.isTensor()) {
      value = to_device(value.toTensor(), index, 0, frozen);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> converted;
      size_t element = 0;
      for (const c10::IValue& item : value.toListRef()) {
        converted.push_back(to_device(item.toTensor(), index, element++, frozen));
      }
      value = std::move(converted);
    }
  }

  // Also of results that the kernel leaves on the CPU outside of captures: a launch cannot hand
  // them out.
  at::Tensor to_device(const at::Tensor& host, size_t result, size_t element, FrozenCall* frozen) {
    if (!host.defined() || !host.device().is_cpu()) return host;
    const auto options = host.options().device(c10::Device(c10::DeviceType::CUDA, device_));
    at::Tensor device;
    if (c10::StorageImpl* storage = aliases_.device_storage_of(host)) {
      device = at::empty({0}, options);
      device.set_(c10::Storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(storage)),
                  host.storage_offset(), host.sizes(), host.strides());
    } else {
      device = at::empty_strided(host.sizes(), host.strides(), options);
    }
    c10::TensorImpl* impl = device.unsafeGetTensorImpl();
    if (host.is_conj()) impl->_set_conj(true);
    if (host.is_neg()) impl->_set_neg(true);
    if (host.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    const size_t size_bytes = extent_bytes(host);
    if (size_bytes == 0 || aliases_.device_storage_of(host) != nullptr) return device;
    keep(device.storage().data(), host.const_data_ptr(), size_bytes);
    append_ranges(device, /*is_written=*/true, ranges_);
    frozen->add_target({result, element, spillover_emulator_host_pointer(device.storage().data()),
                        size_bytes, host.sizes().vec(), host.strides().vec(), host.scalar_type()});
    return device;
  }

  // For the operators that are captured next.
  void keep(const void* target, const void* bytes, size_t size_bytes) const {
    if (bytes == nullptr || size_bytes == 0) return;
    void* const place = spillover_emulator_capture_pointer(stream_, target, size_bytes, 1);
    if (place != nullptr) std::memcpy(place, bytes, size_bytes);
  }

  const OperatorPlan& plan_;
  const c10::DeviceIndex device_;
  const cudaStream_t stream_;
  AliasMap aliases_;
  std::vector<c10::IValue> originals_;
  RangeList ranges_;
};

}  // namespace

void capture_call(const OperatorPlan& plan, const CostRule& cost_rule, HostCall call,
                  const c10::cuda::CUDAStream& stream, torch::jit::Stack* stack) {
  TORCH_CHECK_NOT_IMPLEMENTED(!dry_run_enabled(), "spillover dry run: operator ", plan.name,
                              " is captured into a CUDA graph, which a dry run does not have; "
                              "leave graphs out of it");
  CapturedCall(plan, stream).run(cost_rule, call, stack);
}

}  // namespace spillover::emulator
