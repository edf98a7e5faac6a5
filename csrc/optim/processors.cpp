// Which processors belong to which NUMA node.
#include <sched.h>

#include <fstream>
#include <sstream>

#include "optim/thread_pool.hpp"

namespace spillover {
namespace {

// Processors that are listed as "0-3,8".
std::vector<int> parse_list(std::istream& file) {
  std::vector<int> found;
  for (std::string range; std::getline(file, range, ',');) {
    std::istringstream text(range);
    int first = 0;
    if (!(text >> first)) continue;
    int last = first;
    if (text.get() == '-') text >> last;
    for (int processor = first; processor <= last; ++processor) found.push_back(processor);
  }
  return found;
}

}  // namespace

std::vector<std::vector<int>> processors_by_node(const std::string& root) {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return {};
  std::vector<std::vector<int>> nodes;
  const std::string folder = root + "/sys/devices/system/node/";
  std::ifstream online(folder + "online");
  for (const int node : parse_list(online)) {
    std::ifstream file(folder + "node" + std::to_string(node) + "/cpulist");
    std::vector<int> processors;
    for (const int processor : parse_list(file)) {
      if (processor < CPU_SETSIZE && CPU_ISSET(static_cast<size_t>(processor), &allowed)) {
        processors.push_back(processor);
      }
    }
    if (!processors.empty()) nodes.push_back(std::move(processors));
  }
  if (!nodes.empty()) return nodes;
  std::vector<int> all;
  for (int processor = 0; processor < CPU_SETSIZE; ++processor)
    if (CPU_ISSET(static_cast<size_t>(processor), &allowed)) all.push_back(processor);
  return {all};
}

}  // namespace spillover
