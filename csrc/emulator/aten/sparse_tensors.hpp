// CPU tensors of any layout that stand on the bytes of CUDA tensors, for the length of one sparse
// operator call, and the way back. The call owns the object; it lives on one thread's stack.
//
// A sparse tensor is a shell around dense ones (indices and values, or compressed indices, plain
// indices and values). The shell is made anew on the CPU; the dense parts are aliased by AliasMap,
// so nothing is copied and kernels that write in place write device memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAStream.h>

#include <string>
#include <vector>

#include "emulator/aten/accesses.hpp"
#include "emulator/aten/alias_map.hpp"

namespace spillover::emulator {

class SparseCallTensors {
 public:
  SparseCallTensors(const c10::cuda::CUDAStream& stream, const std::string& operator_name);

  // The CPU counterpart of an argument; tensors that are not on the device are returned as is.
  at::Tensor to_host(const at::Tensor& tensor, bool is_written);

  // Carries over what the kernel did to written tensors: sparse kernels replace indices and values.
  void commit_writes();

  // The CUDA counterpart of a result.
  at::Tensor to_device(const at::Tensor& host);

  // Waits until the kernel may run, and reports what it touches to the checker. Call it when all
  // arguments are converted.
  void begin();

  // Writes the results into the memory that was allocated for them. Call it last.
  void finish();

 private:
  struct Written {
    at::Tensor device;
    at::Tensor host;
  };

  at::Tensor alias(const at::Tensor& dense, bool is_written);
  at::Tensor dense_to_device(const at::Tensor& host);
  at::Tensor view_of(const at::Tensor& host, c10::StorageImpl* storage) const;
  void charge() const;
  void replace_members(const at::Tensor& device, const at::Tensor& host);

  const c10::cuda::CUDAStream& stream_;
  const std::string& name_;
  AliasMap aliases_;
  // The aliases' originals, which must outlive them: the parts of a sparse tensor are made on
  // demand.
  std::vector<at::Tensor> parts_;
  std::vector<Written> written_;
  RangeList ranges_;
  Arrivals arrivals_;
};

}  // namespace spillover::emulator
