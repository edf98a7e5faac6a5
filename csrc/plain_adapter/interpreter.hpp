// Gives up Python's interpreter lock around a wait, without Python's headers.
//
// The layer above, which has them, hands in what is needed; until then, and in a process without
// Python, nothing is given up. Why no thread waits in the pool while it holds the lock says Note
// [GIL] in torch_adapter/gil.hpp.
#pragma once

namespace spillover::plain_adapter {

struct Interpreter {
  // The thread's state where the calling thread held the lock, which it then holds no more, else
  // NULL.
  void* (*release)() noexcept;
  void (*take_back)(void* thread_state) noexcept;
};

// Called once, before torch uses the allocator. The functions must be callable until the process
// ends, also after Python is gone.
void set_interpreter(const Interpreter& functions) noexcept;

// A value of this type lives on one thread's stack; any thread may make one.
class GilRelease {
 public:
  GilRelease() noexcept;
  ~GilRelease();
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  void* const thread_state_;
};

// Calls the pool without the interpreter lock.
template <class Call>
auto without_gil(Call call) {
  const GilRelease no_gil;
  return call();
}

}  // namespace spillover::plain_adapter
