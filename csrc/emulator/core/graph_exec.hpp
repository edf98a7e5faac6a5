// Executable graphs, and how one is launched.
//
// Note [Lanes]: a launch puts the graph's nodes on streams as ordinary operations, in one go with
// the mutex held. Nodes that follow one another go on one stream, a lane; the first lane is the
// stream of the launch, and branches that nothing orders get lanes of their own, which wait for the
// stream first and which it waits for at the end. So the schedules, events, queries and the checker
// treat a graph's branches as they treat streams: two nodes that conflict and that no path orders
// are a hazard. A lane is continued only by a node that its last one is an ancestor of, so it adds
// no order that the graph does not have.
//
// Owned by Graphs; called with Machine::mutex held. launch never lets go of it before all nodes are
// queued.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <memory>
#include <vector>

#include "emulator/core/graph.hpp"
#include "emulator/core/stream.hpp"
#include "emulator/core/types.hpp"
#include "emulator/core/vector_clock.hpp"

namespace spillover::emulator {

class GraphExec {
 public:
  // nullptr where the graph has a circle.
  static std::shared_ptr<GraphExec> instantiate(Machine& machine, const Graph& graph,
                                                cuuint64_t flags);

  CUresult launch(Machine& machine, Lock& lock, const StreamRef& stream);

  // Takes over what the nodes of a graph of the same topology do. Otherwise says why not.
  CUresult update(Machine& machine, const Graph& graph, CUgraphExecUpdateResultInfo* result);

  // The executable's node that stands for a node of the graph that it was made of, or nullptr.
  struct Node {
    CUgraphNode source = nullptr;
    CUgraphNodeType type = CU_GRAPH_NODE_TYPE_EMPTY;
    const char* name = "";   // with the node's number
    const char* title = "";  // of its work alone, for the clock
    std::shared_ptr<const NodeWork> work;
    std::vector<std::size_t> dependencies;  // indices of earlier nodes
    std::size_t lane = 0;
    bool waited_for = false;  // by a node on another lane
    bool is_enabled = true;
  };
  Node* find(CUgraphNode source);

  // Its lanes end with their work.
  void close(Machine& machine);

  cuuint64_t flags() const { return flags_; }
  // What a launch into a stream that is being captured adds.
  const std::shared_ptr<Graph>& graph() const { return graph_; }

 private:
  struct Done {
    StreamRef stream;
    Ticket ticket = 0;
    VectorClock clock;
  };

  void add_nodes(Machine& machine, const Graph& graph, const std::vector<std::size_t>& before,
                 std::vector<std::size_t>* leaves);
  void assign_lanes();
  CUresult check_memory(Machine& machine, const Stream& stream) const;
  bool enqueue(Machine& machine, const Node& node, const StreamRef& lane, bool is_first) const;
  void open_lanes(Machine& machine, const Stream& stream);

  std::vector<Node> nodes_;  // each after its dependencies
  std::size_t lane_count_ = 1;
  std::vector<StreamRef> lanes_;  // all but the first
  int lanes_device_ = -1;
  cuuint64_t flags_ = 0;
  std::shared_ptr<Graph> graph_;  // a clone that nobody has a handle of
  Done last_;                     // the end of the last launch
};

}  // namespace spillover::emulator
