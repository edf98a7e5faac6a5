#include "tiers/write_limit.hpp"

#include <algorithm>
#include <cerrno>

#include "base/bytes.hpp"
#include "base/error.hpp"

namespace spillover {

void WriteLimit::add(uint64_t size_bytes, const std::string& folder) {
  uint64_t before = written_bytes_.load();
  do {
    if (limit_bytes_ - std::min(before, limit_bytes_) < size_bytes) {
      throw DiskFullError("the write limit of " + format_bytes(limit_bytes_) +
                              " is reached: " + format_bytes(before) + " are written and " +
                              format_bytes(size_bytes) +
                              " more were requested. Raise write_limit, or offload less to disk",
                          folder, EDQUOT);
    }
  } while (!written_bytes_.compare_exchange_weak(before, before + size_bytes));
}

}  // namespace spillover
