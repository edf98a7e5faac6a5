// Graphs: nodes of work and the order between them, and the user objects that a graph keeps alive.
// What a node does never changes once it is made, so that a graph's clones and executables share it
// (graph_exec.hpp); setting a node's parameters gives it other work.
//
// Owned by Graphs, which the Machine owns; called with Machine::mutex held. What a graph held when
// it was destroyed (user objects, the arguments of kernels) runs code of the program's at its end,
// so whoever takes a graph or an executable out of its table lets it die after the mutex was let
// go.
//
// Invariants: a node's dependencies are nodes of its own graph; `dependents` is the other direction
// of `dependencies`.
#pragma once

#include <cuda.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "emulator/core/access_map.hpp"
#include "emulator/core/handle_table.hpp"
#include "emulator/core/operation.hpp"
#include "emulator/core/types.hpp"

namespace spillover::emulator {

class GraphExec;
class Machine;
struct Capture;
struct Graph;

struct EventRecordWork {
  CUevent event = nullptr;
};
struct EventWaitWork {
  CUevent event = nullptr;
};
struct ChildGraphWork {
  std::shared_ptr<Graph> graph;
};

// std::monostate: an empty node, which only orders others.
using NodeWork =
    std::variant<std::monostate, Copy, Fill, std::shared_ptr<const KernelBody>, HostFunction,
                 WriteValue, WaitValue, EventRecordWork, EventWaitWork, ChildGraphWork>;

struct GraphNode {
  CUgraphNode handle = nullptr;
  Graph* graph = nullptr;
  std::uint64_t id = 0;  // counts the nodes of a graph
  const char* name = "";
  std::shared_ptr<const NodeWork> work;
  std::vector<GraphNode*> dependencies;
  std::vector<GraphNode*> dependents;
  CUgraphNode original = nullptr;  // of a clone

  CUgraphNodeType type() const;
};

// Shared by handles of the program and by graphs; `destroy` runs when nobody refers to it.
struct UserObject {
  UserObject(void* user_pointer, CUhostFn user_destroy)
      : pointer(user_pointer), destroy(user_destroy) {}
  UserObject(const UserObject&) = delete;
  UserObject& operator=(const UserObject&) = delete;
  ~UserObject();

  void* const pointer;
  const CUhostFn destroy;
};
using UserObjectRef = std::shared_ptr<UserObject>;

struct Graph {
  CUgraph handle = nullptr;
  std::uint64_t id = 0;
  std::uint64_t next_node_id = 0;
  bool is_embedded = false;                       // the graph of a child node, which that node owns
  bool is_capturing = false;                      // a capture adds to it
  std::vector<std::unique_ptr<GraphNode>> nodes;  // in the order of their making
  // How often the graph holds each object, as CUDA counts it.
  std::map<CUuserObject, std::pair<UserObjectRef, unsigned>> user_objects;
};

class Graphs {
 public:
  Graphs();

  Graph* create();
  // A copy with nodes of its own.
  Graph* clone(const Graph& graph);
  // nullptr for a handle that is not live.
  Graph* find(CUgraph handle);
  std::shared_ptr<Graph> share(CUgraph handle);
  // Ends the handles of the graph, its nodes and its child graphs.
  std::shared_ptr<Graph> destroy(Graph* graph);

  GraphNode* find_node(CUgraphNode handle);
  GraphNode* add_node(Graph* graph, const char* name, NodeWork work,
                      const std::vector<GraphNode*>& dependencies);
  // Takes the node out of its graph; what it held dies with the result.
  std::shared_ptr<const NodeWork> destroy_node(GraphNode* node);

  CUgraphExec add_exec(std::shared_ptr<GraphExec> exec);
  GraphExec* find_exec(CUgraphExec handle);
  std::shared_ptr<GraphExec> destroy_exec(CUgraphExec handle);

  CUuserObject add_user_object(void* pointer, CUhostFn destroy, unsigned count);
  // The caller's references: nullptr, or the object and their number.
  struct OwnedObject {
    UserObjectRef object;
    unsigned count = 0;        // the program's own references
    unsigned graph_count = 0;  // those of all graphs that still have their handle
  };
  OwnedObject* find_user_object(CUuserObject handle);
  // Forgets the handle once neither the program nor a graph counts on it. The object dies with the
  // last of the references that are returned here or kept elsewhere.
  UserObjectRef drop_if_unused(CUuserObject handle);

 private:
  void end_handles(Graph* graph);

  HandleTable<std::shared_ptr<Graph>> graphs_;
  HandleTable<GraphNode*> nodes_;
  HandleTable<std::shared_ptr<GraphExec>> execs_;
  HandleTable<OwnedObject> user_objects_;
  std::uint64_t next_id_ = 1;
};

bool add_edge(GraphNode* from, GraphNode* to);     // false where it is there already
bool remove_edge(GraphNode* from, GraphNode* to);  // false where there is none

// The nodes, each after those that it depends on; empty where they form a circle.
std::vector<GraphNode*> topological_order(const Graph& graph);

// All that the nodes depend on, directly or not, and they themselves.
std::vector<const GraphNode*> ancestors_of(const std::vector<GraphNode*>& nodes);

// Graphviz text of the graph.
std::string describe_graph(const Graph& graph, bool with_details);

}  // namespace spillover::emulator
