// Nodes of graphs: what they do, added and changed by hand.
#include <memory>
#include <utility>

#include "emulator/core/kernels.hpp"
#include "emulator/core/transfers.hpp"
#include "emulator/libcuda/graph_arguments.hpp"

namespace emulator = spillover::emulator;
using emulator::Address;
using emulator::Graph;
using emulator::GraphNode;
using emulator::Machine;
using emulator::NodeWork;
using emulator::with_graph;
using emulator::with_node;

namespace spillover::emulator {
namespace {

Address first_byte(CUmemorytype type, const void* host, CUdeviceptr device) {
  if (type == CU_MEMORYTYPE_HOST) return reinterpret_cast<Address>(host);
  return type == CU_MEMORYTYPE_ARRAY ? 0 : device;
}

}  // namespace

CUresult copy_work(Machine& machine, const CUDA_MEMCPY3D* request, const char** name,
                   NodeWork* work) {
  if (request == nullptr || request->Depth > 1) return CUDA_ERROR_INVALID_VALUE;
  if (request->srcMemoryType == CU_MEMORYTYPE_ARRAY ||
      request->dstMemoryType == CU_MEMORYTYPE_ARRAY || request->srcZ != 0 || request->dstZ != 0) {
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  const std::size_t width = request->WidthInBytes;
  Copy copy;
  copy.width_bytes = width;
  copy.height = request->Height;
  copy.source_pitch = request->srcPitch != 0 ? request->srcPitch : width;
  copy.destination_pitch = request->dstPitch != 0 ? request->dstPitch : width;
  copy.source = first_byte(request->srcMemoryType, request->srcHost, request->srcDevice);
  copy.destination = first_byte(request->dstMemoryType, request->dstHost, request->dstDevice);
  if (copy.source == 0 || copy.destination == 0) return CUDA_ERROR_INVALID_VALUE;
  copy.source += request->srcY * copy.source_pitch + request->srcXInBytes;
  copy.destination += request->dstY * copy.destination_pitch + request->dstXInBytes;
  if (copy.height <= 1) copy.source_pitch = copy.destination_pitch = width;
  const CUresult valid = check_copy_node(machine, copy, name);
  if (valid == CUDA_SUCCESS) *work = std::move(copy);
  return valid;
}

CUresult fill_work(Machine& machine, const CUDA_MEMSET_NODE_PARAMS_v2& request, NodeWork* work) {
  const std::size_t pitch =
      request.height <= 1 ? request.width * request.elementSize : request.pitch;
  const Fill fill{request.dst,    pitch,         request.width,
                  request.height, request.value, request.elementSize};
  const CUresult valid = check_fill_node(machine, fill);
  if (valid == CUDA_SUCCESS) *work = fill;
  return valid;
}

CUresult host_work(CUhostFn function, void* argument, NodeWork* work) {
  if (function == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *work = HostFunction{function, argument};
  return CUDA_SUCCESS;
}

CUresult kernel_work(Machine& machine, const CUDA_KERNEL_NODE_PARAMS_v2& request, const char** name,
                     NodeWork* work) {
  const void* const handle = request.func != nullptr ? static_cast<const void*>(request.func)
                                                     : static_cast<const void*>(request.kern);
  const RegisteredKernel* const kernel = machine.kernels.check(handle);
  if (kernel == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (request.extra != nullptr) return CUDA_ERROR_NOT_SUPPORTED;
  const bool is_empty = request.gridDimX == 0 || request.gridDimY == 0 || request.gridDimZ == 0 ||
                        request.blockDimX == 0 || request.blockDimY == 0 || request.blockDimZ == 0;
  if (is_empty || (request.kernelParams == nullptr && !kernel->parameter_bytes.empty())) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const spillover_emulator_launch_shape shape{
      {request.gridDimX, request.gridDimY, request.gridDimZ},
      {request.blockDimX, request.blockDimY, request.blockDimZ},
      request.sharedMemBytes};
  *name = kernel->name.c_str();
  KernelBody body =
      KernelLaunch::shared(std::make_unique<KernelLaunch>(*kernel, shape, request.kernelParams));
  body.accesses = kernel->accesses_of(shape, request.kernelParams);
  body.cost = launch_cost(machine.clock, *kernel, body.accesses);
  *work = std::make_shared<const KernelBody>(std::move(body));
  return CUDA_SUCCESS;
}

CUresult work_of(Machine& machine, const CUgraphNodeParams& request, const char** name,
                 NodeWork* work) {
  switch (request.type) {
    case CU_GRAPH_NODE_TYPE_KERNEL: {
      const CUDA_KERNEL_NODE_PARAMS_v3& kernel = request.kernel;
      const CUDA_KERNEL_NODE_PARAMS_v2 parameters{
          kernel.func,         kernel.gridDimX,  kernel.gridDimY,  kernel.gridDimZ,
          kernel.blockDimX,    kernel.blockDimY, kernel.blockDimZ, kernel.sharedMemBytes,
          kernel.kernelParams, kernel.extra,     kernel.kern,      kernel.ctx};
      return kernel_work(machine, parameters, name, work);
    }
    case CU_GRAPH_NODE_TYPE_MEMCPY:
      return copy_work(machine, &request.memcpy.copyParams, name, work);
    case CU_GRAPH_NODE_TYPE_MEMSET:
      *name = "memset";
      return fill_work(machine, request.memset, work);
    case CU_GRAPH_NODE_TYPE_HOST:
      *name = "host function";
      return host_work(request.host.fn, request.host.userData, work);
    case CU_GRAPH_NODE_TYPE_EMPTY:
      return CUDA_SUCCESS;
    case CU_GRAPH_NODE_TYPE_WAIT_EVENT:
      *name = "event wait";
      *work = EventWaitWork{request.eventWait.event};
      return machine.events.find(request.eventWait.event) == nullptr ? CUDA_ERROR_INVALID_VALUE
                                                                     : CUDA_SUCCESS;
    case CU_GRAPH_NODE_TYPE_EVENT_RECORD:
      *name = "event record";
      *work = EventRecordWork{request.eventRecord.event};
      return machine.events.find(request.eventRecord.event) == nullptr ? CUDA_ERROR_INVALID_VALUE
                                                                       : CUDA_SUCCESS;
    case CU_GRAPH_NODE_TYPE_GRAPH: {
      const Graph* const child = machine.graphs.find(request.graph.graph);
      if (child == nullptr) return CUDA_ERROR_INVALID_VALUE;
      Graph* const copy = machine.graphs.clone(*child);
      copy->is_embedded = true;
      *name = "child graph";
      *work = ChildGraphWork{machine.graphs.share(copy->handle)};
      return CUDA_SUCCESS;
    }
    case CU_GRAPH_NODE_TYPE_CONDITIONAL:
      report("conditional nodes of CUDA graphs are not emulated");
      return CUDA_ERROR_NOT_SUPPORTED;
    default:
      report("nodes of CUDA graphs of type %d are not emulated", static_cast<int>(request.type));
      return CUDA_ERROR_NOT_SUPPORTED;
  }
}

namespace {

// make(Machine&, const char** name, NodeWork*) -> CUresult
template <typename Make>
CUresult add(const char* function, CUgraphNode* handle, CUgraph graph_handle,
             const CUgraphNode* dependencies, std::size_t count, Make&& make) {
  return with_graph(function, graph_handle, [&](Machine& machine, Graph& graph) {
    if (handle == nullptr) return CUDA_ERROR_INVALID_VALUE;
    NodeList before;
    CUresult result = find_nodes(machine, &graph, dependencies, count, &before);
    if (result != CUDA_SUCCESS) return result;
    const char* name = "";
    NodeWork work;
    result = make(machine, &name, &work);
    if (result != CUDA_SUCCESS) return result;
    *handle = machine.graphs.add_node(&graph, name, std::move(work), before)->handle;
    return CUDA_SUCCESS;
  });
}

// The same for what a node does, in place of what it did. What that held dies without the mutex.
template <typename Make>
CUresult change(const char* function, CUgraphNode handle, CUgraphNodeType type, Make&& make) {
  std::shared_ptr<const NodeWork> old;
  return with_node(function, handle, [&](Machine& machine, GraphNode& node) {
    if (node.type() != type) return CUDA_ERROR_INVALID_VALUE;
    const char* name = node.name;
    NodeWork work;
    const CUresult result = make(machine, &name, &work);
    if (result != CUDA_SUCCESS) return result;
    old = std::exchange(node.work, std::make_shared<const NodeWork>(std::move(work)));
    node.name = name;
    return CUDA_SUCCESS;
  });
}

}  // namespace
}  // namespace spillover::emulator

extern "C" {

CUresult cuGraphAddKernelNode(CUgraphNode* node, CUgraph graph, const CUgraphNode* dependencies,
                              std::size_t count, const CUDA_KERNEL_NODE_PARAMS* parameters) {
  return emulator::add(__func__, node, graph, dependencies, count,
                       [=](Machine& machine, const char** name, NodeWork* work) {
                         if (parameters == nullptr) return CUDA_ERROR_INVALID_VALUE;
                         return emulator::kernel_work(machine, *parameters, name, work);
                       });
}

CUresult cuGraphKernelNodeSetParams(CUgraphNode node, const CUDA_KERNEL_NODE_PARAMS* parameters) {
  return emulator::change(__func__, node, CU_GRAPH_NODE_TYPE_KERNEL,
                          [=](Machine& machine, const char** name, NodeWork* work) {
                            if (parameters == nullptr) return CUDA_ERROR_INVALID_VALUE;
                            return emulator::kernel_work(machine, *parameters, name, work);
                          });
}

CUresult cuGraphAddMemcpyNode(CUgraphNode* node, CUgraph graph, const CUgraphNode* dependencies,
                              std::size_t count, const CUDA_MEMCPY3D* parameters, CUcontext) {
  return emulator::add(__func__, node, graph, dependencies, count,
                       [=](Machine& machine, const char** name, NodeWork* work) {
                         return emulator::copy_work(machine, parameters, name, work);
                       });
}

CUresult cuGraphMemcpyNodeSetParams(CUgraphNode node, const CUDA_MEMCPY3D* parameters) {
  return emulator::change(__func__, node, CU_GRAPH_NODE_TYPE_MEMCPY,
                          [=](Machine& machine, const char** name, NodeWork* work) {
                            return emulator::copy_work(machine, parameters, name, work);
                          });
}

CUresult cuGraphAddMemsetNode(CUgraphNode* node, CUgraph graph, const CUgraphNode* dependencies,
                              std::size_t count, const CUDA_MEMSET_NODE_PARAMS* parameters,
                              CUcontext context) {
  return emulator::add(
      __func__, node, graph, dependencies, count,
      [=](Machine& machine, const char** name, NodeWork* work) {
        if (parameters == nullptr) return CUDA_ERROR_INVALID_VALUE;
        *name = "memset";
        return emulator::fill_work(
            machine,
            {parameters->dst, parameters->pitch, parameters->value, parameters->elementSize,
             parameters->width, parameters->height, context},
            work);
      });
}

CUresult cuGraphMemsetNodeSetParams(CUgraphNode node, const CUDA_MEMSET_NODE_PARAMS* parameters) {
  return emulator::change(
      __func__, node, CU_GRAPH_NODE_TYPE_MEMSET,
      [=](Machine& machine, const char**, NodeWork* work) {
        if (parameters == nullptr) return CUDA_ERROR_INVALID_VALUE;
        return emulator::fill_work(
            machine,
            {parameters->dst, parameters->pitch, parameters->value, parameters->elementSize,
             parameters->width, parameters->height, nullptr},
            work);
      });
}

CUresult cuGraphMemsetNodeGetParams(CUgraphNode handle, CUDA_MEMSET_NODE_PARAMS* parameters) {
  return with_node(__func__, handle, [=](Machine&, GraphNode& node) {
    const auto* fill = std::get_if<emulator::Fill>(node.work.get());
    if (parameters == nullptr || fill == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *parameters = {fill->destination,   fill->pitch,          fill->value,
                   fill->element_bytes, fill->width_elements, fill->height};
    return CUDA_SUCCESS;
  });
}

CUresult cuGraphAddHostNode(CUgraphNode* node, CUgraph graph, const CUgraphNode* dependencies,
                            std::size_t count, const CUDA_HOST_NODE_PARAMS* parameters) {
  return emulator::add(__func__, node, graph, dependencies, count,
                       [=](Machine&, const char** name, NodeWork* work) {
                         if (parameters == nullptr) return CUDA_ERROR_INVALID_VALUE;
                         *name = "host function";
                         return emulator::host_work(parameters->fn, parameters->userData, work);
                       });
}

CUresult cuGraphHostNodeSetParams(CUgraphNode node, const CUDA_HOST_NODE_PARAMS* parameters) {
  return emulator::change(__func__, node, CU_GRAPH_NODE_TYPE_HOST,
                          [=](Machine&, const char**, NodeWork* work) {
                            if (parameters == nullptr) return CUDA_ERROR_INVALID_VALUE;
                            return emulator::host_work(parameters->fn, parameters->userData, work);
                          });
}

CUresult cuGraphHostNodeGetParams(CUgraphNode handle, CUDA_HOST_NODE_PARAMS* parameters) {
  return with_node(__func__, handle, [=](Machine&, GraphNode& node) {
    const auto* function = std::get_if<emulator::HostFunction>(node.work.get());
    if (parameters == nullptr || function == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *parameters = {function->body, function->argument};
    return CUDA_SUCCESS;
  });
}

CUresult cuGraphAddNode(CUgraphNode* node, CUgraph graph, const CUgraphNode* dependencies,
                        const CUgraphEdgeData* edges, std::size_t count,
                        CUgraphNodeParams* parameters) {
  return emulator::add(__func__, node, graph, dependencies, count,
                       [=](Machine& machine, const char** name, NodeWork* work) {
                         if (parameters == nullptr) return CUDA_ERROR_INVALID_VALUE;
                         const CUresult valid = emulator::check_edges(edges, count);
                         if (valid != CUDA_SUCCESS) return valid;
                         return emulator::work_of(machine, *parameters, name, work);
                       });
}

CUresult cuGraphNodeSetParams(CUgraphNode node, CUgraphNodeParams* parameters) {
  if (parameters == nullptr) return emulator::finish_call(__func__, CUDA_ERROR_INVALID_VALUE);
  return emulator::change(__func__, node, parameters->type,
                          [=](Machine& machine, const char** name, NodeWork* work) {
                            return emulator::work_of(machine, *parameters, name, work);
                          });
}

CUresult cuGraphAddEmptyNode(CUgraphNode* node, CUgraph graph, const CUgraphNode* dependencies,
                             std::size_t count) {
  return emulator::add(__func__, node, graph, dependencies, count,
                       [](Machine&, const char**, NodeWork*) { return CUDA_SUCCESS; });
}

CUresult cuGraphAddChildGraphNode(CUgraphNode* node, CUgraph graph, const CUgraphNode* dependencies,
                                  std::size_t count, CUgraph child) {
  CUgraphNodeParams parameters{};
  parameters.type = CU_GRAPH_NODE_TYPE_GRAPH;
  parameters.graph.graph = child;
  if (child == graph) return emulator::finish_call(__func__, CUDA_ERROR_INVALID_VALUE);
  return cuGraphAddNode(node, graph, dependencies, nullptr, count, &parameters);
}

CUresult cuGraphChildGraphNodeGetGraph(CUgraphNode handle, CUgraph* graph) {
  return with_node(__func__, handle, [=](Machine&, GraphNode& node) {
    const auto* child = std::get_if<emulator::ChildGraphWork>(node.work.get());
    if (graph == nullptr || child == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *graph = child->graph->handle;
    return CUDA_SUCCESS;
  });
}

CUresult cuGraphAddEventRecordNode(CUgraphNode* node, CUgraph graph,
                                   const CUgraphNode* dependencies, std::size_t count,
                                   CUevent event) {
  CUgraphNodeParams parameters{};
  parameters.type = CU_GRAPH_NODE_TYPE_EVENT_RECORD;
  parameters.eventRecord.event = event;
  return cuGraphAddNode(node, graph, dependencies, nullptr, count, &parameters);
}

CUresult cuGraphAddEventWaitNode(CUgraphNode* node, CUgraph graph, const CUgraphNode* dependencies,
                                 std::size_t count, CUevent event) {
  CUgraphNodeParams parameters{};
  parameters.type = CU_GRAPH_NODE_TYPE_WAIT_EVENT;
  parameters.eventWait.event = event;
  return cuGraphAddNode(node, graph, dependencies, nullptr, count, &parameters);
}

CUresult cuGraphEventRecordNodeGetEvent(CUgraphNode handle, CUevent* event) {
  return with_node(__func__, handle, [=](Machine&, GraphNode& node) {
    const auto* record = std::get_if<emulator::EventRecordWork>(node.work.get());
    if (event == nullptr || record == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *event = record->event;
    return CUDA_SUCCESS;
  });
}

CUresult cuGraphEventWaitNodeGetEvent(CUgraphNode handle, CUevent* event) {
  return with_node(__func__, handle, [=](Machine&, GraphNode& node) {
    const auto* wait = std::get_if<emulator::EventWaitWork>(node.work.get());
    if (event == nullptr || wait == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *event = wait->event;
    return CUDA_SUCCESS;
  });
}

}  // extern "C"
