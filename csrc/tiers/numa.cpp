#include "tiers/numa.hpp"

#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <climits>
#include <cstring>
#include <fstream>
#include <sstream>

#include "driver/device.hpp"

namespace spillover {

size_t numa_node_count(const std::string& root) {
  // Ranges such as "0-1,4".
  std::ifstream file(root + "/sys/devices/system/node/online");
  size_t count = 0;
  for (std::string range; std::getline(file, range, ',');) {
    std::istringstream text(range);
    size_t first = 0;
    if (!(text >> first)) continue;
    size_t last = first;
    if (text.get() == '-') text >> last;
    if (last >= first) count += last - first + 1;
  }
  return count == 0 ? 1 : count;
}

std::optional<int> numa_node_of_pci(const std::string& address, const std::string& root) {
  std::ifstream file(root + "/sys/bus/pci/devices/" + address + "/numa_node");
  int node = -1;
  if (!(file >> node) || node < 0) return std::nullopt;
  return node;
}

std::optional<int> nearest_numa_node(int device, const std::string& root) {
  if (numa_node_count(root) < 2) return std::nullopt;
  if (const auto node = device_numa_node(device)) return node;
  return numa_node_of_pci(device_pci_address(device), root);
}

std::string prefer_numa_node(void* address, size_t size_bytes, int node) {
  constexpr size_t kNodesMax = 1024;
  constexpr size_t kWordBits = sizeof(unsigned long) * CHAR_BIT;
  if (node < 0 || static_cast<size_t>(node) >= kNodesMax) return "there is no such node";
  std::array<unsigned long, kNodesMax / kWordBits> nodes{};
  const auto bit = static_cast<size_t>(node);
  nodes[bit / kWordBits] = 1UL << bit % kWordBits;
  // The kernel takes the number of bits to be one more than it is.
  if (syscall(SYS_mbind, address, size_bytes, MPOL_PREFERRED, nodes.data(), kNodesMax + 1, 0U) ==
      0) {
    return {};
  }
  return std::strerror(errno);
}

}  // namespace spillover
