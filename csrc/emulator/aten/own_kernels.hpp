// CPU implementations of operators that torch has for CUDA alone (or whose CPU kernel cannot
// serve). They work on CPU tensors that alias device memory and are called by EmulatedOperator;
// they are not visible to the CPU's own dispatch. The table is filled while the library loads and
// constant afterwards.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/boxing/KernelFunction.h>

#include <optional>
#include <string>
#include <unordered_map>

namespace spillover::emulator {

// By full name, "aten::mm.dtype".
using KernelTable = std::unordered_map<std::string, c10::KernelFunction>;

void add_attention_kernels(KernelTable& table);
void add_varlen_attention_kernels(KernelTable& table);
void add_efficient_attention_kernels(KernelTable& table);
void add_normalization_kernels(KernelTable& table);
void add_recurrent_kernels(KernelTable& table);
void add_elementwise_kernels(KernelTable& table);
void add_upcast_kernels(KernelTable& table);
void add_statistics_kernels(KernelTable& table);
void add_softmax_kernels(KernelTable& table);
void add_embedding_kernels(KernelTable& table);

inline bool is_given(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined();
}

template <auto* kFunction>
void add_kernel(KernelTable& table, const char* name) {
  using Function =
      c10::CompileTimeFunctionPointer<std::remove_pointer_t<decltype(kFunction)>, kFunction>;
  table.insert_or_assign(name, c10::KernelFunction::makeFromUnboxedFunction(Function()));
}

}  // namespace spillover::emulator
