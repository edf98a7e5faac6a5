#include "emulator/core/graph_exec.hpp"

#include <algorithm>
#include <chrono>
#include <string>
#include <unordered_map>
#include <utility>

#include "emulator/core/machine.hpp"
#include "emulator/core/transfers.hpp"

namespace spillover::emulator {
namespace {

// Calls visit(address, size_bytes, kind) for what a node touches, as far as it says so.
template <typename Visit>
void for_each_access(const NodeWork& work, Visit&& visit) {
  if (const auto* copy = std::get_if<Copy>(&work)) {
    visit(copy->source, copy->source_bytes(), AccessKind::kRead);
    visit(copy->destination, copy->destination_bytes(), AccessKind::kWrite);
  } else if (const auto* fill = std::get_if<Fill>(&work)) {
    visit(fill->destination, fill->destination_bytes(), AccessKind::kWrite);
  } else if (const auto* kernel = std::get_if<std::shared_ptr<const KernelBody>>(&work)) {
    for (const KernelAccess& access : (*kernel)->accesses) {
      visit(access.address, access.size_bytes,
            access.is_write ? AccessKind::kWrite : AccessKind::kRead);
    }
  } else if (const auto* write = std::get_if<WriteValue>(&work)) {
    visit(write->address, write->size_bytes, AccessKind::kWrite);
  } else if (const auto* wait = std::get_if<WaitValue>(&work)) {
    visit(wait->address, wait->size_bytes, AccessKind::kRead);
  }
}

Copy copy_of(const Copy& copy) {
  return {copy.destination, copy.destination_pitch,
          copy.source,      copy.source_pitch,
          copy.width_bytes, copy.height,
          nullptr};
}

bool record_accesses(Machine& machine, const Stream& stream, Ticket ticket, const char* name,
                     const NodeWork& work) {
  if (!machine.hazards.enabled()) return false;
  if (const auto* copy = std::get_if<Copy>(&work)) {
    return record_copy(machine, stream, ticket, name, *copy);
  }
  if (const auto* fill = std::get_if<Fill>(&work)) {
    return record_fill(machine, stream, ticket, name, *fill);
  }
  bool found = false;
  Access access = machine.access_of(stream, ticket, name);
  access.in_graph = true;
  for_each_access(work, [&](Address address, std::size_t size_bytes, AccessKind kind) {
    if (size_bytes == 0 || !machine.is_device_accessible(address, size_bytes)) return;
    found =
        machine.record(access, stream.clock, kind, address, size_bytes, Recording::kYes) || found;
  });
  return found;
}

// What keeps the user objects of a graph until a launch is done.
KernelBody keeping(std::shared_ptr<Graph> graph) {
  KernelBody body;
  body.run = [](void*, char*, std::size_t) { return 0; };
  body.argument = new std::shared_ptr<Graph>(std::move(graph));
  body.release = [](void* argument) { delete static_cast<std::shared_ptr<Graph>*>(argument); };
  return body;
}

}  // namespace

std::shared_ptr<GraphExec> GraphExec::instantiate(Machine& machine, const Graph& graph,
                                                  cuuint64_t flags) {
  if (!graph.nodes.empty() && topological_order(graph).empty()) return nullptr;
  auto exec = std::make_shared<GraphExec>();
  exec->flags_ = flags;
  exec->graph_ = machine.graphs.share(machine.graphs.clone(graph)->handle);
  std::vector<std::size_t> leaves;
  exec->add_nodes(machine, *exec->graph_, {}, &leaves);
  exec->assign_lanes();
  return exec;
}

void GraphExec::add_nodes(Machine& machine, const Graph& graph,
                          const std::vector<std::size_t>& before,
                          std::vector<std::size_t>* leaves) {
  std::unordered_map<const GraphNode*, std::size_t> places;
  for (const GraphNode* node : topological_order(graph)) {
    Node made;
    made.source = node->original;
    made.type = node->type();
    made.work = node->work;
    made.title = node->name;
    made.name =
        machine.hazards.intern((std::string(*node->name == '\0' ? "empty node" : node->name) +
                                " in a graph (node " + std::to_string(node->id) + ")")
                                   .c_str());
    if (node->dependencies.empty()) made.dependencies = before;
    for (const GraphNode* dependency : node->dependencies) {
      made.dependencies.push_back(places.at(dependency));
    }
    std::size_t place = nodes_.size();
    if (const auto* child = std::get_if<ChildGraphWork>(node->work.get())) {
      // The child's nodes stand between an empty node before and one after them.
      made.work = std::make_shared<const NodeWork>();
      nodes_.push_back(made);
      Node after = made;
      after.source = nullptr;
      after.dependencies.clear();
      add_nodes(machine, *child->graph, {place}, &after.dependencies);
      if (after.dependencies.empty()) after.dependencies.push_back(place);
      place = nodes_.size();
      nodes_.push_back(std::move(after));
    } else {
      nodes_.push_back(std::move(made));
    }
    places.emplace(node, place);
    if (node->dependents.empty()) leaves->push_back(place);
  }
}

void GraphExec::assign_lanes() {
  constexpr std::size_t kNone = ~std::size_t{0};
  std::vector<std::size_t> tails;  // by lane: its last node
  std::vector<std::vector<std::size_t>> known(
      nodes_.size());  // by node and lane: last ancestor + 1
  for (std::size_t index = 0; index < nodes_.size(); ++index) {
    Node& node = nodes_[index];
    std::vector<std::size_t>& seen = known[index];
    for (const std::size_t dependency : node.dependencies) {
      const std::vector<std::size_t>& theirs = known[dependency];
      if (seen.size() < theirs.size()) seen.resize(theirs.size(), 0);
      for (std::size_t lane = 0; lane < theirs.size(); ++lane) {
        seen[lane] = std::max(seen[lane], theirs[lane]);
      }
    }
    const auto continues = [&](std::size_t lane) {
      return lane < seen.size() && seen[lane] == tails[lane] + 1;
    };
    std::size_t chosen = kNone;
    for (const std::size_t dependency : node.dependencies) {
      if (chosen == kNone && continues(nodes_[dependency].lane)) chosen = nodes_[dependency].lane;
    }
    for (std::size_t lane = 0; chosen == kNone && lane < tails.size(); ++lane) {
      if (continues(lane)) chosen = lane;
    }
    if (chosen == kNone) {
      chosen = tails.size();
      tails.push_back(index);
    }
    tails[chosen] = index;
    node.lane = chosen;
    if (seen.size() <= chosen) seen.resize(chosen + 1, 0);
    seen[chosen] = index + 1;
    for (const std::size_t dependency : node.dependencies) {
      if (nodes_[dependency].lane != chosen) nodes_[dependency].waited_for = true;
    }
  }
  lane_count_ = std::max<std::size_t>(tails.size(), 1);
}

// A launch whose memory is gone has no effect.
CUresult GraphExec::check_memory(Machine& machine, const Stream& stream) const {
  for (const Node& node : nodes_) {
    if (!node.is_enabled) continue;
    CUresult result = CUDA_SUCCESS;
    for_each_access(*node.work, [&](Address address, std::size_t size_bytes, AccessKind kind) {
      if (result != CUDA_SUCCESS || size_bytes == 0) return;
      if (machine.hazards.enabled()) {
        if (!machine.check_usable(stream, node.name, kind, address, size_bytes)) {
          result = CUDA_ERROR_ILLEGAL_ADDRESS;
        }
      } else if (!machine.is_live(address, size_bytes, kind == AccessKind::kWrite)) {
        report(
            "illegal address: %s of %zu bytes at 0x%zx by %s: the memory was freed or unmapped "
            "since the graph was made",
            kind == AccessKind::kWrite ? "write" : "read", size_bytes, address, node.name);
        result = CUDA_ERROR_ILLEGAL_ADDRESS;
      }
    });
    if (result != CUDA_SUCCESS) return result;
    if (const auto* event = std::get_if<EventRecordWork>(node.work.get())) {
      if (machine.events.find(event->event) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    } else if (const auto* wait = std::get_if<EventWaitWork>(node.work.get())) {
      if (machine.events.find(wait->event) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    }
  }
  return CUDA_SUCCESS;
}

void GraphExec::open_lanes(Machine& machine, const Stream& stream) {
  if (lanes_device_ != stream.device) {
    for (const StreamRef& lane : lanes_) machine.streams.close(lane);
    lanes_.clear();
    lanes_device_ = stream.device;
  }
  while (lanes_.size() + 1 < lane_count_) {
    lanes_.push_back(machine.streams.create_lane(stream.context));
  }
}

// True when there was a hazard.
bool GraphExec::enqueue(Machine& machine, const Node& node, const StreamRef& lane,
                        bool is_first) const {
  if (!node.is_enabled) return false;
  Operation operation;
  operation.name = node.name;
  const NodeWork& work = *node.work;
  if (const auto* copy = std::get_if<Copy>(&work)) {
    operation.body = copy_of(*copy);
    if (machine.clock.enabled()) operation.cost = cost_of(machine, *copy);
  } else if (const auto* fill = std::get_if<Fill>(&work)) {
    operation.body = *fill;
    if (machine.clock.enabled()) operation.cost = cost_of(machine, *fill);
  } else if (const auto* kernel = std::get_if<std::shared_ptr<const KernelBody>>(&work)) {
    operation.body = SharedKernel{*kernel};
    operation.cost = (*kernel)->cost;
  } else if (const auto* function = std::get_if<HostFunction>(&work)) {
    operation.body = HostFunction{function->body, function->argument};
  } else if (const auto* write = std::get_if<WriteValue>(&work)) {
    operation.body = *write;
  } else if (const auto* wait = std::get_if<WaitValue>(&work)) {
    operation.body = *wait;
  } else if (const auto* record = std::get_if<EventRecordWork>(&work)) {
    machine.events.mark(machine.events.find(record->event), lane);
    return false;
  } else if (const auto* external = std::get_if<EventWaitWork>(&work)) {
    machine.events.make_wait(lane, *machine.events.find(external->event));
    return false;
  } else {
    return false;  // an empty node orders, and does nothing
  }
  if (const auto* wait = std::get_if<WaitValue>(&work)) {
    machine.streams.acquire_value(lane.get(), wait->address);
  }
  const Ticket ticket = machine.streams.prepare(lane);
  if (const auto* write = std::get_if<WriteValue>(&work)) {
    machine.streams.release_value(*lane, write->address);
  }
  if (operation.cost.name == nullptr) operation.cost.name = node.title;
  operation.cost.shares_launch = !is_first;
  const bool found = record_accesses(machine, *lane, ticket, node.name, work);
  machine.streams.append(lane, std::move(operation));
  return found;
}

CUresult GraphExec::launch(Machine& machine, Lock& lock, const StreamRef& stream) {
  const CUresult usable = check_memory(machine, *stream);
  if (usable != CUDA_SUCCESS) return usable;
  open_lanes(machine, *stream);
  Streams& streams = machine.streams;
  streams.order_with_default(stream);
  // CUDA orders a launch after the earlier ones of the same executable.
  if (last_.stream != nullptr) streams.wait_for(stream, last_.stream, last_.ticket, last_.clock);
  const bool tracks = machine.hazards.enabled();
  const Done start{stream, stream->enqueued, tracks ? stream->clock : VectorClock()};
  std::vector<Done> done(nodes_.size());
  std::vector<bool> is_open(lane_count_, false);
  is_open[0] = true;
  bool found = false;
  for (std::size_t index = 0; index < nodes_.size(); ++index) {
    const Node& node = nodes_[index];
    const StreamRef& lane = node.lane == 0 ? stream : lanes_[node.lane - 1];
    if (!is_open[node.lane]) {
      streams.wait_for(lane, start.stream, start.ticket, start.clock);
      is_open[node.lane] = true;
    }
    for (const std::size_t dependency : node.dependencies) {
      if (nodes_[dependency].lane == node.lane) continue;
      const Done& before = done[dependency];
      streams.wait_for(lane, before.stream, before.ticket, before.clock);
    }
    found = enqueue(machine, node, lane, index == 0) || found;
    if (node.waited_for) done[index] = {lane, lane->enqueued, tracks ? lane->clock : VectorClock()};
  }
  for (const StreamRef& lane : lanes_) {
    streams.wait_for(stream, lane, lane->enqueued, lane->clock);
  }
  if (!graph_->user_objects.empty()) {
    Operation end;
    end.name = "graph end";
    end.body = SharedKernel{std::make_shared<const KernelBody>(keeping(graph_))};
    end.cost.shares_launch = true;
    streams.prepare(stream);
    streams.append(stream, std::move(end));
  }
  last_ = {stream, stream->enqueued, tracks ? stream->clock : VectorClock()};
  machine.scheduler.settle(lock, stream, nodes_.size());
  if (machine.clock.enabled()) machine.clock.throttle(lock, stream);
  const CUresult hazard = machine.hazard_status(found);
  return hazard != CUDA_SUCCESS ? hazard : machine.sticky_error(stream->device);
}

CUresult GraphExec::update(Machine& machine, const Graph& graph,
                           CUgraphExecUpdateResultInfo* result) {
  const std::shared_ptr<GraphExec> other = instantiate(machine, graph, flags_);
  const auto fail = [&](CUgraphExecUpdateResult reason, CUgraphNode node) {
    *result = {reason, node, nullptr};
    if (other != nullptr) other->close(machine);
    return CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE;
  };
  if (other == nullptr) return fail(CU_GRAPH_EXEC_UPDATE_ERROR, nullptr);
  if (other->nodes_.size() != nodes_.size()) {
    return fail(CU_GRAPH_EXEC_UPDATE_ERROR_TOPOLOGY_CHANGED, nullptr);
  }
  for (std::size_t i = 0; i < nodes_.size(); ++i) {
    const Node& mine = nodes_[i];
    const Node& theirs = other->nodes_[i];
    if (mine.type != theirs.type) {
      return fail(CU_GRAPH_EXEC_UPDATE_ERROR_NODE_TYPE_CHANGED, theirs.source);
    }
    if (mine.dependencies != theirs.dependencies) {
      return fail(CU_GRAPH_EXEC_UPDATE_ERROR_TOPOLOGY_CHANGED, theirs.source);
    }
  }
  for (std::size_t i = 0; i < nodes_.size(); ++i) {
    nodes_[i].name = other->nodes_[i].name;
    nodes_[i].title = other->nodes_[i].title;
    nodes_[i].work = other->nodes_[i].work;
  }
  // The launches so far keep the old user objects, later ones the new.
  std::swap(graph_, other->graph_);
  other->close(machine);
  *result = {CU_GRAPH_EXEC_UPDATE_SUCCESS, nullptr, nullptr};
  return CUDA_SUCCESS;
}

GraphExec::Node* GraphExec::find(CUgraphNode source) {
  for (Node& node : nodes_) {
    if (source != nullptr && node.source == source) return &node;
  }
  return nullptr;
}

void GraphExec::close(Machine& machine) {
  for (const StreamRef& lane : lanes_) machine.streams.close(lane);
  lanes_.clear();
  if (machine.graphs.find(graph_->handle) != nullptr) machine.graphs.destroy(graph_.get());
}

}  // namespace spillover::emulator
