#include "emulator/aten/copy.hpp"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/copy_native.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "emulator/aten/accesses.hpp"
#include "emulator/aten/alias_map.hpp"
#include "emulator/aten/brain_complex.hpp"
#include "emulator/aten/captured_call.hpp"
#include "emulator/aten/cost.hpp"
#include "emulator/aten/dry_run.hpp"
#include "emulator/aten/dry_values.hpp"
#include "emulator/aten/operator_kernel.hpp"
#include "emulator/aten/plan.hpp"

namespace spillover::emulator {
namespace {

// What CUDA does with a memcpy.
bool is_plain(const at::Tensor& self, const at::Tensor& source) {
  return self.scalar_type() == source.scalar_type() && self.is_contiguous() &&
         source.is_contiguous() && self.sizes() == source.sizes() &&
         self.is_conj() == source.is_conj() && self.is_neg() == source.is_neg();
}

at::Tensor as_stored(const at::Tensor& tensor) {
  return tensor.is_conj() ? tensor._conj() : tensor;
}

// torch's copy between CPU tensors, and what it lacks: to conjugate complex numbers of bfloat16.
void copy_on_host(at::Tensor target, const at::Tensor& source) {
  const bool conjugates = target.is_conj() != source.is_conj();
  if (!conjugates ||
      (target.scalar_type() != kBrainComplex && source.scalar_type() != kBrainComplex)) {
    at::native::copy_(target, source, /*non_blocking=*/false);
    return;
  }
  const at::Tensor wide = as_stored(source).to(at::kComplexFloat)._conj().resolve_conj();
  at::Tensor stored = as_stored(target);
  at::native::copy_(stored, wide, /*non_blocking=*/false);
}

void capture_copy(const at::Tensor& self, const at::Tensor& source,
                  const c10::cuda::CUDAStream& stream) {
  static const OperatorPlan plan(
      c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "").schema());
  static const CostRule cost_rule(plan);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const DeviceWorkScope device_work;
  torch::jit::Stack stack{self, source, false};
  capture_call(
      plan, cost_rule,
      [](torch::jit::Stack* tensors) {
        copy_on_host((*tensors)[0].toTensor(), (*tensors)[1].toTensor());
        tensors->resize(1);
      },
      stream, &stack);
}

void copy_as_operator(at::Tensor& self, const at::Tensor& source) {
  constexpr const char* kName = "aten::copy_";
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(self.device().index());
  if (is_capturing(stream)) return capture_copy(self, source, stream);
  RangeList ranges;
  if (hazards_enabled()) {
    append_ranges(self, /*is_written=*/true, ranges);
    append_ranges(source, /*is_written=*/false, ranges);
  }
  begin_operator(stream.stream(), kName, ranges);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const DeviceWorkScope device_work;
  AliasMap aliases;
  const at::Tensor target = aliases.alias(self, /*is_written=*/true);
  const at::Tensor from = aliases.alias(source, /*is_written=*/false);
  if (!dry_run_enabled()) {
    copy_on_host(target, from);
  } else if (!copy_phantom(target, from)) {
    copy_on_host(target, from);
    finish_real_copy(target);
  }
  if (clock_enabled()) {
    charge_kernel(stream.stream(), kName,
                  bytes_bound_cost(tensor_bytes(self) + tensor_bytes(source)));
  }
}

}  // namespace

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  const bool on_device = is_device_tensor(self) && is_device_tensor(source) &&
                         !self._is_zerotensor() && !source._is_zerotensor();
  if (!on_device || is_plain(self, source) || self.is_same(source)) {
    at::native::copy_(self, source, non_blocking);
    if (dry_run_enabled() && self.is_cpu() && !self.is_pinned()) bind_unknown_to_storage(self);
    return self;
  }
  if (self.device() == source.device()) {
    const c10::cuda::CUDAGuard guard(self.device());
    copy_as_operator(self, source);
    return self;
  }
  // Between devices: convert where the source is, move plain bytes, permute where the result is.
  const at::Tensor converted =
      source.to(self.scalar_type()).resolve_conj().resolve_neg().contiguous();
  const at::Tensor arrived = at::empty_like(converted, self.options());
  at::Tensor staged = arrived;
  at::native::copy_(staged, converted, non_blocking);
  copy_as_operator(self, staged);
  return self;
}

void foreach_copy_(at::TensorList self, at::TensorList source, bool non_blocking) {
  TORCH_CHECK(self.size() == source.size(),
              "Tensor lists must have the same number of tensors, got ", self.size(), " and ",
              source.size());
  for (size_t i = 0; i < self.size(); ++i) self[i].copy_(source[i], non_blocking);
}

}  // namespace spillover::emulator
