// Dropout, histograms, and matrix products with a result type of their own: small operators without
// a usable CPU kernel.
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/histc.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones_like.h>

#include <tuple>

#include "emulator/aten/own_kernels.hpp"
#include "emulator/aten/random.hpp"

namespace spillover::emulator {
namespace {

using at::Tensor;
using c10::Scalar;
using c10::ScalarType;
using TensorPair = std::tuple<Tensor, Tensor>;

TensorPair dropout_with(const Tensor& input, double keep_probability, at::Generator generator) {
  Tensor mask = at::empty(input.sizes(), input.options().dtype(at::kBool));
  mask.bernoulli_(keep_probability, std::move(generator));
  const double scale = keep_probability == 0 ? 0.0 : 1.0 / keep_probability;
  return {input.mul(mask).mul_(scale), mask};
}

// The CPU kernel draws from the default CPU generator and cannot be told otherwise.
TensorPair native_dropout(const Tensor& input, double p, std::optional<bool> train) {
  if (train.has_value() && !*train) {
    return {input.clone(), at::ones_like(input, input.options().dtype(at::kBool))};
  }
  return dropout_with(input, 1.0 - p, generator_at(take_default_position()));
}

// p is the probability of keeping an element here, and the mask holds bytes.
TensorPair fused_dropout(const Tensor& input, double p, std::optional<at::Generator> generator) {
  auto [output, mask] = dropout_with(input, p, std::move(generator).value());
  return {output, mask.to(at::kByte)};
}

Tensor masked_scale(const Tensor& self, const Tensor& mask, double scale) {
  return self.mul(mask.to(at::kBool)).mul_(scale);
}

Tensor mm_dtype(const Tensor& self, const Tensor& mat2, ScalarType dtype) {
  return at::mm(self.to(dtype), mat2.to(dtype));
}

Tensor bmm_dtype(const Tensor& self, const Tensor& mat2, ScalarType dtype) {
  return at::bmm(self.to(dtype), mat2.to(dtype));
}

Tensor addmm_dtype(const Tensor& self, const Tensor& mat1, const Tensor& mat2, ScalarType dtype,
                   const Scalar& beta, const Scalar& alpha) {
  return at::addmm(self.to(dtype), mat1.to(dtype), mat2.to(dtype), beta, alpha);
}

Tensor baddbmm_dtype(const Tensor& self, const Tensor& batch1, const Tensor& batch2,
                     ScalarType dtype, const Scalar& beta, const Scalar& alpha) {
  return at::baddbmm(self.to(dtype), batch1.to(dtype), batch2.to(dtype), beta, alpha);
}

Tensor& mm_dtype_out(const Tensor& self, const Tensor& mat2, ScalarType dtype, Tensor& out) {
  return out.copy_(mm_dtype(self, mat2, dtype));
}

Tensor& bmm_dtype_out(const Tensor& self, const Tensor& mat2, ScalarType dtype, Tensor& out) {
  return out.copy_(bmm_dtype(self, mat2, dtype));
}

Tensor& addmm_dtype_out(const Tensor& self, const Tensor& mat1, const Tensor& mat2,
                        ScalarType dtype, const Scalar& beta, const Scalar& alpha, Tensor& out) {
  return out.copy_(addmm_dtype(self, mat1, mat2, dtype, beta, alpha));
}

Tensor& baddbmm_dtype_out(const Tensor& self, const Tensor& batch1, const Tensor& batch2,
                          ScalarType dtype, const Scalar& beta, const Scalar& alpha, Tensor& out) {
  return out.copy_(baddbmm_dtype(self, batch1, batch2, dtype, beta, alpha));
}

// The CPU counts floats only. In double precision the bins of whole numbers are CUDA's.
Tensor histc(const Tensor& self, int64_t bins, const Scalar& min, const Scalar& max) {
  if (self.is_floating_point()) return at::histc(self, bins, min, max);
  return at::histc(self.to(at::kDouble), bins, min, max).to(self.scalar_type());
}

}  // namespace

void add_elementwise_kernels(KernelTable& table) {
  add_kernel<&native_dropout>(table, "aten::native_dropout");
  add_kernel<&fused_dropout>(table, "aten::_fused_dropout");
  add_kernel<&masked_scale>(table, "aten::_masked_scale");
  add_kernel<&histc>(table, "aten::histc");
  add_kernel<&mm_dtype>(table, "aten::mm.dtype");
  add_kernel<&bmm_dtype>(table, "aten::bmm.dtype");
  add_kernel<&addmm_dtype>(table, "aten::addmm.dtype");
  add_kernel<&baddbmm_dtype>(table, "aten::baddbmm.dtype");
  add_kernel<&mm_dtype_out>(table, "aten::mm.dtype_out");
  add_kernel<&bmm_dtype_out>(table, "aten::bmm.dtype_out");
  add_kernel<&addmm_dtype_out>(table, "aten::addmm.dtype_out");
  add_kernel<&baddbmm_dtype_out>(table, "aten::baddbmm.dtype_out");
}

}  // namespace spillover::emulator
