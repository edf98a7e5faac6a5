// Graphs: made, looked at, instantiated, launched; user objects.
#include <cstdio>
#include <memory>
#include <string>
#include <utility>

#include "emulator/core/graph_exec.hpp"
#include "emulator/libcuda/graph_arguments.hpp"

namespace emulator = spillover::emulator;
using emulator::Graph;
using emulator::GraphExec;
using emulator::GraphNode;
using emulator::Lock;
using emulator::Machine;
using emulator::NodeList;
using emulator::StreamRef;
using emulator::with_driver;
using emulator::with_graph;
using emulator::with_node;
using emulator::with_work;

namespace {

constexpr cuuint64_t kInstantiateFlags =
    CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH | CUDA_GRAPH_INSTANTIATE_FLAG_UPLOAD |
    CUDA_GRAPH_INSTANTIATE_FLAG_DEVICE_LAUNCH | CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY;

std::vector<CUgraphNode> handles_of(const NodeList& nodes) {
  std::vector<CUgraphNode> handles;
  for (const GraphNode* node : nodes) handles.push_back(node->handle);
  return handles;
}

CUresult instantiate(Machine& machine, CUgraphExec* exec, const Graph& graph, cuuint64_t flags) {
  if (exec == nullptr || (flags & ~kInstantiateFlags) != 0) return CUDA_ERROR_INVALID_VALUE;
  if ((flags & CUDA_GRAPH_INSTANTIATE_FLAG_DEVICE_LAUNCH) != 0) {
    emulator::report("launching CUDA graphs from the device is not emulated");
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  if (graph.is_capturing) return CUDA_ERROR_ILLEGAL_STATE;
  std::shared_ptr<GraphExec> made = GraphExec::instantiate(machine, graph, flags);
  if (made == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *exec = machine.graphs.add_exec(std::move(made));
  return CUDA_SUCCESS;
}

// body(Machine&, GraphExec&) -> CUresult
template <typename Body>
CUresult with_exec(const char* name, CUgraphExec handle, Body&& body) {
  return with_driver(name, [&](Machine& machine, Lock&) {
    GraphExec* const exec = machine.graphs.find_exec(handle);
    return exec == nullptr ? CUDA_ERROR_INVALID_VALUE : body(machine, *exec);
  });
}

CUresult list_neighbours(const char* name, CUgraphNode handle, NodeList GraphNode::* list,
                         CUgraphNode* nodes, CUgraphEdgeData* edges, std::size_t* count) {
  return with_node(name, handle, [=](Machine&, GraphNode& node) {
    const NodeList& neighbours = node.*list;
    if (nodes != nullptr && edges != nullptr && count != nullptr) {
      for (std::size_t i = 0; i < *count; ++i) edges[i] = {};
    }
    return emulator::hand_out(handles_of(neighbours), nodes, count);
  });
}

CUresult change_edges(const char* name, CUgraph handle, const CUgraphNode* from,
                      const CUgraphNode* to, const CUgraphEdgeData* edges, std::size_t count,
                      bool (*change)(GraphNode*, GraphNode*)) {
  return with_graph(name, handle, [=](Machine& machine, Graph& graph) {
    if (count != 0 && (from == nullptr || to == nullptr)) return CUDA_ERROR_INVALID_VALUE;
    const CUresult valid = emulator::check_edges(edges, count);
    if (valid != CUDA_SUCCESS) return valid;
    for (std::size_t i = 0; i < count; ++i) {
      GraphNode* const first = machine.graphs.find_node(from[i]);
      GraphNode* const second = machine.graphs.find_node(to[i]);
      if (first == nullptr || second == nullptr || first == second || first->graph != &graph ||
          second->graph != &graph || !change(first, second)) {
        return CUDA_ERROR_INVALID_VALUE;
      }
    }
    return CUDA_SUCCESS;
  });
}

}  // namespace

extern "C" {

CUresult cuGraphCreate(CUgraph* handle, unsigned int flags) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    if (handle == nullptr || flags != 0) return CUDA_ERROR_INVALID_VALUE;
    *handle = machine.graphs.create()->handle;
    return CUDA_SUCCESS;
  });
}

CUresult cuGraphDestroy(CUgraph handle) {
  std::shared_ptr<Graph> dying;
  return with_graph(__func__, handle, [&](Machine& machine, Graph& graph) {
    if (graph.is_embedded || graph.is_capturing) return CUDA_ERROR_INVALID_VALUE;
    dying = machine.graphs.destroy(&graph);
    return CUDA_SUCCESS;
  });
}

CUresult cuGraphClone(CUgraph* clone, CUgraph original) {
  return with_graph(__func__, original, [=](Machine& machine, Graph& graph) {
    if (clone == nullptr) return CUDA_ERROR_INVALID_VALUE;
    if (!graph.nodes.empty() && emulator::topological_order(graph).empty()) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    *clone = machine.graphs.clone(graph)->handle;
    return CUDA_SUCCESS;
  });
}

