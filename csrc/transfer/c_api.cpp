#include "transfer/c_api.h"

#include <exception>

#include "transfer/host_store.hpp"

extern "C" {

spillover_content_store* spillover_make_host_store(size_t limit_bytes, int device) {
  try {
    spillover::HostPoolOptions options;
    options.limit_bytes = limit_bytes;
    options.device = device;
    spillover::ContentStore* store = new spillover::HostStore(spillover::HostPool::create(options));
    return reinterpret_cast<spillover_content_store*>(store);
  } catch (const std::exception&) {
    return nullptr;
  }
}

void spillover_release_store(spillover_content_store* store) {
  delete reinterpret_cast<spillover::ContentStore*>(store);
}

}  // extern "C"
