// Kernels that have a body on the host, by name. A module or library can be loaded whatever is in
// it; a function of it can be had only where its name is registered here.
//
// Owned by the Machine; guarded by Machine::mutex.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "emulator/core/kernel_api.h"
#include "emulator/core/operation.hpp"

namespace spillover::emulator {

class Clock;

struct RegisteredKernel {
  std::string name;
  std::string title;  // as the source code has it
  spillover_emulator_kernel_body body = nullptr;
  void* user = nullptr;
  std::vector<std::size_t> parameter_bytes;
  spillover_emulator_kernel_accesses accesses = nullptr;
  void* accesses_user = nullptr;

  // What a launch touches; empty where nobody said.
  std::vector<KernelAccess> accesses_of(const spillover_emulator_launch_shape& shape,
                                        void** parameters) const;
};

class Kernels {
 public:
  // Replaces a body of the same name.
  void add(RegisteredKernel kernel);

  // False for a name without a body.
  bool declare(const std::string& name, spillover_emulator_kernel_accesses accesses, void* user);

  // nullptr, and the first time a sentence on stderr, for a name without a body. What is returned
  // lives for ever.
  RegisteredKernel* find(const std::string& name);

  // Whether a handle that a program hands in is a kernel of ours.
  const RegisteredKernel* check(const void* handle) const;

 private:
  std::map<std::string, RegisteredKernel> kernels_;
  std::map<std::string, bool> reported_;
};

// What a launch takes on the clock: to move the bytes that it says it touches.
OperationCost launch_cost(const Clock& clock, const RegisteredKernel& kernel,
                          const std::vector<KernelAccess>& accesses);

// body(argument), as often as a graph is launched.
KernelBody repeated(void (*body)(void*), void* argument);

// A launch with its own copy of the arguments.
class KernelLaunch {
 public:
  KernelLaunch(const RegisteredKernel& kernel, const spillover_emulator_launch_shape& shape,
               void** parameters);

  // For Operation's Kernel: runs the launch and deletes it.
  static void run(void* launch);

  // Deletes a launch that does not run.
  static void drop(void* launch);

  // The same for a node of a graph, which runs it more than once.
  static KernelBody shared(std::unique_ptr<KernelLaunch> launch);

 private:
  void call();

  spillover_emulator_kernel_body body_;
  void* user_;
  spillover_emulator_launch_shape shape_;
  std::vector<std::vector<unsigned char>> values_;
};

}  // namespace spillover::emulator