CUresult cuGraphNodeFindInClone(CUgraphNode* found, CUgraphNode original, CUgraph clone) {
  return with_graph(__func__, clone, [=](Machine&, Graph& graph) {
    if (found == nullptr) return CUDA_ERROR_INVALID_VALUE;
    for (const auto& node : graph.nodes) {
      if (node->original != original || original == nullptr) continue;
      *found = node->handle;
      return CUDA_SUCCESS;
    }
    return CUDA_ERROR_INVALID_VALUE;
  });
}

CUresult cuGraphDestroyNode(CUgraphNode handle) {
  std::shared_ptr<const emulator::NodeWork> dying;
  return with_node(__func__, handle, [&](Machine& machine, GraphNode& node) {
    if (node.graph->is_capturing) return CUDA_ERROR_INVALID_VALUE;
    dying = machine.graphs.destroy_node(&node);
    return CUDA_SUCCESS;
  });
}

CUresult cuGraphNodeGetType(CUgraphNode handle, CUgraphNodeType* type) {
  return with_node(__func__, handle, [=](Machine&, GraphNode& node) {
    if (type == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *type = node.type();
    return CUDA_SUCCESS;
  });
}

CUresult cuGraphGetNodes(CUgraph handle, CUgraphNode* nodes, std::size_t* count) {
  return with_graph(__func__, handle, [=](Machine&, Graph& graph) {
    std::vector<CUgraphNode> handles;
    for (const auto& node : graph.nodes) handles.push_back(node->handle);
    return emulator::hand_out(handles, nodes, count);
  });
}

CUresult cuGraphGetRootNodes(CUgraph handle, CUgraphNode* nodes, std::size_t* count) {
  return with_graph(__func__, handle, [=](Machine&, Graph& graph) {
    std::vector<CUgraphNode> handles;
    for (const auto& node : graph.nodes) {
      if (node->dependencies.empty()) handles.push_back(node->handle);
    }
    return emulator::hand_out(handles, nodes, count);
  });
}

CUresult cuGraphGetEdges(CUgraph handle, CUgraphNode* from, CUgraphNode* to, CUgraphEdgeData* edges,
                         std::size_t* count) {
  return with_graph(__func__, handle, [=](Machine&, Graph& graph) {
    if (count == nullptr || (from == nullptr) != (to == nullptr)) return CUDA_ERROR_INVALID_VALUE;
    std::vector<CUgraphNode> froms;
    std::vector<CUgraphNode> tos;
    for (const auto& node : graph.nodes) {
      for (const GraphNode* dependency : node->dependencies) {
        froms.push_back(dependency->handle);
        tos.push_back(node->handle);
      }
    }
    for (std::size_t i = 0; from != nullptr && edges != nullptr && i < *count; ++i) edges[i] = {};
    std::size_t capacity = *count;
    const CUresult result = emulator::hand_out(froms, from, &capacity);
    if (result != CUDA_SUCCESS) return result;
    return emulator::hand_out(tos, to, count);
  });
}

CUresult cuGraphNodeGetDependencies(CUgraphNode node, CUgraphNode* dependencies,
                                    CUgraphEdgeData* edges, std::size_t* count) {
  return list_neighbours(__func__, node, &GraphNode::dependencies, dependencies, edges, count);
}

CUresult cuGraphNodeGetDependentNodes(CUgraphNode node, CUgraphNode* dependents,
                                      CUgraphEdgeData* edges, std::size_t* count) {
  return list_neighbours(__func__, node, &GraphNode::dependents, dependents, edges, count);
}

CUresult cuGraphAddDependencies(CUgraph graph, const CUgraphNode* from, const CUgraphNode* to,
                                const CUgraphEdgeData* edges, std::size_t count) {
  return change_edges(__func__, graph, from, to, edges, count, &emulator::add_edge);
}

CUresult cuGraphRemoveDependencies(CUgraph graph, const CUgraphNode* from, const CUgraphNode* to,
                                   const CUgraphEdgeData* edges, std::size_t count) {
  return change_edges(__func__, graph, from, to, edges, count, &emulator::remove_edge);
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec* exec, CUgraph handle, unsigned long long flags) {
  return with_graph(__func__, handle, [=](Machine& machine, Graph& graph) {
    return instantiate(machine, exec, graph, flags);
  });
}

CUresult cuGraphInstantiateWithParams(CUgraphExec* exec, CUgraph handle,
                                      CUDA_GRAPH_INSTANTIATE_PARAMS* parameters) {
  return with_graph(__func__, handle, [=](Machine& machine, Graph& graph) {
    if (parameters == nullptr) return CUDA_ERROR_INVALID_VALUE;
    parameters->hErrNode_out = nullptr;
    const CUresult result = instantiate(machine, exec, graph, parameters->flags);
    parameters->result_out =
        result == CUDA_SUCCESS ? CUDA_GRAPH_INSTANTIATE_SUCCESS : CUDA_GRAPH_INSTANTIATE_ERROR;
    return result;
  });
}

CUresult cuGraphExecGetFlags(CUgraphExec handle, cuuint64_t* flags) {
  return with_exec(__func__, handle, [=](Machine&, GraphExec& exec) {
    if (flags == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *flags = exec.flags();
    return CUDA_SUCCESS;
  });
}

CUresult cuGraphUpload(CUgraphExec exec_handle, CUstream handle) {
  return with_work(__func__, handle, [=](Machine& machine, Lock&, const StreamRef& stream) {
    if (machine.graphs.find_exec(exec_handle) == nullptr) return CUDA_ERROR_INVALID_VALUE;
    // There is nothing to upload; a capture cannot have it either.
    return stream->capture == nullptr ? CUDA_SUCCESS : machine.captures.admit_wait(stream);
  });
}

CUresult cuGraphLaunch(CUgraphExec exec_handle, CUstream handle) {
  return with_work(__func__, handle, [=](Machine& machine, Lock& lock, const StreamRef& stream) {
    GraphExec* const exec = machine.graphs.find_exec(exec_handle);
    if (exec == nullptr) return CUDA_ERROR_INVALID_VALUE;
    if (stream->capture == nullptr) return exec->launch(machine, lock, stream);
    Graph* const child = machine.graphs.clone(*exec->graph());
    child->is_embedded = true;
    machine.captures.add(stream, "child graph",
                         emulator::ChildGraphWork{machine.graphs.share(child->handle)});
    return CUDA_SUCCESS;
  });
}

CUresult cuGraphExecDestroy(CUgraphExec handle) {
  std::shared_ptr<GraphExec> dying;
  return with_exec(__func__, handle, [&](Machine& machine, GraphExec& exec) {
    exec.close(machine);
    dying = machine.graphs.destroy_exec(handle);
    return CUDA_SUCCESS;
  });
}

CUresult cuGraphExecUpdate(CUgraphExec handle, CUgraph graph_handle,
                           CUgraphExecUpdateResultInfo* result) {
  return with_exec(__func__, handle, [=](Machine& machine, GraphExec& exec) {
    const Graph* const graph = machine.graphs.find(graph_handle);
    if (graph == nullptr || result == nullptr) return CUDA_ERROR_INVALID_VALUE;
    return exec.update(machine, *graph, result);
  });
}

CUresult cuGraphExecNodeSetParams(CUgraphExec handle, CUgraphNode node,
                                  CUgraphNodeParams* parameters) {
  std::shared_ptr<const emulator::NodeWork> old;
  return with_exec(__func__, handle, [&](Machine& machine, GraphExec& exec) {
    GraphExec::Node* const mine = exec.find(node);
    if (mine == nullptr || parameters == nullptr || mine->type != parameters->type ||
        parameters->type == CU_GRAPH_NODE_TYPE_GRAPH) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    const char* name = mine->name;
    emulator::NodeWork work;
    const CUresult result = emulator::work_of(machine, *parameters, &name, &work);
    if (result != CUDA_SUCCESS) return result;
    old = std::exchange(mine->work, std::make_shared<const emulator::NodeWork>(std::move(work)));
    return CUDA_SUCCESS;
  });
}

CUresult cuGraphNodeSetEnabled(CUgraphExec handle, CUgraphNode node, unsigned int is_enabled) {
  return with_exec(__func__, handle, [=](Machine&, GraphExec& exec) {
    GraphExec::Node* const mine = exec.find(node);
    if (mine == nullptr ||
        (mine->type != CU_GRAPH_NODE_TYPE_KERNEL && mine->type != CU_GRAPH_NODE_TYPE_MEMCPY &&
         mine->type != CU_GRAPH_NODE_TYPE_MEMSET)) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    mine->is_enabled = is_enabled != 0;
    return CUDA_SUCCESS;
  });
}

CUresult cuGraphNodeGetEnabled(CUgraphExec handle, CUgraphNode node, unsigned int* is_enabled) {
  return with_exec(__func__, handle, [=](Machine&, GraphExec& exec) {
    const GraphExec::Node* const mine = exec.find(node);
    if (mine == nullptr || is_enabled == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *is_enabled = mine->is_enabled ? 1 : 0;
    return CUDA_SUCCESS;
  });
}

CUresult cuGraphDebugDotPrint(CUgraph handle, const char* path, unsigned int flags) {
  std::string text;
  const CUresult result = with_graph(__func__, handle, [&](Machine&, Graph& graph) {
    if (path == nullptr) return CUDA_ERROR_INVALID_VALUE;
    text = "digraph dot {\n" + emulator::describe_graph(graph, flags != 0) + "}\n";
    return CUDA_SUCCESS;
  });
  if (result != CUDA_SUCCESS) return result;
  std::FILE* const file = std::fopen(path, "w");
  if (file == nullptr) return emulator::finish_call(__func__, CUDA_ERROR_OPERATING_SYSTEM);
  const bool is_written = std::fwrite(text.data(), 1, text.size(), file) == text.size();
  const bool is_closed = std::fclose(file) == 0;
  return emulator::finish_call(
      __func__, is_written && is_closed ? CUDA_SUCCESS : CUDA_ERROR_OPERATING_SYSTEM);
}

CUresult cuUserObjectCreate(CUuserObject* handle, void* pointer, CUhostFn destroy,
                            unsigned int count, unsigned int flags) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    if (handle == nullptr || destroy == nullptr || count == 0 || count > INT32_MAX ||
        flags != CU_USER_OBJECT_NO_DESTRUCTOR_SYNC) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    *handle = machine.graphs.add_user_object(pointer, destroy, count);
    return CUDA_SUCCESS;
  });
}

