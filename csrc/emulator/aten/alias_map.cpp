#include "emulator/aten/alias_map.hpp"

#include <c10/core/CPUAllocator.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/TensorImpl.h>

#include <array>

#include "emulator/core/c_api.h"

namespace spillover::emulator {
namespace {

constexpr size_t kLinearSearchMax = 16;
constexpr size_t kNotFound = static_cast<size_t>(-1);

// Aliases of earlier operators of this thread, each with a storage of its own, for the next ones:
// to make a tensor and a storage, and to give them back, costs more than all else about an alias.
class SpareAliases {
 public:
  static SpareAliases& of_thread() {
    // In the initial TLS block: every operator comes by here.
    [[gnu::tls_model("initial-exec")]] static thread_local SpareAliases spares;
    return spares;
  }

  // Undefined where there is none.
  at::Tensor take() { return count_ == 0 ? at::Tensor() : std::move(tensors_[--count_]); }

  // Keeps the tensor if nobody else holds it, and nothing was attached to it.
  void keep(at::Tensor& tensor) {
    c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
    if (count_ == tensors_.size() || tensor.use_count() != 1 || tensor.is_inference() ||
        impl->autograd_meta() != nullptr || impl->pyobj_slot()->load_pyobj() != nullptr) {
      return;
    }
    c10::StorageImpl* storage = impl->unsafe_storage().unsafeGetStorageImpl();
    if (!impl->unsafe_storage().unique() || storage->pyobj_slot()->load_pyobj() != nullptr) return;
    storage->set_data_ptr_noswap(c10::DataPtr(nullptr, c10::Device(c10::DeviceType::CPU)));
    if (impl->is_conj()) impl->_set_conj(false);
    if (impl->is_neg()) impl->_set_neg(false);
    if (impl->is_wrapped_number()) impl->set_wrapped_number(false);
    tensors_[count_++] = std::move(tensor);
  }

 private:
  std::array<at::Tensor, 6> tensors_;
  size_t count_ = 0;
};

void* host_data_of(c10::StorageImpl* device, bool is_written) {
  // Asking for mutable data gives a copy-on-write storage its own bytes before they are aliased.
  const void* device_data = is_written ? device->mutable_data() : device->data();
  return device_data == nullptr ? nullptr : spillover_emulator_host_pointer(device_data);
}

// What is to be written was put aside before (CapturedCall), so that reading is enough here.
void* captured_data_of(const c10::StorageImpl* device, cudaStream_t stream) {
  return device->data() == nullptr ? nullptr
                                   : spillover_emulator_capture_pointer(
                                         stream, device->data(), device->nbytes(), /*is_write=*/0);
}

}  // namespace

AliasMap::~AliasMap() {
  storages_.clear();
  SpareAliases& spares = SpareAliases::of_thread();
  for (AliasedTensor& tensor : tensors_) spares.keep(tensor.host);
}

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

void AliasMap::add_storage(c10::StorageImpl* device, c10::Storage host, void* host_data) {
  storages_.push_back({device, std::move(host), host_data});
  if (index_) {
    index_->emplace(device, storages_.size() - 1);
  } else if (storages_.size() > kLinearSearchMax) {
    index_ = std::make_unique<std::unordered_map<const c10::StorageImpl*, size_t>>();
    for (size_t i = 0; i < storages_.size(); ++i) index_->emplace(storages_[i].device, i);
  }
}

at::Tensor AliasMap::make_alias(const at::Tensor& tensor, bool is_written) {
  const c10::Device host_device(c10::DeviceType::CPU);
  c10::StorageImpl* device = tensor.storage().unsafeGetStorageImpl();
  const size_t known = find_storage(device);
  if (known == kNotFound) {
    void* data =
        capturing_ ? captured_data_of(device, *capturing_) : host_data_of(device, is_written);
    at::Tensor spare =
        c10::InferenceMode::is_enabled() ? at::Tensor() : SpareAliases::of_thread().take();
    if (spare.defined()) {
      c10::TensorImpl* impl = spare.unsafeGetTensorImpl();
      const c10::Storage& storage = impl->unsafe_storage();
      storage.unsafeGetStorageImpl()->set_data_ptr_noswap(c10::DataPtr(data, host_device));
      storage.unsafeGetStorageImpl()->set_nbytes(device->nbytes());
      impl->set_storage_and_dtype(storage, tensor.dtype());
      add_storage(device, storage, data);
      return spare;
    }
    // The alias is resizable, so that kernels may grow out= arguments; commit_resizes moves them
    // back.
    add_storage(
        device,
        c10::Storage(c10::Storage::use_byte_size_t(), device->nbytes(),
                     c10::DataPtr(data, host_device), c10::GetCPUAllocator(), /*resizable=*/true),
        data);
  }
  c10::Storage storage = storages_[known == kNotFound ? storages_.size() - 1 : known].host;
  return at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
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
  at::Tensor host = make_alias(tensor, is_written);
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
    bool is_moved = false;
    if (index != kNotFound && storages_[index].host.data() != storages_[index].host_data) {
      AliasedStorage& storage = storages_[index];
      move_back(storage, arrivals);
      storage.host_data = const_cast<void*>(storage.host.data());
      is_moved = true;
    }
    if (host->sizes() == tensor.device->sizes() && host->strides() == tensor.device->strides() &&
        host->storage_offset() == tensor.device->storage_offset()) {
      continue;
    }
    tensor.device->set_sizes_and_strides(host->sizes(), host->strides(), host->storage_offset());
    // Reshaped within its storage: the bytes are in place, but nobody knew of them before.
    if (!is_moved && host->numel() != 0) {
      const auto* data = static_cast<const char*>(tensor.device->unsafe_storage().data());
      const size_t item_bytes = host->itemsize();
      arrivals.push_back({data + static_cast<size_t>(host->storage_offset()) * item_bytes, nullptr,
                          static_cast<size_t>(host->numel()) * item_bytes, c10::Storage()});
    }
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
