// Graphs, stream capture and user objects: the driver's, under the runtime's names. The types of
// handles are the driver's own; parameters of nodes are translated.
#include "emulator/libcudart/kernels.hpp"
#include "emulator/libcudart/runtime.hpp"

namespace runtime = spillover::emulator::runtime;
using runtime::device_pointer;
using runtime::plain;
using runtime::with_context;

namespace {

static_assert(sizeof(cudaGraphEdgeData) == sizeof(CUgraphEdgeData));
static_assert(sizeof(cudaHostNodeParams) == sizeof(CUDA_HOST_NODE_PARAMS));
static_assert(sizeof(cudaGraphExecUpdateResultInfo) == sizeof(CUgraphExecUpdateResultInfo));
static_assert(sizeof(cudaGraphInstantiateParams) == sizeof(CUDA_GRAPH_INSTANTIATE_PARAMS));
static_assert(static_cast<int>(cudaGraphNodeTypeConditional) ==
              static_cast<int>(CU_GRAPH_NODE_TYPE_CONDITIONAL));
static_assert(static_cast<int>(cudaGraphNodeTypeEventRecord) ==
              static_cast<int>(CU_GRAPH_NODE_TYPE_EVENT_RECORD));
static_assert(static_cast<int>(cudaStreamCaptureModeRelaxed) ==
              static_cast<int>(CU_STREAM_CAPTURE_MODE_RELAXED));

const CUgraphEdgeData* to_driver(const cudaGraphEdgeData* edges) {
  return reinterpret_cast<const CUgraphEdgeData*>(edges);
}
CUgraphEdgeData* to_driver(cudaGraphEdgeData* edges) {
  return reinterpret_cast<CUgraphEdgeData*>(edges);
}

CUstreamCaptureMode to_driver(cudaStreamCaptureMode mode) {
  return static_cast<CUstreamCaptureMode>(mode);
}

CUDA_MEMCPY3D to_driver(const cudaMemcpy3DParms& request) {
  CUDA_MEMCPY3D parameters{};
  parameters.srcMemoryType =
      request.srcArray != nullptr ? CU_MEMORYTYPE_ARRAY : CU_MEMORYTYPE_UNIFIED;
  parameters.srcDevice = device_pointer(request.srcPtr.ptr);
  parameters.srcPitch = request.srcPtr.pitch;
  parameters.srcXInBytes = request.srcPos.x;
  parameters.srcY = request.srcPos.y;
  parameters.srcZ = request.srcPos.z;
  parameters.dstMemoryType =
      request.dstArray != nullptr ? CU_MEMORYTYPE_ARRAY : CU_MEMORYTYPE_UNIFIED;
  parameters.dstDevice = device_pointer(request.dstPtr.ptr);
  parameters.dstPitch = request.dstPtr.pitch;
  parameters.dstXInBytes = request.dstPos.x;
  parameters.dstY = request.dstPos.y;
  parameters.dstZ = request.dstPos.z;
  parameters.WidthInBytes = request.extent.width;
  parameters.Height = request.extent.height;
  parameters.Depth = request.extent.depth;
  return parameters;
}

template <typename Parameters>
CUDA_MEMSET_NODE_PARAMS to_memset(const Parameters& request) {
  return {device_pointer(request.dst), request.pitch, request.value,
          request.elementSize,         request.width, request.height};
}

// cudaErrorInvalidDeviceFunction for a function that is no registered kernel.
template <typename Parameters>
cudaError_t to_kernel(const Parameters& request, CUDA_KERNEL_NODE_PARAMS* parameters) {
  runtime::Kernel* const kernel = runtime::find_kernel(request.func);
  if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  *parameters = {};
  parameters->gridDimX = request.gridDim.x;
  parameters->gridDimY = request.gridDim.y;
  parameters->gridDimZ = request.gridDim.z;
  parameters->blockDimX = request.blockDim.x;
  parameters->blockDimY = request.blockDim.y;
  parameters->blockDimZ = request.blockDim.z;
  parameters->sharedMemBytes = request.sharedMemBytes;
  parameters->kernelParams = request.kernelParams;
  parameters->extra = request.extra;
  return runtime::to_runtime(runtime::driver_function(kernel, &parameters->func));
}

}  // namespace