CUresult cuUserObjectRetain(CUuserObject handle, unsigned int count) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    auto* const owned = machine.graphs.find_user_object(handle);
    if (owned == nullptr || count == 0 || count > INT32_MAX) return CUDA_ERROR_INVALID_VALUE;
    owned->count += count;
    return CUDA_SUCCESS;
  });
}

CUresult cuUserObjectRelease(CUuserObject handle, unsigned int count) {
  emulator::UserObjectRef dying;
  return with_driver(__func__, [&](Machine& machine, Lock&) {
    auto* const owned = machine.graphs.find_user_object(handle);
    if (owned == nullptr || count == 0 || count > owned->count) return CUDA_ERROR_INVALID_VALUE;
    owned->count -= count;
    dying = machine.graphs.drop_if_unused(handle);
    return CUDA_SUCCESS;
  });
}

CUresult cuGraphRetainUserObject(CUgraph graph_handle, CUuserObject handle, unsigned int count,
                                 unsigned int flags) {
  return with_graph(__func__, graph_handle, [=](Machine& machine, Graph& graph) {
    auto* const owned = machine.graphs.find_user_object(handle);
    const bool moves = flags == CU_GRAPH_USER_OBJECT_MOVE;
    if (owned == nullptr || count == 0 || count > INT32_MAX || (flags != 0 && !moves) ||
        (moves && count > owned->count)) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    auto& held = graph.user_objects[handle];
    held.first = owned->object;
    held.second += count;
    owned->graph_count += count;
    if (moves) owned->count -= count;
    return CUDA_SUCCESS;
  });
}

