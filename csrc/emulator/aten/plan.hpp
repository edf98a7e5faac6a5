// What the emulation must know of one operator, worked out once from its schema. A plan belongs to
// the kernel that was registered for the operator, never changes after construction and may be read
// by any thread.
#pragma once

#include <ATen/core/function_schema.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <string>
#include <vector>

namespace spillover::emulator {

enum class ArgumentKind : uint8_t { kTensor, kTensorList, kGenerator, kDevice, kOther };

struct ArgumentPlan {
  ArgumentKind kind;
  bool is_written;
  // Written without being read: out= arguments, and what fill_ and its like fill.
  bool is_overwritten;
  std::string name;
};

struct OperatorPlan {
  explicit OperatorPlan(const c10::FunctionSchema& schema);

  // "aten::add.Tensor".
  std::string name;
  std::vector<ArgumentPlan> arguments;
  // For each return value, the argument that is handed back (an in-place or out= result), or -1.
  std::vector<int> returned_arguments;
  int generator_index = -1;
  int device_index = -1;
  // CUDA's kernel takes a cuBLAS handle, which brings the handle's workspace with it.
  bool uses_cublas = false;
  // CUDA's kernel makes the host wait for the stream, since the size of its result depends on data.
  bool synchronizes_host = false;
  // As above, but only where an index is a mask.
  bool synchronizes_for_masks = false;
  // CUDA's kernel accepts CPU tensors that have dimensions beside CUDA ones.
  bool allows_host_tensors = false;
  // Lists of tensors may be on several devices.
  bool takes_spread_lists = false;
  // Bit i: return value i stays on the CPU, as it does with CUDA's kernel.
  uint32_t host_returns = 0;
  bool has_tensor_arguments = false;
  // Changes nothing but its arguments' bytes, whatever their shapes: an optimizer's step, a fill.
  bool writes_in_place = false;
};

}  // namespace spillover::emulator
