// What is known of tensors in a dry run, and what happens where host code asks for a value that is
// not. Free functions; any thread may call.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <string>

#include "emulator/aten/plan.hpp"

namespace spillover::emulator {

// CPU tensors, of which some alias device memory. Tensors of more bytes than a real operator may
// touch (known_bytes_max) count as unknown; gaps between a tensor's elements count as a part of it.
size_t known_bytes_max(at::ScalarType type);
bool is_known(const at::Tensor& tensor);
bool is_small(const at::Tensor& tensor);
void set_known(const at::Tensor& tensor, bool known);

// Whether the tensor says which elements of another are meant when that is indexed by it.
bool is_mask(const at::Tensor& tensor);

// Whether the tensor's bytes are a device's.
bool aliases_device(const at::Tensor& tensor);

// Remembers which operator made a small value unknown, for the text of an error.
void note_producer(const at::Tensor& tensor, const char* name);
void note_producer(const void* address, size_t size_bytes, const char* name);

// Throws where the policy is "error": host code needs an unknown value. Otherwise returns what the
// policy puts in its place, 0 or 1.
int unknown_value(const std::string& operator_name, const void* address);

// Throws: the operator's result, or its size, depends on unknown data, whatever the policy.
[[noreturn]] void refuse_unknown(const std::string& operator_name, const std::string& reason);

// _local_scalar_dense of a CUDA tensor: Tensor.item(), bool(), int() and so on.
at::Scalar scalar_of(const at::Tensor& self);

// Keeps what is unknown in a pageable tensor from outliving its memory.
void bind_unknown_to_storage(const at::Tensor& tensor);

// zero_ of a large CPU tensor: gives its pages back to the system, from which they read as zeros,
// so that an optimizer's state on the host needs no memory before anybody touches it. False where
// the memory is not that simple, and has to be written.
bool zero_without_memory(const at::Tensor& tensor);

// A CPU operator of the program's own. True where it was dealt with here: it reads what is not
// known, or fills pinned memory that a dry run gives no bytes to, and so only carries on what is
// not known. Otherwise the operator has to run, and finish_host_operator to be called afterwards
// with the list.
using WrittenTensors = c10::SmallVector<at::Tensor, 4>;
bool run_host_operator(const OperatorPlan& plan, const c10::OperatorHandle& op,
                       torch::jit::Stack* stack, WrittenTensors& written);
void finish_host_operator(const WrittenTensors& written);

}  // namespace spillover::emulator
