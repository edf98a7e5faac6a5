#include "emulator/aten/dry_values.hpp"

#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/copy_native.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "emulator/aten/accesses.hpp"
#include "emulator/aten/dry_run.hpp"
#include "emulator/aten/operator_kernel.hpp"
#include "emulator/core/c_api.h"
#include "emulator/core/dry_api.h"

namespace spillover::emulator {
namespace {

const void* first_byte(const at::Tensor& tensor) {
  const auto* storage = static_cast<const char*>(tensor.storage().data());
  if (storage == nullptr) return nullptr;
  return storage + static_cast<size_t>(tensor.storage_offset()) * tensor.element_size();
}

std::string site_text(unsigned site) {
  std::string text(spillover_emulator_describe_site(site, nullptr, 0), '\0');
  spillover_emulator_describe_site(site, text.data(), text.size() + 1);
  return text;
}

// "\n  <what>:\n    line\n    line", or "" where the stack is not known.
std::string stack_lines(const char* what, unsigned site) {
  const std::string text = site_text(site);
  if (text.empty()) return "";
  std::string lines = std::string("\n  ") + what + ":\n    ";
  for (const char letter : text) {
    lines += letter;
    if (letter == '\n') lines += "    ";
  }
  return lines;
}

// With a routing model, what follows from the choice of experts: a mask of all tokens and experts.
constexpr size_t kRoutedBytesMax = size_t{256} << 20;

// Which operator made a value, for values that are small enough to be asked for one by one. Blocks
// of an allocator are used again and again, so the table stays as small as they are few.
struct Producer {
  const char* name;
  unsigned site;
};

constexpr size_t kProducedBytesMax = 64;
constexpr size_t kProducersMax = size_t{1} << 16;

class Producers {
 public:
  static Producers& instance() {
    static auto* const producers = new Producers();
    return *producers;
  }

  void note(const void* address, const char* name) {
    const unsigned site = spillover_emulator_take_site();
    const std::lock_guard<std::mutex> guard(mutex_);
    if (by_address_.size() >= kProducersMax) by_address_.clear();
    by_address_[address] = {name, site};
  }

  Producer find(const void* address) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = by_address_.find(address);
    return found == by_address_.end() ? Producer{nullptr, 0} : found->second;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<const void*, Producer> by_address_;
};

// Owns what a storage's memory was owned by, and forgets what was unknown of it before.
struct UnknownGuard {
  c10::DataPtr memory;
  size_t size_bytes;

  static void release(void* guard) {
    auto* const self = static_cast<UnknownGuard*>(guard);
    spillover_emulator_set_known(self->memory.get(), self->size_bytes, /*is_known=*/1);
    delete self;
  }
};

// Copies within the host, which move nothing that is not known.
void carry_unknown(const at::Tensor& self) {
  set_known(self, false);
  bind_unknown_to_storage(self);
}

// One CPU operator: its tensors, in turn, with whether each is read and written.
template <typename Function>
void for_each_host_tensor(const OperatorPlan& plan, const c10::IValue* arguments,
                          Function&& function) {
  for (size_t i = 0; i < plan.arguments.size(); ++i) {
    const ArgumentPlan& argument = plan.arguments[i];
    if (arguments[i].isTensor()) {
      function(arguments[i].toTensor(), argument);
    } else if (argument.kind == ArgumentKind::kTensorList && arguments[i].isList()) {
      for (const c10::IValue& element : arguments[i].toListRef()) {
        if (element.isTensor()) function(element.toTensor(), argument);
      }
    }
  }
}

bool is_plain_host(const at::Tensor& tensor) {
  return tensor.defined() && tensor.is_cpu() && tensor.layout() == at::kStrided;
}

// Operators whose result is a number for the program, or has a size that depends on data.
bool asks_for_values(const OperatorPlan& plan) {
  return plan.name == "aten::_local_scalar_dense" || plan.synchronizes_host ||
         (plan.synchronizes_for_masks && plan.returned_arguments[0] < 0);
}

// Large pinned memory has no bytes: what would fill it must not.
bool fills_phantom_memory(const OperatorPlan& plan, const WrittenTensors& written) {
  if (!plan.writes_in_place) return false;
  return std::any_of(written.begin(), written.end(), [](const at::Tensor& tensor) {
    return !is_small(tensor) &&
           spillover_emulator_is_pinned(first_byte(tensor), extent_bytes(tensor)) != 0;
  });
}

}  // namespace

bool aliases_device(const at::Tensor& tensor) {
  return spillover_emulator_is_device_byte(tensor.storage().data()) != 0;
}

size_t known_bytes_max(at::ScalarType type) {
  static const size_t bytes_max = spillover_emulator_known_bytes_max();
  static const bool routes = spillover_emulator_routing() > 0;
  return routes && at::isIntegralType(type, /*includeBool=*/true) ? kRoutedBytesMax : bytes_max;
}

bool is_small(const at::Tensor& tensor) {
  return extent_bytes(tensor) <= known_bytes_max(tensor.scalar_type());
}

bool is_mask(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kBool || tensor.scalar_type() == at::kByte;
}

bool is_known(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.numel() == 0) return true;
  const size_t size_bytes = extent_bytes(tensor);
  if (aliases_device(tensor) && !is_small(tensor)) return false;
  return spillover_emulator_is_known(first_byte(tensor), size_bytes) != 0;
}

void set_known(const at::Tensor& tensor, bool known) {
  if (!tensor.defined() || !tensor.has_storage()) return;
  spillover_emulator_set_known(first_byte(tensor), extent_bytes(tensor), known ? 1 : 0);
}

void note_producer(const void* address, size_t size_bytes, const char* name) {
  if (size_bytes > 0 && size_bytes <= kProducedBytesMax) {
    Producers::instance().note(spillover_emulator_host_pointer(address), name);
  }
}