extern "C" {

// Capture.

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  return with_context(__func__, [=] { return cuStreamBeginCapture(stream, to_driver(mode)); });
}

cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph,
                                          const cudaGraphNode_t* dependencies,
                                          const cudaGraphEdgeData* edges, size_t count,
                                          cudaStreamCaptureMode mode) {
  return with_context(__func__, [=] {
    return cuStreamBeginCaptureToGraph(stream, graph, dependencies, to_driver(edges), count,
                                       to_driver(mode));
  });
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  return with_context(__func__, [=] { return cuStreamEndCapture(stream, graph); });
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return with_context(__func__, [=] {
    return cuStreamIsCapturing(stream, reinterpret_cast<CUstreamCaptureStatus*>(status));
  });
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  return with_context(__func__, [=] {
    cuuint64_t number = 0;
    const CUresult result = cuStreamGetCaptureInfo(
        stream, reinterpret_cast<CUstreamCaptureStatus*>(status), &number, graph, dependencies,
        reinterpret_cast<const CUgraphEdgeData**>(edges), count);
    if (id != nullptr) *id = number;
    return result;
  });
}

cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t stream, cudaGraphNode_t* dependencies,
                                                const cudaGraphEdgeData* edges, size_t count,
                                                unsigned int flags) {
  return with_context(__func__, [=] {
    return cuStreamUpdateCaptureDependencies(stream, dependencies, to_driver(edges), count, flags);
  });
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return plain(__func__, [=] {
    return cuThreadExchangeStreamCaptureMode(reinterpret_cast<CUstreamCaptureMode*>(mode));
  });
}

// Graphs.

cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned int flags) {
  return with_context(__func__, [=] { return cuGraphCreate(graph, flags); });
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return with_context(__func__, [=] { return cuGraphDestroy(graph); });
}

cudaError_t cudaGraphClone(cudaGraph_t* clone, cudaGraph_t original) {
  return with_context(__func__, [=] { return cuGraphClone(clone, original); });
}

cudaError_t cudaGraphNodeFindInClone(cudaGraphNode_t* node, cudaGraphNode_t original,
                                     cudaGraph_t clone) {
  return with_context(__func__, [=] { return cuGraphNodeFindInClone(node, original, clone); });
}

cudaError_t cudaGraphDestroyNode(cudaGraphNode_t node) {
  return with_context(__func__, [=] { return cuGraphDestroyNode(node); });
}

cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, cudaGraphNodeType* type) {
  return with_context(
      __func__, [=] { return cuGraphNodeGetType(node, reinterpret_cast<CUgraphNodeType*>(type)); });
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  return with_context(__func__, [=] { return cuGraphGetNodes(graph, nodes, count); });
}

cudaError_t cudaGraphGetRootNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  return with_context(__func__, [=] { return cuGraphGetRootNodes(graph, nodes, count); });
}

cudaError_t cudaGraphGetEdges(cudaGraph_t graph, cudaGraphNode_t* from, cudaGraphNode_t* to,
                              cudaGraphEdgeData* edges, size_t* count) {
  return with_context(__func__,
                      [=] { return cuGraphGetEdges(graph, from, to, to_driver(edges), count); });
}

cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t node, cudaGraphNode_t* dependencies,
                                         cudaGraphEdgeData* edges, size_t* count) {
  return with_context(__func__, [=] {
    return cuGraphNodeGetDependencies(node, dependencies, to_driver(edges), count);
  });
}

cudaError_t cudaGraphNodeGetDependentNodes(cudaGraphNode_t node, cudaGraphNode_t* dependents,
                                           cudaGraphEdgeData* edges, size_t* count) {
  return with_context(__func__, [=] {
    return cuGraphNodeGetDependentNodes(node, dependents, to_driver(edges), count);
  });
}

