#include "emulator/aten/alias_map.hpp"

#include <c10/core/CPUAllocator.h>
#include <c10/core/TensorImpl.h>

#include "emulator/core/c_api.h"

namespace spillover::emulator {
namespace {

constexpr size_t kLinearSearchMax = 16;
constexpr size_t kNotFound = static_cast<size_t>(-1);

}  // namespace

size_t AliasMap::find_storage(const c10::StorageImpl* storage) const {
  if (index_) {
    const auto found = index_->find(storage);
    return found == index_->end() ? kNotFound : found->second;
  }
  for (size_t i = 0; i < storages_.size(); ++i) {
    if (storages_[i].device == storage) return i;
  }
  return kNotFound;
}

const AliasMap::AliasedStorage& AliasMap::alias_storage(const c10::Storage& storage,
                                                        bool is_written) {
  c10::StorageImpl* device = storage.unsafeGetStorageImpl();
  if (const size_t known = find_storage(device); known != kNotFound) return storages_[known];
  // Asking for mutable data gives a copy-on-write storage its own bytes before they are aliased.
  const void* device_data = is_written ? device->mutable_data() : device->data();
  void* host_data = device_data == nullptr ? nullptr : spillover_emulator_host_pointer(device_data);
  // The alias is resizable, so that kernels may grow out= arguments; commit_resizes moves them
  // back.
  c10::Storage host(c10::Storage::use_byte_size_t(), device->nbytes(),
                    c10::DataPtr(host_data, c10::Device(c10::DeviceType::CPU)),
                    c10::GetCPUAllocator(), /*resizable=*/true);
  storages_.push_back({device, std::move(host), host_data});
  if (index_) {
    index_->emplace(device, storages_.size() - 1);
  } else if (storages_.size() > kLinearSearchMax) {
    index_ = std::make_unique<std::unordered_map<const c10::StorageImpl*, size_t>>();
    for (size_t i = 0; i < storages_.size(); ++i) index_->emplace(storages_[i].device, i);
  }
  return storages_.back();
}

at::Tensor AliasMap::alias(const at::Tensor& tensor, bool is_written) {
  c10::TensorImpl* device = tensor.unsafeGetTensorImpl();
  if (tensors_.size() <= kLinearSearchMax) {
    for (AliasedTensor& known : tensors_) {
      if (known.device == device) {
        known.is_written |= is_written;
        return known.host;
      }
    }
  }
  c10::Storage storage = alias_storage(tensor.storage(), is_written).host;
  at::Tensor host = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  c10::TensorImpl* impl = host.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.is_conj()) impl->_set_conj(true);
  if (tensor.is_neg()) impl->_set_neg(true);
  if (device->is_wrapped_number()) impl->set_wrapped_number(true);
  tensors_.push_back({device, host, is_written});
  return host;
}

void AliasMap::move_back(const AliasedStorage& storage, Arrivals& arrivals) {
  const c10::StorageImpl* host = storage.host.unsafeGetStorageImpl();
  TORCH_CHECK(storage.device->resizable(), "Trying to resize storage that is not resizable");
  const size_t size_bytes = host->nbytes();
  storage.device->set_data_ptr_noswap(storage.device->allocator()->allocate(size_bytes));
  storage.device->set_nbytes(size_bytes);
  if (size_bytes == 0) return;
  arrivals.push_back({storage.device->data(), host->data(), size_bytes, storage.host});
}

void AliasMap::commit_resizes(Arrivals& arrivals) {
  for (AliasedTensor& tensor : tensors_) {
    if (!tensor.is_written) continue;
    const c10::TensorImpl* host = tensor.host.unsafeGetTensorImpl();
    const size_t index = find_storage(tensor.device->unsafe_storage().unsafeGetStorageImpl());
    if (index != kNotFound && storages_[index].host.data() != storages_[index].host_data) {
      AliasedStorage& storage = storages_[index];
      move_back(storage, arrivals);
      storage.host_data = const_cast<void*>(storage.host.data());
    }
    if (host->sizes() == tensor.device->sizes() && host->strides() == tensor.device->strides() &&
        host->storage_offset() == tensor.device->storage_offset()) {
      continue;
    }
    tensor.device->set_sizes_and_strides(host->sizes(), host->strides(), host->storage_offset());
  }
}

c10::StorageImpl* AliasMap::device_storage_of(const at::Tensor& host_tensor) const {
  const c10::StorageImpl* host = host_tensor.storage().unsafeGetStorageImpl();
  for (const AliasedStorage& storage : storages_) {
    if (storage.host.unsafeGetStorageImpl() == host) return storage.device;
  }
  return nullptr;
}

}  // namespace spillover::emulator
