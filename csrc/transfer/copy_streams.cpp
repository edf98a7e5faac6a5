#include "transfer/copy_streams.hpp"

#include <map>
#include <memory>
#include <mutex>

#include "driver/fork_guard.hpp"

namespace spillover {

CopyStreams& CopyStreams::of(int device) {
  struct Known {
    std::mutex mutex;
    std::map<int, std::unique_ptr<CopyStreams>> by_device;
  };
  static Known& known = *new Known;
  check_not_forked();
  const std::lock_guard lock(known.mutex);
  auto& streams = known.by_device[device];
  if (streams == nullptr) streams.reset(new CopyStreams(device));
  return *streams;
}

}  // namespace spillover
