#include "plain_adapter/interpreter.hpp"

namespace spillover::plain_adapter {
namespace {

// Constant once torch uses the allocator.
Interpreter interpreter{[]() noexcept -> void* { return nullptr; },
                        [](void* /*thread_state*/) noexcept {}};

}  // namespace

void set_interpreter(const Interpreter& functions) noexcept {
  interpreter = functions;
}

GilRelease::GilRelease() noexcept : thread_state_(interpreter.release()) {}

GilRelease::~GilRelease() {
  if (thread_state_ != nullptr) interpreter.take_back(thread_state_);
}

}  // namespace spillover::plain_adapter