void note_producer(const at::Tensor& tensor, const char* name) {
  if (tensor.defined()) note_producer(first_byte(tensor), extent_bytes(tensor), name);
}

int unknown_value(const std::string& operator_name, const void* address) {
  const int policy = spillover_emulator_unknown_policy();
  if (policy != SPILLOVER_EMULATOR_UNKNOWN_ERROR) return policy == SPILLOVER_EMULATOR_UNKNOWN_ONE;
  std::string text = "spillover dry run: the program asks for a value that a dry run does not have";
  text += "\n  asked for by: " + operator_name;
  text += stack_lines("at", spillover_emulator_take_site());
  const Producer producer = Producers::instance().find(spillover_emulator_host_pointer(address));
  if (producer.name != nullptr) {
    text += std::string("\n  made by: ") + producer.name;
    text += stack_lines("at", producer.site);
  }
  text +=
      "\n  A dry run computes only what follows from small known values. Take the value out of the "
      "decision, or go on with 0 or 1 in its place: --unknown zero (SPILLOVER_EMULATOR_UNKNOWN).";
  TORCH_CHECK(false, text);
}

void refuse_unknown(const std::string& operator_name, const std::string& reason) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "spillover dry run: operator ", operator_name,
                              " cannot be part of a dry run here: ", reason,
                              stack_lines("called at", spillover_emulator_take_site()));
}

at::Scalar scalar_of(const at::Tensor& self) {
  at::Tensor host = at::empty(self.sizes(), self.options().device(at::kCPU).pinned_memory(true));
  at::native::copy_(host, self, /*non_blocking=*/false);
  const bool known = is_known(host);
  set_known(host, true);
  if (!known) {
    const int value = unknown_value("aten::_local_scalar_dense (Tensor.item(), bool(), int(), ...)",
                                    first_byte(self));
    return self.scalar_type() == at::kBool ? at::Scalar(value != 0) : at::Scalar(value);
  }
  const DeviceWorkScope device_work;
  return at::native::_local_scalar_dense_cpu(host);
}

void bind_unknown_to_storage(const at::Tensor& tensor) {
  if (!is_plain_host(tensor) || is_known(tensor)) return;
  c10::StorageImpl* storage = tensor.storage().unsafeGetStorageImpl();
  const c10::DataPtr& memory = storage->data_ptr();
  if (memory.get() == nullptr || memory.get_deleter() == &UnknownGuard::release) return;
  void* const data = memory.get();
  const c10::Device device = memory.device();
  auto* const guard =
      new UnknownGuard{storage->set_data_ptr(c10::DataPtr(nullptr, device)), storage->nbytes()};
  storage->set_data_ptr_noswap(c10::DataPtr(data, guard, &UnknownGuard::release, device));
}

bool zero_without_memory(const at::Tensor& tensor) {
  constexpr uintptr_t kPageBytes = 4096;
  constexpr size_t kBytesMin = size_t{1} << 20;
  if (!is_plain_host(tensor) || tensor.nbytes() < kBytesMin ||
      !tensor.is_non_overlapping_and_dense()) {
    return false;
  }
  // Private memory of the allocator's own: mapped files and shared memory keep their bytes.
  if (tensor.storage().data_ptr().get_deleter() != c10::GetCPUAllocator()->raw_deleter()) {
    return false;
  }
  auto* const begin = static_cast<char*>(tensor.storage().mutable_data()) +
                      static_cast<size_t>(tensor.storage_offset()) * tensor.element_size();
  const auto address = reinterpret_cast<uintptr_t>(begin);
  const size_t head = (kPageBytes - address % kPageBytes) % kPageBytes;
  const size_t middle = (tensor.nbytes() - head) / kPageBytes * kPageBytes;
  if (madvise(begin + head, middle, MADV_DONTNEED) != 0) return false;
  std::memset(begin, 0, head);
  std::memset(begin + head + middle, 0, tensor.nbytes() - head - middle);
  return true;
}

bool run_host_operator(const OperatorPlan& plan, const c10::OperatorHandle& op,
                       torch::jit::Stack* stack, WrittenTensors& written) {
  const c10::IValue* arguments = stack->data() + (stack->size() - plan.arguments.size());
  bool is_on_host = true;
  c10::SmallVector<at::Tensor, 4> unknown;
  for_each_host_tensor(plan, arguments,
                       [&](const at::Tensor& tensor, const ArgumentPlan& argument) {
                         if (!tensor.defined()) return;
                         if (!is_plain_host(tensor)) {
                           is_on_host = is_on_host && !tensor.is_cuda();
                           return;
                         }
                         if (argument.is_written) written.push_back(tensor);
                         if (!argument.is_overwritten && !is_known(tensor))
                           unknown.push_back(tensor);
                       });
  if (!is_on_host) {
    written.clear();
    return false;
  }
  if (unknown.empty() && !fills_phantom_memory(plan, written)) return false;
  if (plan.name == "aten::copy_") {
    const at::Tensor self = arguments[0].toTensor();
    torch::jit::drop(*stack, plan.arguments.size());
    carry_unknown(self);
    stack->emplace_back(self);
    written.clear();
    return true;
  }
  if (!asks_for_values(plan)) {
    run_phantom_on_host(plan, op, stack);
    written.clear();
    return true;
  }
  for (at::Tensor& tensor : unknown) {
    const int value = unknown_value(plan.name, first_byte(tensor));
    const DeviceWorkScope device_work;
    tensor.fill_(value);
    set_known(tensor, true);
  }
  return false;
}

void finish_host_operator(const WrittenTensors& written) {
  for (const at::Tensor& tensor : written) set_known(tensor, true);
}

}  // namespace spillover::emulator
