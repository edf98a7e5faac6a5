#include "emulator/core/graph.hpp"

#include <algorithm>
#include <cstdio>
#include <queue>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "emulator/core/graph_exec.hpp"
#include "emulator/core/process.hpp"

namespace spillover::emulator {
namespace {

constexpr std::uint8_t kGraphTag = 0x55;
constexpr std::uint8_t kNodeTag = 0x56;
constexpr std::uint8_t kExecTag = 0x57;
constexpr std::uint8_t kUserObjectTag = 0x58;

const char* word_for(CUgraphNodeType type) {
  switch (type) {
    case CU_GRAPH_NODE_TYPE_KERNEL:
      return "kernel";
    case CU_GRAPH_NODE_TYPE_MEMCPY:
      return "memcpy";
    case CU_GRAPH_NODE_TYPE_MEMSET:
      return "memset";
    case CU_GRAPH_NODE_TYPE_HOST:
      return "host";
    case CU_GRAPH_NODE_TYPE_GRAPH:
      return "graph";
    case CU_GRAPH_NODE_TYPE_WAIT_EVENT:
      return "event wait";
    case CU_GRAPH_NODE_TYPE_EVENT_RECORD:
      return "event record";
    case CU_GRAPH_NODE_TYPE_BATCH_MEM_OP:
      return "memory operation";
    default:
      return "empty";
  }
}

std::string describe_work(const NodeWork& work) {
  char text[160] = "";
  if (const auto* copy = std::get_if<Copy>(&work)) {
    std::snprintf(text, sizeof text, "\\n0x%zx <- 0x%zx, %zu bytes x %zu", copy->destination,
                  copy->source, copy->width_bytes, copy->height);
  } else if (const auto* fill = std::get_if<Fill>(&work)) {
    std::snprintf(text, sizeof text, "\\n0x%zx, %zu bytes x %zu, value %u", fill->destination,
                  fill->width_bytes(), fill->height, fill->value);
  } else if (const auto* kernel = std::get_if<std::shared_ptr<const KernelBody>>(&work)) {
    std::snprintf(text, sizeof text, "\\n%zu ranges of memory", (*kernel)->accesses.size());
  }
  return text;
}

}  // namespace

UserObject::~UserObject() {
  // CUDA calls it where no driver call may be made, too.
  const CallbackScope scope;
  destroy(pointer);
}

CUgraphNodeType GraphNode::type() const {
  struct Visitor {
    CUgraphNodeType operator()(const std::monostate&) { return CU_GRAPH_NODE_TYPE_EMPTY; }
    CUgraphNodeType operator()(const Copy&) { return CU_GRAPH_NODE_TYPE_MEMCPY; }
    CUgraphNodeType operator()(const Fill&) { return CU_GRAPH_NODE_TYPE_MEMSET; }
    CUgraphNodeType operator()(const std::shared_ptr<const KernelBody>&) {
      return CU_GRAPH_NODE_TYPE_KERNEL;
    }
    CUgraphNodeType operator()(const HostFunction&) { return CU_GRAPH_NODE_TYPE_HOST; }
    CUgraphNodeType operator()(const WriteValue&) { return CU_GRAPH_NODE_TYPE_BATCH_MEM_OP; }
    CUgraphNodeType operator()(const WaitValue&) { return CU_GRAPH_NODE_TYPE_BATCH_MEM_OP; }
    CUgraphNodeType operator()(const EventRecordWork&) { return CU_GRAPH_NODE_TYPE_EVENT_RECORD; }
    CUgraphNodeType operator()(const EventWaitWork&) { return CU_GRAPH_NODE_TYPE_WAIT_EVENT; }
    CUgraphNodeType operator()(const ChildGraphWork&) { return CU_GRAPH_NODE_TYPE_GRAPH; }
  };
  return std::visit(Visitor(), *work);
}

Graphs::Graphs()
    : graphs_(kGraphTag, HandleReuse::kNever),
      nodes_(kNodeTag, HandleReuse::kNever),
      execs_(kExecTag, HandleReuse::kNever),
      user_objects_(kUserObjectTag, HandleReuse::kNever) {}

Graph* Graphs::create() {
  auto graph = std::make_shared<Graph>();
  Graph* const raw = graph.get();
  raw->id = next_id_++;
  graphs_.insert(std::move(graph), &raw->handle);
  return raw;
}

Graph* Graphs::clone(const Graph& graph) {
  Graph* const copy = create();
  std::unordered_map<const GraphNode*, GraphNode*> copies;
  for (const GraphNode* node : topological_order(graph)) {
    std::vector<GraphNode*> dependencies;
    for (const GraphNode* dependency : node->dependencies) {
      dependencies.push_back(copies.at(dependency));
    }
    NodeWork work;
    const auto* child = std::get_if<ChildGraphWork>(node->work.get());
    if (child != nullptr) {
      Graph* const inner = clone(*child->graph);
      inner->is_embedded = true;
      work = ChildGraphWork{share(inner->handle)};
    }
    GraphNode* const made = add_node(copy, node->name, std::move(work), dependencies);
    if (child == nullptr) made->work = node->work;
    made->original = node->handle;
    copies.emplace(node, made);
  }
  copy->user_objects = graph.user_objects;
  for (auto& [handle, held] : copy->user_objects) {
    if (OwnedObject* owned = find_user_object(handle)) owned->graph_count += held.second;
  }
  return copy;
}

Graph* Graphs::find(CUgraph handle) {
  std::shared_ptr<Graph>* found = graphs_.find(handle);
  return found == nullptr ? nullptr : found->get();
}

std::shared_ptr<Graph> Graphs::share(CUgraph handle) {
  std::shared_ptr<Graph>* found = graphs_.find(handle);
  return found == nullptr ? nullptr : *found;
}

void Graphs::end_handles(Graph* graph) {
  for (const auto& node : graph->nodes) {
    nodes_.erase(node->handle);
    const auto* child = std::get_if<ChildGraphWork>(node->work.get());
    if (child == nullptr || !child->graph->is_embedded) continue;
    // Another clone's node may embed the same graph's copy, never the same graph.
    if (graphs_.find(child->graph->handle) == nullptr) continue;
    end_handles(child->graph.get());
    graphs_.erase(child->graph->handle);
  }
  for (auto& [handle, held] : graph->user_objects) {
    OwnedObject* owned = find_user_object(handle);
    if (owned == nullptr) continue;
    owned->graph_count -= held.second;
    drop_if_unused(handle);  // the graph still holds the object itself
  }
}

std::shared_ptr<Graph> Graphs::destroy(Graph* graph) {
  end_handles(graph);
  return graphs_.erase(graph->handle);
}

GraphNode* Graphs::find_node(CUgraphNode handle) {
  GraphNode** found = nodes_.find(handle);
  return found == nullptr ? nullptr : *found;
}

GraphNode* Graphs::add_node(Graph* graph, const char* name, NodeWork work,
                            const std::vector<GraphNode*>& dependencies) {
  auto node = std::make_unique<GraphNode>();
  GraphNode* const raw = node.get();
  raw->graph = graph;
  raw->id = graph->next_node_id++;
  raw->name = name;
  raw->work = std::make_shared<const NodeWork>(std::move(work));
  nodes_.insert(raw, &raw->handle);
  graph->nodes.push_back(std::move(node));
  for (GraphNode* dependency : dependencies) add_edge(dependency, raw);
  return raw;
}

std::shared_ptr<const NodeWork> Graphs::destroy_node(GraphNode* node) {
  for (GraphNode* from : std::vector<GraphNode*>(node->dependencies)) remove_edge(from, node);
  for (GraphNode* to : std::vector<GraphNode*>(node->dependents)) remove_edge(node, to);
  nodes_.erase(node->handle);
  std::shared_ptr<const NodeWork> work = node->work;
  if (const auto* child = std::get_if<ChildGraphWork>(work.get())) {
    end_handles(child->graph.get());
    graphs_.erase(child->graph->handle);
  }
  std::erase_if(node->graph->nodes, [&](const auto& other) { return other.get() == node; });
  return work;
}

CUgraphExec Graphs::add_exec(std::shared_ptr<GraphExec> exec) {
  CUgraphExec handle = nullptr;
  execs_.insert(std::move(exec), &handle);
  return handle;
}

GraphExec* Graphs::find_exec(CUgraphExec handle) {
  std::shared_ptr<GraphExec>* found = execs_.find(handle);
  return found == nullptr ? nullptr : found->get();
}

std::shared_ptr<GraphExec> Graphs::destroy_exec(CUgraphExec handle) {
  return execs_.erase(handle);
}

CUuserObject Graphs::add_user_object(void* pointer, CUhostFn destroy, unsigned count) {
  CUuserObject handle = nullptr;
  user_objects_.insert(OwnedObject{std::make_shared<UserObject>(pointer, destroy), count, 0},
                       &handle);
  return handle;
}

Graphs::OwnedObject* Graphs::find_user_object(CUuserObject handle) {
  return user_objects_.find(handle);
}

UserObjectRef Graphs::drop_if_unused(CUuserObject handle) {
  OwnedObject* owned = user_objects_.find(handle);
  if (owned == nullptr || owned->count > 0 || owned->graph_count > 0) return nullptr;
  return user_objects_.erase(handle).object;
}

bool add_edge(GraphNode* from, GraphNode* to) {
  auto& dependencies = to->dependencies;
  if (std::find(dependencies.begin(), dependencies.end(), from) != dependencies.end()) return false;
  dependencies.push_back(from);
  from->dependents.push_back(to);
  return true;
}

bool remove_edge(GraphNode* from, GraphNode* to) {
  std::erase(from->dependents, to);
  return std::erase(to->dependencies, from) != 0;
}

std::vector<GraphNode*> topological_order(const Graph& graph) {
  const auto later = [](const GraphNode* a, const GraphNode* b) { return a->id > b->id; };
  std::priority_queue<GraphNode*, std::vector<GraphNode*>, decltype(later)> ready(later);
  std::unordered_map<const GraphNode*, std::size_t> missing;
  for (const auto& node : graph.nodes) {
    missing[node.get()] = node->dependencies.size();
    if (node->dependencies.empty()) ready.push(node.get());
  }
  std::vector<GraphNode*> order;
  while (!ready.empty()) {
    GraphNode* const node = ready.top();
    ready.pop();
    order.push_back(node);
    for (GraphNode* next : node->dependents) {
      if (--missing[next] == 0) ready.push(next);
    }
  }
  if (order.size() != graph.nodes.size()) order.clear();
  return order;
}

std::vector<const GraphNode*> ancestors_of(const std::vector<GraphNode*>& nodes) {
  std::vector<const GraphNode*> found(nodes.begin(), nodes.end());
  std::unordered_set<const GraphNode*> seen(nodes.begin(), nodes.end());
  for (std::size_t i = 0; i < found.size(); ++i) {
    for (const GraphNode* dependency : found[i]->dependencies) {
      if (seen.insert(dependency).second) found.push_back(dependency);
    }
  }
  return found;
}

std::string describe_graph(const Graph& graph, bool with_details) {
  const std::string prefix = "graph_" + std::to_string(graph.id) + "_node_";
  std::string text = "subgraph cluster_" + std::to_string(graph.id) + " {\nlabel=\"graph_" +
                     std::to_string(graph.id) + "\";\n";
  std::string children;
  for (const auto& node : graph.nodes) {
    const std::string name = prefix + std::to_string(node->id);
    text += "\"" + name + "\" [shape=box label=\"" + std::to_string(node->id) + "\\n" +
            word_for(node->type());
    if (*node->name != '\0') text += std::string("\\n") + node->name;
    if (with_details) text += describe_work(*node->work);
    text += "\"];\n";
    for (const GraphNode* dependency : node->dependencies) {
      text += "\"" + prefix + std::to_string(dependency->id) + "\" -> \"" + name + "\";\n";
    }
    if (const auto* child = std::get_if<ChildGraphWork>(node->work.get())) {
      children += describe_graph(*child->graph, with_details);
    }
  }
  return text + "}\n" + children;
}

}  // namespace spillover::emulator
