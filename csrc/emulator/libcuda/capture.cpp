// Stream capture.
#include "emulator/core/capture.hpp"

#include <utility>

#include "emulator/libcuda/graph_arguments.hpp"

namespace emulator = spillover::emulator;
using emulator::Captures;
using emulator::Graph;
using emulator::Lock;
using emulator::Machine;
using emulator::NodeList;
using emulator::StreamRef;
using emulator::with_stream;

namespace {

bool is_mode(CUstreamCaptureMode mode) {
  return mode == CU_STREAM_CAPTURE_MODE_GLOBAL || mode == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL ||
         mode == CU_STREAM_CAPTURE_MODE_RELAXED;
}

// What a version of cuStreamGetCaptureInfo tells; all but the status may be nullptr.
struct InfoOutputs {
  CUstreamCaptureStatus* status = nullptr;
  cuuint64_t* id = nullptr;
  CUgraph* graph = nullptr;
  const CUgraphNode** dependencies = nullptr;
  const CUgraphEdgeData** edges = nullptr;
  std::size_t* count = nullptr;
};

CUresult tell_info(const char* name, CUstream handle, const InfoOutputs& out) {
  return with_stream(name, handle, [&](Machine& machine, Lock&, const StreamRef& stream) {
    if (out.status == nullptr) return CUDA_ERROR_INVALID_VALUE;
    const CUresult result = machine.captures.status(stream, out.status);
    if (result != CUDA_SUCCESS || stream->capture == nullptr) {
      if (out.id != nullptr) *out.id = 0;
      return result;
    }
    emulator::StreamCapture& mine = *stream->capture;
    if (out.id != nullptr) *out.id = mine.capture->id;
    // The rest is told of a capture that goes on.
    if (*out.status != CU_STREAM_CAPTURE_STATUS_ACTIVE) return CUDA_SUCCESS;
    mine.tail_handles.clear();
    for (const emulator::GraphNode* node : mine.tail) mine.tail_handles.push_back(node->handle);
    mine.tail_edges.assign(mine.tail.size(), CUgraphEdgeData{});
    if (out.graph != nullptr) *out.graph = mine.capture->graph->handle;
    if (out.dependencies != nullptr) *out.dependencies = mine.tail_handles.data();
    if (out.edges != nullptr) *out.edges = mine.tail_edges.data();
    if (out.count != nullptr) *out.count = mine.tail.size();
    return CUDA_SUCCESS;
  });
}

}  // namespace

extern "C" {

CUresult cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode mode) {
  return with_stream(__func__, handle, [=](Machine& machine, Lock&, const StreamRef& stream) {
    if (!is_mode(mode)) return CUDA_ERROR_INVALID_VALUE;
    return machine.captures.begin(stream, mode, nullptr, {});
  });
}

CUresult cuStreamBeginCaptureToGraph(CUstream handle, CUgraph graph_handle,
                                     const CUgraphNode* dependencies, const CUgraphEdgeData* edges,
                                     std::size_t count, CUstreamCaptureMode mode) {
  return with_stream(__func__, handle, [=](Machine& machine, Lock&, const StreamRef& stream) {
    Graph* const graph = machine.graphs.find(graph_handle);
    if (graph == nullptr || !is_mode(mode)) return CUDA_ERROR_INVALID_VALUE;
    NodeList nodes;
    CUresult result = emulator::find_nodes(machine, graph, dependencies, count, &nodes);
    if (result == CUDA_SUCCESS) result = emulator::check_edges(edges, count);
    if (result != CUDA_SUCCESS) return result;
    return machine.captures.begin(stream, mode, graph, std::move(nodes));
  });
}

CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
  std::shared_ptr<Graph> garbage;  // dies without the mutex
  bool is_new = false;
  CUgraph made = nullptr;
  const auto end = [&](Machine& machine, Lock&, const StreamRef& stream) {
    if (graph == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *graph = nullptr;
    is_new = stream->capture != nullptr && stream->capture->capture->is_new_graph;
    return machine.captures.end(stream, &made, &garbage);
  };
  const CUresult result = with_stream(__func__, handle, end);
  if (result == CUDA_SUCCESS) {
    *graph = made;
  } else if (made != nullptr && is_new) {
    // An injected error: the capture is over all the same, and nobody gets its graph.
    Machine& machine = Machine::instance();
    const Lock lock(machine.mutex);
    garbage = machine.graphs.destroy(machine.graphs.find(made));
  }
  return result;
}

CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
  return tell_info(__func__, handle, {.status = status});
}

#undef cuStreamGetCaptureInfo
CUresult cuStreamGetCaptureInfo(CUstream handle, CUstreamCaptureStatus* status, cuuint64_t* id) {
  return tell_info(__func__, handle, {.status = status, .id = id});
}

CUresult cuStreamGetCaptureInfo_v2(CUstream handle, CUstreamCaptureStatus* status, cuuint64_t* id,
                                   CUgraph* graph, const CUgraphNode** dependencies,
                                   std::size_t* count) {
  return tell_info(
      __func__, handle,
      {.status = status, .id = id, .graph = graph, .dependencies = dependencies, .count = count});
}

CUresult cuStreamGetCaptureInfo_v3(CUstream handle, CUstreamCaptureStatus* status, cuuint64_t* id,
                                   CUgraph* graph, const CUgraphNode** dependencies,
                                   const CUgraphEdgeData** edges, std::size_t* count) {
  return tell_info(__func__, handle, {status, id, graph, dependencies, edges, count});
}

CUresult cuStreamUpdateCaptureDependencies_v2(CUstream handle, CUgraphNode* dependencies,
                                              const CUgraphEdgeData* edges, std::size_t count,
                                              unsigned int flags) {
  return with_stream(__func__, handle, [=](Machine& machine, Lock&, const StreamRef& stream) {
    if (flags > CU_STREAM_SET_CAPTURE_DEPENDENCIES) return CUDA_ERROR_INVALID_VALUE;
    if (stream->capture == nullptr) return CUDA_ERROR_ILLEGAL_STATE;
    emulator::StreamCapture& mine = *stream->capture;
    if (!mine.capture->is_valid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    NodeList nodes;
    CUresult result =
        emulator::find_nodes(machine, mine.capture->graph, dependencies, count, &nodes);
    if (result == CUDA_SUCCESS) result = emulator::check_edges(edges, count);
    if (result != CUDA_SUCCESS) return result;
    Captures::change_tail(stream, nodes, flags == CU_STREAM_SET_CAPTURE_DEPENDENCIES);
    return CUDA_SUCCESS;
  });
}

#undef cuStreamUpdateCaptureDependencies
CUresult cuStreamUpdateCaptureDependencies(CUstream stream, CUgraphNode* dependencies,
                                           std::size_t count, unsigned int flags) {
  return cuStreamUpdateCaptureDependencies_v2(stream, dependencies, nullptr, count, flags);
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  return emulator::plain(__func__, [=] {
    if (mode == nullptr || !is_mode(*mode)) return CUDA_ERROR_INVALID_VALUE;
    std::swap(*mode, Captures::thread_mode());
    return CUDA_SUCCESS;
  });
}

}  // extern "C"
