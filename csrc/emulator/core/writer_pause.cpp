#include "emulator/core/writer_pause.hpp"

#include <atomic>
#include <chrono>
#include <ctime>
#include <thread>

namespace spillover::emulator {
namespace {

// Of the current move, or of the last one. What the signal handler reads.
std::atomic<Address> range_begin{0};
std::atomic<std::size_t> range_bytes{0};
std::atomic<bool> moving{false};
struct sigaction next_handler{};

// A thread that has faulted runs the handler a moment later; until then it must stay in place.
constexpr auto kDeliveryTime = std::chrono::milliseconds(1);

void on_fault(int, siginfo_t* fault, void*) {
  const auto address = reinterpret_cast<Address>(fault->si_addr);
  if (address - range_begin.load() < range_bytes.load()) {
    const timespec pause{0, 50'000};
    while (moving.load()) nanosleep(&pause, nullptr);
    return;  // and write again
  }
  // Not ours: the program's handler meets the fault when it happens again.
  sigaction(SIGSEGV, &next_handler, nullptr);
}

}  // namespace

WriterPause::WriterPause(Address address, std::size_t size_bytes) {
  sigaction(SIGSEGV, nullptr, &previous_);
  next_handler = previous_;
  range_begin.store(address);
  range_bytes.store(size_bytes);
  moving.store(true);
  struct sigaction ours{};
  ours.sa_sigaction = on_fault;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  sigaction(SIGSEGV, &ours, nullptr);
}

WriterPause::~WriterPause() {
  moving.store(false);
  std::this_thread::sleep_for(kDeliveryTime);
  sigaction(SIGSEGV, &previous_, nullptr);
}

}  // namespace spillover::emulator
