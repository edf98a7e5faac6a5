// CPU tensors that stand on the bytes of CUDA tensors for the length of one operator call. The call
// owns the map; it lives on one thread's stack. The CUDA tensors must outlive it.
//
// Invariant: two CUDA tensors that share a storage get CPU tensors that share one, so that CPU
// kernels see the same overlaps as CUDA's would, and a result can be traced back to the argument it
// is a view of.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/SmallVector.h>
#include <cuda_runtime_api.h>

#include <memory>
#include <optional>
#include <unordered_map>

namespace spillover::emulator {

// True for tensors whose bytes are a device storage: what the emulation can alias.
inline bool is_device_tensor(const at::Tensor& tensor) {
  return tensor.defined() && tensor.is_cuda() && tensor.layout() == at::kStrided;
}

// Bytes of a CPU kernel's result that are to go to newly allocated device memory.
struct Arrival {
  const void* target;  // a device address
  const void* bytes;   // nullptr where they lie at the target already
  size_t size_bytes;
  c10::Storage owner;  // of the bytes
};

using Arrivals = c10::SmallVector<Arrival, 4>;

class AliasMap {
 public:
  AliasMap() = default;
  // On a stream that is being captured the bytes are those that the captured work would leave.
  explicit AliasMap(cudaStream_t capturing) : capturing_(capturing) {}
  ~AliasMap();
  AliasMap(const AliasMap&) = delete;
  AliasMap& operator=(const AliasMap&) = delete;

  // A CPU tensor over the same bytes, with the same sizes, strides and flags.
  at::Tensor alias(const at::Tensor& tensor, bool is_written);

  // Carries what the kernel did to the written tensors' shapes and storages over to the CUDA
  // tensors: a CPU kernel that resizes an out= argument moves the alias's storage into ordinary
  // memory. Its bytes still have to be brought to the device; they are added to arrivals.
  void commit_resizes(Arrivals& arrivals);

  // The CUDA storage that a CPU result lives in, or nullptr where the result is fresh memory.
  c10::StorageImpl* device_storage_of(const at::Tensor& host_tensor) const;

 private:
  struct AliasedStorage {
    c10::StorageImpl* device;
    c10::Storage host;
    void* host_data;
  };
  struct AliasedTensor {
    c10::TensorImpl* device;
    at::Tensor host;
    bool is_written;
  };

  void add_storage(c10::StorageImpl* device, c10::Storage host, void* host_data);
  // A CPU tensor over the storage, of the right type and nothing else.
  at::Tensor make_alias(const at::Tensor& tensor, bool is_written);
  size_t find_storage(const c10::StorageImpl* storage) const;
  static void move_back(const AliasedStorage& storage, Arrivals& arrivals);

  std::optional<cudaStream_t> capturing_;
  c10::SmallVector<AliasedStorage, 6> storages_;
  c10::SmallVector<AliasedTensor, 6> tensors_;
  // Made only for calls with long tensor lists, where a linear search would be quadratic.
  std::unique_ptr<std::unordered_map<const c10::StorageImpl*, size_t>> index_;
};

}  // namespace spillover::emulator
