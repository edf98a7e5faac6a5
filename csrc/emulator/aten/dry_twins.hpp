// The meta tensors that stand for one call's CPU tensors in a dry run (dry_run.hpp, Note [Phantom
// kernels]), and the way back. Objects belong to one call on one thread.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstddef>

namespace spillover::emulator {

// Whether a storage's bytes stand for none: those of phantom results.
bool is_phantom(const void* bytes);

// Python's meta kernels are ordinary torch code: neither a program's modes nor a default device may
// have a part in it.
class MetaScope {
 public:
  MetaScope() : state_(at::impl::PythonTorchFunctionTLS::get_disabled_state()) {
    at::impl::PythonTorchFunctionTLS::set_disabled_state(
        at::impl::TorchFunctionDisabledState::ALL_DISABLED);
  }
  ~MetaScope() { at::impl::PythonTorchFunctionTLS::set_disabled_state(state_); }
  MetaScope(const MetaScope&) = delete;
  MetaScope& operator=(const MetaScope&) = delete;

 private:
  const at::impl::TorchFunctionDisabledState state_;
  const c10::impl::ExcludeDispatchKeyGuard without_modes_{
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot})};
};

// Meta tensors for one call's CPU tensors. Storages are shared as theirs are.
class MetaTwins {
 public:
  at::Tensor twin(const at::Tensor& host);

  // A CPU tensor of a meta result's shape: over the storage of the argument that it is a view of,
  // or without bytes.
  at::Tensor to_host(const at::Tensor& meta) const;

  // Whether a result is no view of an argument.
  bool is_fresh(const at::Tensor& meta) const;

  // What the meta kernel did to a written argument's shape, done to its CPU alias.
  void commit(const at::Tensor& host, const at::Tensor& meta) const;

 private:
  struct Pair {
    c10::Storage host;
    c10::Storage meta;
    size_t size_bytes;
  };

  c10::SmallVector<Pair, 6> storages_;
};

}  // namespace spillover::emulator
