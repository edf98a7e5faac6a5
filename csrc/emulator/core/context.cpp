#include "emulator/core/context.hpp"

namespace spillover::emulator {
namespace {

constexpr int kDepthMax = 64;

struct Stack {
  Context* contexts[kDepthMax];
  int depth;
};

thread_local Stack stack = {};
thread_local bool per_thread_default = false;

}  // namespace

Contexts::Contexts(int device_count) {
  for (int device = 0; device < device_count; ++device) {
    Context& context = contexts_.emplace_back();
    context.device = device;
    context.is_primary = true;
    context.id = static_cast<unsigned long long>(device) + 1;
  }
}

Context* Contexts::create(int device, unsigned flags) {
  Context& context = contexts_.emplace_back();
  context.device = device;
  context.flags = flags;
  context.id = contexts_.size();
  return &context;
}

Context* Contexts::find(CUcontext handle) {
  for (Context& context : contexts_) {
    if (context.handle() == handle) return context.is_live ? &context : nullptr;
  }
  return nullptr;
}

Context* CurrentContext::get() {
  return stack.depth == 0 ? nullptr : stack.contexts[stack.depth - 1];
}

void CurrentContext::set(Context* context) {
  if (context == nullptr) {
    if (stack.depth > 0) --stack.depth;
  } else if (stack.depth == 0) {
    stack.contexts[stack.depth++] = context;
  } else {
    stack.contexts[stack.depth - 1] = context;
  }
}

bool CurrentContext::push(Context* context) {
  if (stack.depth == kDepthMax) return false;
  stack.contexts[stack.depth++] = context;
  return true;
}

Context* CurrentContext::pop() {
  return stack.depth == 0 ? nullptr : stack.contexts[--stack.depth];
}

bool default_stream_is_per_thread() {
  return per_thread_default;
}

PerThreadDefaultScope::PerThreadDefaultScope() {
  per_thread_default = true;
}
PerThreadDefaultScope::~PerThreadDefaultScope() {
  per_thread_default = false;
}

}  // namespace spillover::emulator
