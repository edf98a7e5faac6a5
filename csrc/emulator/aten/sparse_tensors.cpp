#include "emulator/aten/sparse_tensors.hpp"

#include <ATen/SparseCsrTensorImpl.h>
#include <ATen/SparseCsrTensorUtils.h>
#include <ATen/SparseTensorImpl.h>
#include <ATen/native/SparseTensorUtils.h>
#include <ATen/ops/_sparse_compressed_tensor_unsafe.h>
#include <ATen/ops/_sparse_coo_tensor_unsafe.h>
#include <ATen/ops/empty_strided.h>

#include <cstring>
#include <tuple>

#include "emulator/aten/cost.hpp"

namespace spillover::emulator {
namespace {

bool is_coordinates(const at::Tensor& tensor) {
  return tensor.layout() == at::kSparse;
}

std::tuple<at::Tensor, at::Tensor> compressed_indices(const at::Tensor& tensor) {
  return at::sparse_csr::getCompressedPlainIndices(tensor);
}

at::Tensor make_coordinates(const at::Tensor& indices, const at::Tensor& values,
                            const at::Tensor& like, c10::DeviceType device) {
  return at::_sparse_coo_tensor_unsafe(indices, values, like.sizes(),
                                       values.options().layout(at::kSparse).device(device),
                                       like.is_coalesced());
}

at::Tensor make_compressed(const at::Tensor& compressed, const at::Tensor& plain,
                           const at::Tensor& values, const at::Tensor& like,
                           c10::DeviceType device) {
  return at::_sparse_compressed_tensor_unsafe(
      compressed, plain, values, like.sizes(),
      values.options().layout(like.layout()).device(device));
}

}  // namespace

SparseCallTensors::SparseCallTensors(const c10::cuda::CUDAStream& stream,
                                     const std::string& operator_name)
    : stream_(stream), name_(operator_name) {}

at::Tensor SparseCallTensors::alias(const at::Tensor& dense, bool is_written) {
  parts_.push_back(dense);
  if (hazards_enabled()) append_ranges(dense, is_written, ranges_);
  return aliases_.alias(parts_.back(), is_written);
}

at::Tensor SparseCallTensors::to_host(const at::Tensor& tensor, bool is_written) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  if (tensor.layout() == at::kStrided) return alias(tensor, is_written);
  at::Tensor host;
  if (is_coordinates(tensor)) {
    host = make_coordinates(alias(tensor._indices(), is_written),
                            alias(tensor._values(), is_written), tensor, c10::DeviceType::CPU);
  } else {
    const auto [compressed, plain] = compressed_indices(tensor);
    host = make_compressed(alias(compressed, is_written), alias(plain, is_written),
                           alias(tensor.values(), is_written), tensor, c10::DeviceType::CPU);
  }
  if (is_written) written_.push_back({tensor, host});
  return host;
}

at::Tensor SparseCallTensors::view_of(const at::Tensor& host, c10::StorageImpl* storage) const {
  c10::Storage shared(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(storage));
  at::Tensor device = at::detail::make_tensor<c10::TensorImpl>(
      std::move(shared), c10::DispatchKeySet(c10::DispatchKey::CUDA), host.dtype());
  device.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(),
                                                      host.storage_offset());
  device.unsafeGetTensorImpl()->_set_conj(host.is_conj());
  device.unsafeGetTensorImpl()->_set_neg(host.is_neg());
  return device;
}

at::Tensor SparseCallTensors::dense_to_device(const at::Tensor& host) {
  if (c10::StorageImpl* storage = aliases_.device_storage_of(host)) return view_of(host, storage);
  const at::Tensor plain = host.resolve_conj().resolve_neg();
  const at::Tensor packed = plain.is_non_overlapping_and_dense() ? plain : plain.contiguous();
  at::Tensor device =
      at::empty_strided(packed.sizes(), packed.strides(),
                        packed.options().device(c10::DeviceType::CUDA, stream_.device_index()));
  if (packed.numel() == 0) return device;
  arrivals_.push_back(
      {device.storage().data(), packed.const_data_ptr(), packed.nbytes(), packed.storage()});
  return device;
}

at::Tensor SparseCallTensors::to_device(const at::Tensor& host) {
  if (!host.defined() || !host.device().is_cpu()) return host;
  if (host.layout() == at::kStrided) return dense_to_device(host);
  if (is_coordinates(host)) {
    return make_coordinates(dense_to_device(host._indices()), dense_to_device(host._values()), host,
                            c10::DeviceType::CUDA);
  }
  const auto [compressed, plain] = compressed_indices(host);
  return make_compressed(dense_to_device(compressed), dense_to_device(plain),
                         dense_to_device(host.values()), host, c10::DeviceType::CUDA);
}

void SparseCallTensors::replace_members(const at::Tensor& device, const at::Tensor& host) {
  if (is_coordinates(host)) {
    auto* impl = at::sparse::get_sparse_impl(device);
    impl->raw_resize_(host.sparse_dim(), host.dense_dim(), host.sizes());
    impl->set_indices_and_values_unsafe(dense_to_device(host._indices()),
                                        dense_to_device(host._values()));
    impl->set_coalesced(host.is_coalesced());
    return;
  }
  const auto [compressed, plain] = compressed_indices(host);
  at::sparse_csr::get_sparse_csr_impl(device)->set_member_tensors(
      dense_to_device(compressed), dense_to_device(plain), dense_to_device(host.values()),
      host.sizes());
}

void SparseCallTensors::commit_writes() {
  aliases_.commit_resizes(arrivals_);
  for (const Written& written : written_) replace_members(written.device, written.host);
}

void SparseCallTensors::begin() {
  begin_operator(stream_.stream(), name_.c_str(), ranges_);
}

// Its operands once and its results once: what a sparse kernel moves at least.
void SparseCallTensors::charge() const {
  double bytes = 0;
  for (const at::Tensor& part : parts_) bytes += tensor_bytes(part);
  for (const Arrival& arrival : arrivals_) bytes += static_cast<double>(arrival.size_bytes);
  charge_kernel(stream_.stream(), name_.c_str(), bytes_bound_cost(bytes));
}

void SparseCallTensors::finish() {
  if (clock_enabled()) charge();
  if (arrivals_.empty()) return;
  RangeList written;
  for (const Arrival& arrival : arrivals_) {
    written.push_back({arrival.target, arrival.size_bytes, /*is_write=*/1});
  }
  // The allocations may have made this stream wait; see OperatorCall::fill_arrivals.
  begin_operator(stream_.stream(), name_.c_str(), written);
  for (const Arrival& arrival : arrivals_) {
    if (arrival.bytes == nullptr) continue;
    std::memcpy(spillover_emulator_host_pointer(arrival.target), arrival.bytes, arrival.size_bytes);
  }
}

}  // namespace spillover::emulator
