// Keeps the contents of sleeping device memory in pinned host memory.
//
// Each piece gets a buffer of its own from a HostPool when its copy starts, so that memory is
// pinned while earlier pieces are copied. Thread-safe, as content_store.hpp says.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "allocator/content_store.hpp"
#include "tiers/host_pool.hpp"

namespace spillover {

class HostStore : public ContentStore {
 public:
  explicit HostStore(std::shared_ptr<HostPool> pool) : pool_(std::move(pool)) {}

  std::unique_ptr<SavedContents> begin(int device,
                                       const std::vector<ContentPiece>& pieces) override;

 private:
  const std::shared_ptr<HostPool> pool_;
};

}  // namespace spillover
