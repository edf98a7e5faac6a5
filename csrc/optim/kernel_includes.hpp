// The standard headers of kernels.inc. PRIVATE to kernels_*.cpp, which include them before they
// switch instructions on, so that no other file gets a copy of an inline function with those.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