cudaError_t cudaGraphAddDependencies(cudaGraph_t graph, const cudaGraphNode_t* from,
                                     const cudaGraphNode_t* to, const cudaGraphEdgeData* edges,
                                     size_t count) {
  return with_context(
      __func__, [=] { return cuGraphAddDependencies(graph, from, to, to_driver(edges), count); });
}

cudaError_t cudaGraphRemoveDependencies(cudaGraph_t graph, const cudaGraphNode_t* from,
                                        const cudaGraphNode_t* to, const cudaGraphEdgeData* edges,
                                        size_t count) {
  return with_context(__func__, [=] {
    return cuGraphRemoveDependencies(graph, from, to, to_driver(edges), count);
  });
}

cudaError_t cudaGraphDebugDotPrint(cudaGraph_t graph, const char* path, unsigned int flags) {
  return with_context(__func__, [=] { return cuGraphDebugDotPrint(graph, path, flags); });
}

// Nodes.

cudaError_t cudaGraphAddKernelNode(cudaGraphNode_t* node, cudaGraph_t graph,
                                   const cudaGraphNode_t* dependencies, size_t count,
                                   const cudaKernelNodeParams* request) {
  return with_context(__func__, [=] {
    if (request == nullptr) return cudaErrorInvalidValue;
    CUDA_KERNEL_NODE_PARAMS parameters;
    const cudaError_t error = to_kernel(*request, &parameters);
    return error != cudaSuccess ? error
                                : runtime::to_runtime(cuGraphAddKernelNode(
                                      node, graph, dependencies, count, &parameters));
  });
}

cudaError_t cudaGraphKernelNodeSetParams(cudaGraphNode_t node,
                                         const cudaKernelNodeParams* request) {
  return with_context(__func__, [=] {
    if (request == nullptr) return cudaErrorInvalidValue;
    CUDA_KERNEL_NODE_PARAMS parameters;
    const cudaError_t error = to_kernel(*request, &parameters);
    return error != cudaSuccess
               ? error
               : runtime::to_runtime(cuGraphKernelNodeSetParams(node, &parameters));
  });
}

cudaError_t cudaGraphAddMemcpyNode(cudaGraphNode_t* node, cudaGraph_t graph,
                                   const cudaGraphNode_t* dependencies, size_t count,
                                   const cudaMemcpy3DParms* request) {
  return with_context(__func__, [=] {
    if (request == nullptr) return CUDA_ERROR_INVALID_VALUE;
    const CUDA_MEMCPY3D parameters = to_driver(*request);
    return cuGraphAddMemcpyNode(node, graph, dependencies, count, &parameters, nullptr);
  });
}

cudaError_t cudaGraphAddMemcpyNode1D(cudaGraphNode_t* node, cudaGraph_t graph,
                                     const cudaGraphNode_t* dependencies, size_t count,
                                     void* destination, const void* source, size_t size_bytes,
                                     cudaMemcpyKind kind) {
  return with_context(__func__, [=] {
    if (static_cast<unsigned int>(kind) > cudaMemcpyDefault) {
      return cudaErrorInvalidMemcpyDirection;
    }
    CUDA_MEMCPY3D parameters{};
    parameters.srcMemoryType = parameters.dstMemoryType = CU_MEMORYTYPE_UNIFIED;
    parameters.srcDevice = device_pointer(source);
    parameters.dstDevice = device_pointer(destination);
    parameters.WidthInBytes = size_bytes;
    parameters.Height = parameters.Depth = 1;
    return runtime::to_runtime(
        cuGraphAddMemcpyNode(node, graph, dependencies, count, &parameters, nullptr));
  });
}

cudaError_t cudaGraphAddMemsetNode(cudaGraphNode_t* node, cudaGraph_t graph,
                                   const cudaGraphNode_t* dependencies, size_t count,
                                   const cudaMemsetParams* request) {
  return with_context(__func__, [=] {
    if (request == nullptr) return CUDA_ERROR_INVALID_VALUE;
    const CUDA_MEMSET_NODE_PARAMS parameters = to_memset(*request);
    return cuGraphAddMemsetNode(node, graph, dependencies, count, &parameters, nullptr);
  });
}

