#include "emulator/aten/sparse_kernel.hpp"

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <iterator>
#include <utility>
#include <vector>

#include "emulator/aten/operator_kernel.hpp"
#include "emulator/aten/sparse_tensors.hpp"

namespace spillover::emulator {
namespace {

// Constant expressions, since kernels are registered while the library's other globals are
// initialised.
constexpr std::string_view kSparseLaunchingOperators[] = {
    "aten::_coalesce",
    "aten::_sparse_broadcast_to",
    "aten::_sparse_csr_prod",
    "aten::_sparse_csr_sum",
    "aten::_sparse_log_softmax",
    "aten::_sparse_log_softmax_backward_data",
    "aten::_sparse_mask_projection",
    "aten::_sparse_softmax",
    "aten::_sparse_softmax_backward_data",
    "aten::_sparse_sparse_matmul",
    "aten::_sparse_sum_backward",
    "aten::_spsolve",
    "aten::add",
    "aten::add_",
    "aten::addmm",
    "aten::addmm_",
    "aten::addmv",
    "aten::baddbmm",
    "aten::bmm",
    "aten::hspmm",
    "aten::index_select",
    "aten::mm",
    "aten::mul",
    "aten::mul_",
    "aten::mv",
    "aten::sparse_mask",
    "aten::sparse_sampled_addmm",
    "aten::sspaddmm",
    "aten::sub",
    "aten::sub_",
    "aten::triangular_solve",
};

// These learn on the host how many elements their result has.
constexpr std::string_view kSparseSynchronizingOperators[] = {
    "aten::_coalesce",
    "aten::_sparse_sparse_matmul",
    "aten::hspmm",
    "aten::index_select",
    "aten::sspaddmm",
    "aten::_sparse_csr_sum",
    "aten::_sparse_csr_prod",
};

template <size_t kCount>
bool is_among(const std::string_view (&names)[kCount], std::string_view name) {
  return std::find(std::begin(names), std::end(names), name) != std::end(names);
}

c10::DeviceIndex sparse_device_of(const c10::IValue* arguments, const OperatorPlan& plan) {
  for (size_t i = 0; i < plan.arguments.size(); ++i) {
    if (!arguments[i].isTensor()) continue;
    const at::Tensor& tensor = arguments[i].toTensor();
    if (tensor.defined() && tensor.is_cuda()) return tensor.device().index();
  }
  return c10::cuda::current_device();
}

void check_sparse_device(const at::Tensor& tensor, c10::DeviceIndex device,
                         const OperatorPlan& plan) {
  if (!tensor.defined() || (tensor.is_cpu() && tensor.dim() == 0)) return;
  const c10::Device expected(c10::DeviceType::CUDA, device);
  TORCH_CHECK(tensor.device() == expected,
              "Expected all tensors to be on the same device, but found at least two devices, ",
              expected, " and ", tensor.device(), "! (when checking arguments of ", plan.name, ")");
}

}  // namespace

bool launches_sparse_kernels(std::string_view base_name) {
  return is_among(kSparseLaunchingOperators, base_name);
}

EmulatedSparseOperator::EmulatedSparseOperator(OperatorPlan plan, c10::DispatchKey host_key)
    : plan_(std::move(plan)), host_key_(host_key) {}

void EmulatedSparseOperator::operator()(const c10::OperatorHandle& op, c10::DispatchKeySet,
                                        torch::jit::Stack* stack) const {
  const size_t first = stack->size() - plan_.arguments.size();
  c10::IValue* arguments = stack->data() + first;
  const c10::DeviceIndex device = sparse_device_of(arguments, plan_);
  const c10::cuda::CUDAGuard device_guard(device);
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(device);
  const c10::impl::ExcludeDispatchKeyGuard below_autograd(
      c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset);
  const DeviceWorkScope device_work;

  SparseCallTensors tensors(stream, plan_.name);
  std::vector<c10::IValue> originals;
  originals.reserve(plan_.arguments.size());
  for (size_t i = 0; i < plan_.arguments.size(); ++i) {
    originals.push_back(arguments[i]);
    if (!arguments[i].isTensor()) continue;
    check_sparse_device(originals[i].toTensor(), device, plan_);
    arguments[i] = tensors.to_host(originals[i].toTensor(), plan_.arguments[i].is_written);
  }
  tensors.begin();
  try {
    op.redispatchBoxed(c10::DispatchKeySet(host_key_), stack);
  } catch (c10::NotImplementedError& error) {
    error.add_context("spillover emulator: operator " + plan_.name +
                      " ran on its CPU kernel for sparse tensors, which lacks this case");
    throw;
  }
  tensors.commit_writes();
  for (size_t i = first; i < stack->size(); ++i) {
    const size_t result = i - first;
    const int returned =
        result < plan_.returned_arguments.size() ? plan_.returned_arguments[result] : -1;
    c10::IValue& value = (*stack)[i];
    if (returned >= 0) {
      value = originals[static_cast<size_t>(returned)];
    } else if (value.isTensor()) {
      value = tensors.to_device(value.toTensor());
    }
  }
  tensors.finish();
  if (is_among(kSparseSynchronizingOperators, op.schema().name())) {
    c10::cuda::stream_synchronize(stream.stream());
  }
}

}  // namespace spillover::emulator
