#include "base/emulator_symbol.hpp"

#include <dlfcn.h>

namespace spillover {

// libcuda.so.1 may have been opened with RTLD_LOCAL, which hides it from RTLD_DEFAULT, so it is
// asked for by name as well, without loading it.
void* find_emulator_symbol(const char* name) {
  if (void* found = dlsym(RTLD_DEFAULT, name)) return found;
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  if (driver == nullptr) return nullptr;
  void* found = dlsym(driver, name);
  dlclose(driver);
  return found;
}

}  // namespace spillover
