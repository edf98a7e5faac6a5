// Labels of events whose names are known at run time only, as those of Python's spans.
//
// Thread-safe. A name is never forgotten, so there are at most kLabelsMax; those that come after
// are all called the same.
#pragma once

#include <cstddef>
#include <string>

#include "trace/recorder.hpp"

namespace spillover {

inline constexpr size_t kLabelsMax = size_t{1} << 16;

// The label with that name and category.
const TraceLabel& intern_label(const std::string& name, const std::string& category);

}  // namespace spillover
