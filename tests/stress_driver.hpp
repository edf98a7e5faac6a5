// The emulated driver's functions for stress programs with a device.
#pragma once

#include <dlfcn.h>

#include "stress_checks.hpp"

// The driver is loaded by now.
template <class Function>
Function driver_function(const char* name) {
  void* const found = dlsym(dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD), name);
  require(found != nullptr, name);
  return reinterpret_cast<Function>(found);
}