CUresult cuGraphReleaseUserObject(CUgraph graph_handle, CUuserObject handle, unsigned int count) {
  emulator::UserObjectRef dying;
  return with_graph(__func__, graph_handle, [&](Machine& machine, Graph& graph) {
    auto* const owned = machine.graphs.find_user_object(handle);
    const auto held = graph.user_objects.find(handle);
    if (owned == nullptr || held == graph.user_objects.end() || count == 0 ||
        count > held->second.second) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    owned->graph_count -= count;
    held->second.second -= count;
    if (held->second.second == 0) {
      dying = std::move(held->second.first);
      graph.user_objects.erase(held);
    }
    machine.graphs.drop_if_unused(handle);
    return CUDA_SUCCESS;
  });
}

// Graphs allocate no memory of their own here.
CUresult cuDeviceGraphMemTrim(CUdevice device) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    return emulator::is_device(machine, device) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
  });
}

CUresult cuDeviceGetGraphMemAttribute(CUdevice device, CUgraphMem_attribute attribute,
                                      void* value) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    if (!emulator::is_device(machine, device)) return CUDA_ERROR_INVALID_DEVICE;
    if (value == nullptr || attribute > CU_GRAPH_MEM_ATTR_RESERVED_MEM_HIGH) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    *static_cast<cuuint64_t*>(value) = 0;
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceSetGraphMemAttribute(CUdevice device, CUgraphMem_attribute attribute,
                                      void* value) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    if (!emulator::is_device(machine, device)) return CUDA_ERROR_INVALID_DEVICE;
    const bool is_peak = attribute == CU_GRAPH_MEM_ATTR_USED_MEM_HIGH ||
                         attribute == CU_GRAPH_MEM_ATTR_RESERVED_MEM_HIGH;
    // A peak can only be reset.
    return value != nullptr && is_peak && *static_cast<const cuuint64_t*>(value) == 0
               ? CUDA_SUCCESS
               : CUDA_ERROR_INVALID_VALUE;
  });
}

}  // extern "C"
