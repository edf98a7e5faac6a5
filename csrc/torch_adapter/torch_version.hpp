// Which torch the adapter is compiled against; see Note [Versions] in allocator.hpp.
#pragma once

#include <torch/version.h>

#define SPILLOVER_TORCH_AT_LEAST(major, minor) \
  (TORCH_VERSION_MAJOR > (major) ||            \
   (TORCH_VERSION_MAJOR == (major) && TORCH_VERSION_MINOR >= (minor)))