cudaError_t cudaGraphAddHostNode(cudaGraphNode_t* node, cudaGraph_t graph,
                                 const cudaGraphNode_t* dependencies, size_t count,
                                 const cudaHostNodeParams* request) {
  return with_context(__func__, [=] {
    return cuGraphAddHostNode(node, graph, dependencies, count,
                              reinterpret_cast<const CUDA_HOST_NODE_PARAMS*>(request));
  });
}

cudaError_t cudaGraphAddEmptyNode(cudaGraphNode_t* node, cudaGraph_t graph,
                                  const cudaGraphNode_t* dependencies, size_t count) {
  return with_context(__func__,
                      [=] { return cuGraphAddEmptyNode(node, graph, dependencies, count); });
}

cudaError_t cudaGraphAddChildGraphNode(cudaGraphNode_t* node, cudaGraph_t graph,
                                       const cudaGraphNode_t* dependencies, size_t count,
                                       cudaGraph_t child) {
  return with_context(
      __func__, [=] { return cuGraphAddChildGraphNode(node, graph, dependencies, count, child); });
}

cudaError_t cudaGraphChildGraphNodeGetGraph(cudaGraphNode_t node, cudaGraph_t* graph) {
  return with_context(__func__, [=] { return cuGraphChildGraphNodeGetGraph(node, graph); });
}

cudaError_t cudaGraphAddEventRecordNode(cudaGraphNode_t* node, cudaGraph_t graph,
                                        const cudaGraphNode_t* dependencies, size_t count,
                                        cudaEvent_t event) {
  return with_context(
      __func__, [=] { return cuGraphAddEventRecordNode(node, graph, dependencies, count, event); });
}

cudaError_t cudaGraphAddEventWaitNode(cudaGraphNode_t* node, cudaGraph_t graph,
                                      const cudaGraphNode_t* dependencies, size_t count,
                                      cudaEvent_t event) {
  return with_context(
      __func__, [=] { return cuGraphAddEventWaitNode(node, graph, dependencies, count, event); });
}

cudaError_t cudaGraphAddNode(cudaGraphNode_t* node, cudaGraph_t graph,
                             const cudaGraphNode_t* dependencies, const cudaGraphEdgeData* edges,
                             size_t count, cudaGraphNodeParams* request) {
  return with_context(__func__, [=] {
    if (request == nullptr) return cudaErrorInvalidValue;
    CUgraphNodeParams parameters{};
    parameters.type = static_cast<CUgraphNodeType>(request->type);
    if (request->type == cudaGraphNodeTypeKernel) {
      CUDA_KERNEL_NODE_PARAMS kernel;
      const cudaError_t error = to_kernel(request->kernel, &kernel);
      if (error != cudaSuccess) return error;
      parameters.kernel.func = kernel.func;
      parameters.kernel.gridDimX = kernel.gridDimX;
      parameters.kernel.gridDimY = kernel.gridDimY;
      parameters.kernel.gridDimZ = kernel.gridDimZ;
      parameters.kernel.blockDimX = kernel.blockDimX;
      parameters.kernel.blockDimY = kernel.blockDimY;
      parameters.kernel.blockDimZ = kernel.blockDimZ;
      parameters.kernel.sharedMemBytes = kernel.sharedMemBytes;
      parameters.kernel.kernelParams = kernel.kernelParams;
      parameters.kernel.extra = kernel.extra;
    } else if (request->type == cudaGraphNodeTypeMemcpy) {
      parameters.memcpy.copyParams = to_driver(request->memcpy.copyParams);
    } else if (request->type == cudaGraphNodeTypeMemset) {
      const CUDA_MEMSET_NODE_PARAMS memset = to_memset(request->memset);
      parameters.memset = {memset.dst,   memset.pitch,  memset.value, memset.elementSize,
                           memset.width, memset.height, nullptr};
    } else if (request->type == cudaGraphNodeTypeHost) {
      parameters.host.fn = request->host.fn;
      parameters.host.userData = request->host.userData;
    } else if (request->type == cudaGraphNodeTypeGraph) {
      parameters.graph.graph = request->graph.graph;
    } else if (request->type == cudaGraphNodeTypeWaitEvent) {
      parameters.eventWait.event = request->eventWait.event;
    } else if (request->type == cudaGraphNodeTypeEventRecord) {
      parameters.eventRecord.event = request->eventRecord.event;
    }
    return runtime::to_runtime(
        cuGraphAddNode(node, graph, dependencies, to_driver(edges), count, &parameters));
  });
}

