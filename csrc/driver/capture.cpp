#include "driver/capture.hpp"

#include <exception>

#include "driver/function_table.hpp"

namespace spillover {
namespace {

// Programmatic dependencies let a node begin before what it depends on has ended.
bool is_full(const CUgraphEdgeData& edge) {
  return edge.type == CU_GRAPH_DEPENDENCY_TYPE_DEFAULT;
}

// The nodes that a node waits for.
std::vector<GraphNode> awaited_by(GraphNode node) {
  auto* const raw = static_cast<CUgraphNode>(node);
  size_t count = 0;
  if (SPILLOVER_DRIVER_CALL(cuGraphNodeGetDependencies, raw, nullptr, nullptr, &count) !=
      CUDA_SUCCESS) {
    return {};
  }
  std::vector<CUgraphNode> nodes(count);
  std::vector<CUgraphEdgeData> edges(count);
  if (count == 0 || SPILLOVER_DRIVER_CALL(cuGraphNodeGetDependencies, raw, nodes.data(),
                                          edges.data(), &count) != CUDA_SUCCESS) {
    return {};
  }
  std::vector<GraphNode> result;
  for (size_t i = 0; i < count; ++i) {
    if (is_full(edges[i])) result.push_back(nodes[i]);
  }
  return result;
}

}  // namespace

std::optional<CapturePosition> capture_position(StreamHandle stream) noexcept {
  try {
    CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
    CapturePosition position;
    cuuint64_t capture = 0;
    const CUgraphNode* nodes = nullptr;
    const CUgraphEdgeData* edges = nullptr;
    size_t count = 0;
    const CUresult result =
        SPILLOVER_DRIVER_CALL(cuStreamGetCaptureInfo, static_cast<CUstream>(stream), &status,
                              &capture, nullptr, &nodes, &edges, &count);
    if (result != CUDA_SUCCESS || status != CU_STREAM_CAPTURE_STATUS_ACTIVE) return std::nullopt;
    position.capture = capture;
    for (size_t i = 0; i < count; ++i) {
      position.nodes.push_back(nodes[i]);
      // Without edge data all of them are ordinary.
      if (edges == nullptr || is_full(edges[i])) position.awaited.push_back(nodes[i]);
    }
    return position;
  } catch (const std::exception&) {
    return std::nullopt;
  }
}

std::set<GraphNode> nodes_before(const CapturePosition& position) {
  std::set<GraphNode> found(position.awaited.begin(), position.awaited.end());
  std::vector<GraphNode> open(found.begin(), found.end());
  while (!open.empty()) {
    const GraphNode node = open.back();
    open.pop_back();
    for (const GraphNode awaited : awaited_by(node)) {
      if (found.insert(awaited).second) open.push_back(awaited);
    }
  }
  return found;
}

}  // namespace spillover
