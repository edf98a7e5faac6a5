// What the functions of graphs share: handles and lists of nodes, looked up and checked. Bodies run
// with Machine::mutex held.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <vector>

#include "emulator/core/graph.hpp"
#include "emulator/libcuda/api_call.hpp"

namespace spillover::emulator {

using NodeList = std::vector<GraphNode*>;

// The nodes of a graph that a program lists; each at most once.
inline CUresult find_nodes(Machine& machine, const Graph* graph, const CUgraphNode* handles,
                           std::size_t count, NodeList* nodes) {
  if (handles == nullptr && count != 0) return CUDA_ERROR_INVALID_VALUE;
  for (std::size_t i = 0; i < count; ++i) {
    GraphNode* const node = machine.graphs.find_node(handles[i]);
    if (node == nullptr || node->graph != graph) return CUDA_ERROR_INVALID_VALUE;
    for (const GraphNode* other : *nodes) {
      if (other == node) return CUDA_ERROR_INVALID_VALUE;
    }
    nodes->push_back(node);
  }
  return CUDA_SUCCESS;
}

// Edges that wait for less than the whole of a kernel are not emulated.
inline CUresult check_edges(const CUgraphEdgeData* edges, std::size_t count) {
  for (std::size_t i = 0; edges != nullptr && i < count; ++i) {
    if (edges[i].from_port != 0 || edges[i].to_port != 0 || edges[i].type != 0) {
      report("programmatic dependencies between nodes of CUDA graphs are not emulated");
      return CUDA_ERROR_NOT_SUPPORTED;
    }
  }
  return CUDA_SUCCESS;
}

// Fills a program's array in CUDA's way: without one the count is told; a longer array than needed
// is filled up with nullptr, and the count is what was written.
template <typename Items, typename Value>
CUresult hand_out(const Items& items, Value* out, std::size_t* count) {
  if (count == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (out == nullptr) {
    *count = items.size();
    return CUDA_SUCCESS;
  }
  for (std::size_t i = 0; i < *count; ++i) out[i] = i < items.size() ? items[i] : Value{};
  if (*count > items.size()) *count = items.size();
  return CUDA_SUCCESS;
}

// body(Machine&, Graph&) -> CUresult
template <typename Body>
CUresult with_graph(const char* name, CUgraph handle, Body&& body) {
  return with_driver(name, [&](Machine& machine, Lock&) {
    Graph* const graph = machine.graphs.find(handle);
    return graph == nullptr ? CUDA_ERROR_INVALID_VALUE : body(machine, *graph);
  });
}

// body(Machine&, GraphNode&) -> CUresult
template <typename Body>
CUresult with_node(const char* name, CUgraphNode handle, Body&& body) {
  return with_driver(name, [&](Machine& machine, Lock&) {
    GraphNode* const node = machine.graphs.find_node(handle);
    return node == nullptr ? CUDA_ERROR_INVALID_VALUE : body(machine, *node);
  });
}

// What a program's description of a node's work comes to; nodes of other types are not emulated.
CUresult copy_work(Machine& machine, const CUDA_MEMCPY3D* request, const char** name,
                   NodeWork* work);
CUresult fill_work(Machine& machine, const CUDA_MEMSET_NODE_PARAMS_v2& request, NodeWork* work);
CUresult host_work(CUhostFn function, void* argument, NodeWork* work);
CUresult kernel_work(Machine& machine, const CUDA_KERNEL_NODE_PARAMS_v2& request, const char** name,
                     NodeWork* work);
CUresult work_of(Machine& machine, const CUgraphNodeParams& request, const char** name,
                 NodeWork* work);

}  // namespace spillover::emulator
