// Which NUMA node a device is nearest to, and memory that comes from there.
//
// Stateless; any thread may call these. The system calls are made directly: libnuma would be a
// dependency for two of them.
#pragma once

#include <cstddef>
#include <optional>
#include <string>

namespace spillover {

// Nodes with memory or processors that are online: 1 where the kernel knows of none. root stands
// before /sys: a test gives a folder of its own.
size_t numa_node_count(const std::string& root = "");

// The node of the device with this PCI address, such as "0000:65:00.0"; nothing where the kernel
// does not say.
std::optional<int> numa_node_of_pci(const std::string& address, const std::string& root = "");

// The node that the device's copies are fastest from, by the driver or else by the kernel; nothing
// on a machine with one node, or where neither knows. Throws DriverError.
std::optional<int> nearest_numa_node(int device, const std::string& root = "");

// Pages of the range that are touched from now on come from the node, as far as it has any. Empty,
// or why it is not so: containers may forbid it.
std::string prefer_numa_node(void* address, size_t size_bytes, int node);

}  // namespace spillover