// Executables.

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph,
                                 unsigned long long flags) {
  return with_context(__func__, [=] { return cuGraphInstantiateWithFlags(exec, graph, flags); });
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph,
                                          unsigned long long flags) {
  return with_context(__func__, [=] { return cuGraphInstantiateWithFlags(exec, graph, flags); });
}

cudaError_t cudaGraphInstantiateWithParams(cudaGraphExec_t* exec, cudaGraph_t graph,
                                           cudaGraphInstantiateParams* parameters) {
  return with_context(__func__, [=] {
    return cuGraphInstantiateWithParams(
        exec, graph, reinterpret_cast<CUDA_GRAPH_INSTANTIATE_PARAMS*>(parameters));
  });
}

cudaError_t cudaGraphExecGetFlags(cudaGraphExec_t exec, unsigned long long* flags) {
  return with_context(__func__, [=] {
    cuuint64_t value = 0;
    const CUresult result = cuGraphExecGetFlags(exec, flags == nullptr ? nullptr : &value);
    if (result == CUDA_SUCCESS) *flags = value;
    return result;
  });
}

cudaError_t cudaGraphUpload(cudaGraphExec_t exec, cudaStream_t stream) {
  return with_context(__func__, [=] { return cuGraphUpload(exec, stream); });
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  return with_context(__func__, [=] { return cuGraphLaunch(exec, stream); });
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  return with_context(__func__, [=] { return cuGraphExecDestroy(exec); });
}

cudaError_t cudaGraphExecUpdate(cudaGraphExec_t exec, cudaGraph_t graph,
                                cudaGraphExecUpdateResultInfo* result) {
  return with_context(__func__, [=] {
    return cuGraphExecUpdate(exec, graph, reinterpret_cast<CUgraphExecUpdateResultInfo*>(result));
  });
}

cudaError_t cudaGraphNodeSetEnabled(cudaGraphExec_t exec, cudaGraphNode_t node,
                                    unsigned int is_enabled) {
  return with_context(__func__, [=] { return cuGraphNodeSetEnabled(exec, node, is_enabled); });
}

cudaError_t cudaGraphNodeGetEnabled(cudaGraphExec_t exec, cudaGraphNode_t node,
                                    unsigned int* is_enabled) {
  return with_context(__func__, [=] { return cuGraphNodeGetEnabled(exec, node, is_enabled); });
}

// User objects.

cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* pointer, cudaHostFn_t destroy,
                                 unsigned int count, unsigned int flags) {
  return with_context(__func__,
                      [=] { return cuUserObjectCreate(object, pointer, destroy, count, flags); });
}

cudaError_t cudaUserObjectRetain(cudaUserObject_t object, unsigned int count) {
  return with_context(__func__, [=] { return cuUserObjectRetain(object, count); });
}

cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned int count) {
  return with_context(__func__, [=] { return cuUserObjectRelease(object, count); });
}

cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object,
                                      unsigned int count, unsigned int flags) {
  return with_context(__func__,
                      [=] { return cuGraphRetainUserObject(graph, object, count, flags); });
}

cudaError_t cudaGraphReleaseUserObject(cudaGraph_t graph, cudaUserObject_t object,
                                       unsigned int count) {
  return with_context(__func__, [=] { return cuGraphReleaseUserObject(graph, object, count); });
}

}  // extern "C"
