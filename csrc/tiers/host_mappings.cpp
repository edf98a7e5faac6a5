#include "tiers/host_mappings.hpp"

#include <utility>

#include "base/check.hpp"

namespace spillover {

std::byte* HostMappings::add(HostMapping&& mapping) {
  std::byte* const address = mapping.address();
  Entries added(1);
  const auto entry = added.begin();
  const auto by_size = idle_by_size_.emplace(mapping.size_bytes(), entry);
  entry->by_size = idle_by_size_.extract(by_size);
  by_address_.emplace(address, entry);
  entry->mapping = std::move(mapping);
  size_bytes_ += entry->mapping.size_bytes();
  huge_page_bytes_ += entry->mapping.huge_page_bytes();
  used_.splice(used_.end(), added);
  return address;
}

std::byte* HostMappings::take(size_t size_bytes) noexcept {
  const auto found = idle_by_size_.find(size_bytes);
  if (found == idle_by_size_.end()) return nullptr;
  const auto entry = found->second;
  entry->by_size = idle_by_size_.extract(found);
  idle_bytes_ -= size_bytes;
  used_.splice(used_.end(), idle_, entry);
  return entry->mapping.address();
}

size_t HostMappings::give_back(const std::byte* address) noexcept {
  const auto found = by_address_.find(address);
  SPILLOVER_CHECK(found != by_address_.end() && !found->second->by_size.empty(),
                  "a mapping came back that is not in use");
  const auto entry = found->second;
  const size_t size_bytes = entry->mapping.size_bytes();
  entry->idle_entry = idle_by_size_.insert(std::move(entry->by_size));
  idle_bytes_ += size_bytes;
  idle_.splice(idle_.end(), used_, entry);
  return size_bytes;
}

std::optional<HostMapping> HostMappings::take_longest_idle() noexcept {
  if (idle_.empty()) return std::nullopt;
  const auto entry = idle_.begin();
  HostMapping mapping = std::move(entry->mapping);
  idle_by_size_.erase(entry->idle_entry);
  by_address_.erase(mapping.address());
  idle_bytes_ -= mapping.size_bytes();
  size_bytes_ -= mapping.size_bytes();
  huge_page_bytes_ -= mapping.huge_page_bytes();
  idle_.erase(entry);
  return mapping;
}

}  // namespace spillover
