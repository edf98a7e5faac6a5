// Contexts: each device's primary one, those that programs create, and each thread's stack of them.
//
// Contexts belong to the Machine and are never freed, so that a stale handle can be told from a
// live one. The registry is guarded by Machine::mutex; a thread's stack is its own.
#pragma once

#include <cuda.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>

#include "emulator/core/types.hpp"

namespace spillover::emulator {

struct Context {
  int device = 0;
  bool is_primary = false;
  bool is_live = true;  // for a created one: until cuCtxDestroy
  unsigned flags = 0;
  unsigned long long id = 0;
  int retain_count = 0;                            // the primary one's
  std::array<std::size_t, CU_LIMIT_MAX> limits{};  // 0: the default
  unsigned enabled_peers = 0;  // bit d: cuCtxEnablePeerAccess was called for device d

  CUcontext handle() { return reinterpret_cast<CUcontext>(this); }
};

class Contexts {
 public:
  explicit Contexts(int device_count);

  Context* primary(int device) { return &contexts_[static_cast<std::size_t>(device)]; }
  Context* create(int device, unsigned flags);

  // nullptr for a handle that is no live context.
  Context* find(CUcontext handle);

 private:
  std::deque<Context> contexts_;  // a deque, for addresses that stay
};

// The calling thread's stack of current contexts. Plain data, so that it can be used while the
// thread ends. set(nullptr) leaves the thread without one.
class CurrentContext {
 public:
  static Context* get();
  static void set(Context* context);
  static bool push(Context* context);
  static Context* pop();
};

// True while the calling thread is in an entry point whose null stream is the per-thread default
// stream (names that end in _ptsz or _ptds).
bool default_stream_is_per_thread();

class PerThreadDefaultScope {
 public:
  PerThreadDefaultScope();
  ~PerThreadDefaultScope();
  PerThreadDefaultScope(const PerThreadDefaultScope&) = delete;
  PerThreadDefaultScope& operator=(const PerThreadDefaultScope&) = delete;
};

}  // namespace spillover::emulator
