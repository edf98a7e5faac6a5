#include "emulator/aten/dry_twins.hpp"

#include <c10/core/Allocator.h>

#include <algorithm>
#include <utility>

namespace spillover::emulator {
namespace {

// What the storages of phantom results point to: an address that stands for no bytes.
char phantom_bytes;

c10::Storage phantom_storage(size_t size_bytes) {
  return c10::Storage(c10::Storage::use_byte_size_t(), size_bytes,
                      c10::DataPtr(&phantom_bytes, c10::Device(c10::DeviceType::CPU)),
                      /*allocator=*/nullptr, /*resizable=*/false);
}

void copy_geometry(const at::Tensor& from, const at::Tensor& to) {
  c10::TensorImpl* impl = to.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(from.sizes(), from.strides(), from.storage_offset());
  if (from.is_conj() != to.is_conj()) impl->_set_conj(from.is_conj());
  if (from.is_neg() != to.is_neg()) impl->_set_neg(from.is_neg());
}

}  // namespace

bool is_phantom(const void* bytes) {
  return bytes == &phantom_bytes;
}

at::Tensor MetaTwins::twin(const at::Tensor& host) {
  const c10::Storage& host_storage = host.storage();
  c10::Storage meta_storage;
  for (const Pair& pair : storages_) {
    if (pair.host.is_alias_of(host_storage)) meta_storage = pair.meta;
  }
  if (!meta_storage) {
    meta_storage = c10::Storage(c10::Storage::use_byte_size_t(), host_storage.nbytes(),
                                c10::DataPtr(nullptr, c10::Device(c10::DeviceType::Meta)),
                                c10::GetAllocator(c10::DeviceType::Meta), /*resizable=*/true);
    storages_.push_back({host_storage, meta_storage, host_storage.nbytes()});
  }
  at::Tensor meta = at::detail::make_tensor<c10::TensorImpl>(
      std::move(meta_storage), c10::DispatchKeySet(c10::DispatchKey::Meta), host.dtype());
  copy_geometry(host, meta);
  if (host.unsafeGetTensorImpl()->is_wrapped_number()) {
    meta.unsafeGetTensorImpl()->set_wrapped_number(true);
  }
  return meta;
}

at::Tensor MetaTwins::to_host(const at::Tensor& meta) const {
  if (!meta.defined() || !meta.is_meta()) return meta;
  c10::Storage storage;
  for (const Pair& pair : storages_) {
    if (pair.meta.is_alias_of(meta.storage())) storage = pair.host;
  }
  if (!storage) storage = phantom_storage(meta.storage().nbytes());
  at::Tensor host = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), meta.dtype());
  copy_geometry(meta, host);
  return host;
}

bool MetaTwins::is_fresh(const at::Tensor& meta) const {
  return meta.defined() && meta.is_meta() &&
         std::none_of(storages_.begin(), storages_.end(),
                      [&](const Pair& pair) { return pair.meta.is_alias_of(meta.storage()); });
}

void MetaTwins::commit(const at::Tensor& host, const at::Tensor& meta) const {
  if (host.sizes() != meta.sizes() || host.strides() != meta.strides()) copy_geometry(meta, host);
  for (const Pair& pair : storages_) {
    if (!pair.meta.is_alias_of(meta.storage()) || meta.storage().nbytes() <= pair.size_bytes) {
      continue;
    }
    c10::StorageImpl* storage = pair.host.unsafeGetStorageImpl();
    storage->set_data_ptr_noswap(c10::DataPtr(&phantom_bytes, c10::Device(c10::DeviceType::CPU)));
    storage->set_nbytes(meta.storage().nbytes());
  }
}

}  // namespace spillover::emulator
