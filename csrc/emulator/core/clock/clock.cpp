#include "emulator/core/clock/clock.hpp"

#include <algorithm>
#include <chrono>
#include <utility>

#include "emulator/core/clock/detached.hpp"
#include "emulator/core/machine.hpp"
#include "emulator/core/process.hpp"

namespace spillover::emulator {
namespace {

// How long a query looks out for a host function whose time has come to end really, and how long
// for one of our own threads, which nothing holds up.
constexpr auto kBriefWait = std::chrono::milliseconds(50);
constexpr auto kWorkWait = std::chrono::seconds(60);

// Smaller loops stay in a processor's cache and take less than the Python around them.
constexpr std::uint64_t kHostOperatorBytesMin = std::uint64_t{1} << 20;

// What a host function that this thread runs adds to its duration, and the work that this thread
// does for another; 0 for none.
thread_local Nanoseconds callback_duration = 0;
thread_local std::uint64_t current_work = 0;

TimelineLimits limits_of(const ClockProfile& profile) {
  TimelineLimits limits;
  limits.device_rate = static_cast<std::int64_t>(profile.at("gpu.memory_bandwidth_gb_s") *
                                                 profile.at("gpu.memory_efficiency") * 1000);
  limits.link_rate = profile.rate("gpu.pcie_duplex_gb_s");
  limits.host_rate = profile.rate("host.memory_bandwidth_gb_s");
  limits.kernel_gap = profile.microseconds("gpu.kernel_gap_us");
  return limits;
}

struct CallCost {
  const char* key;
  std::initializer_list<const char*> functions;
};

// Which calls take the host more time than can be left out.
const CallCost kCallCosts[] = {
    {"host.launch_us", {"cuLaunchKernel",       "cuLaunchKernelEx",
                        "cuLaunchHostFunc",     "cuStreamAddCallback",
                        "cuMemcpyAsync",        "cuMemcpyHtoDAsync_v2",
                        "cuMemcpyDtoHAsync_v2", "cuMemcpyDtoDAsync_v2",
                        "cuMemcpyHtoDAsync",    "cuMemcpyDtoHAsync",
                        "cuMemcpyDtoDAsync",    "cuMemcpyPeerAsync",
                        "cuMemcpy2DAsync",      "cuMemcpy",
                        "cuMemcpyHtoD",         "cuMemcpyDtoH",
                        "cuMemcpyDtoD",         "cuMemcpyHtoD_v2",
                        "cuMemcpyDtoH_v2",      "cuMemcpyDtoD_v2",
                        "cuMemcpy2D",           "cuMemcpy2DUnaligned",
                        "cuMemcpyPeer",         "cuMemsetD8",
                        "cuMemsetD16",          "cuMemsetD32",
                        "cuMemsetD8Async",      "cuMemsetD16Async",
                        "cuMemsetD32Async",     "cuMemsetD2D8",
                        "cuMemsetD2D16",        "cuMemsetD2D32",
                        "cuMemsetD2D8Async",    "cuMemsetD2D16Async",
                        "cuMemsetD2D32Async",   "cuMemsetD8_v2",
                        "cuMemsetD16_v2",       "cuMemsetD32_v2",
                        "cuMemcpyBatchAsync",   "cuMemcpyBatchAsync_v2"}},
    {"host.graph_launch_us", {"cuGraphLaunch"}},
    {"host.stream_call_us",
     {"cuStreamWaitEvent", "cuStreamWriteValue32", "cuStreamWriteValue64", "cuStreamWaitValue32",
      "cuStreamWaitValue64", "cuMemFreeAsync", "cuMemAllocAsync", "cuMemAllocFromPoolAsync"}},
    {"host.wait_us", {"cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize"}},
    {"host.allocation_us", {"cuMemAlloc", "cuMemAlloc_v2", "cuMemAllocManaged", "cuMemCreate"}},
    {"host.free_us", {"cuMemFree", "cuMemFree_v2", "cuMemRelease", "cuMemFreeHost"}},
    {"host.mapping_us",
     {"cuMemMap", "cuMemUnmap", "cuMemSetAccess", "cuMemAddressReserve", "cuMemAddressFree"}},
};

bool submits_or_waits(std::string_view function) {
  if (function.ends_with("Synchronize")) return true;
  for (const std::string_view start : {"cuLaunch", "cuGraphLaunch", "cuMemcpy", "cuMemset"}) {
    if (function.starts_with(start)) return true;
  }
  return false;
}

bool resource_of(const char* name, Resource* resource) {
  for (const Resource known : {Resource::kOptimizer, Resource::kDiskRead, Resource::kDiskWrite}) {
    if (std::string_view(name) != resource_name(known)) continue;
    *resource = known;
    return true;
  }
  return false;
}

}  // namespace

Clock::Clock(Machine* machine, const Config& config)
    : machine_(machine),
      enabled_(config.clock),
      profile_(config.profile),
      profile_name_(config.profile_name),
      turns_(HostTurns::instance()),
      timeline_(limits_of(profile_), [this](const Span& span) { recorder_.add(span); }),
      queue_depth_(static_cast<std::size_t>(profile_.at("host.launch_queue_depth"))),
      launch_latency_(profile_.microseconds("gpu.launch_latency_us")),
      memory_bytes_(static_cast<std::size_t>(config.device_count)) {
  if (enabled_) turns_.start();
  for (const CallCost& cost : kCallCosts) {
    for (const char* function : cost.functions) {
      call_costs_.emplace(function, profile_.microseconds(cost.key));
    }
  }
}

OperationCost Clock::copy_cost(Route route, bool is_pageable, std::uint64_t bytes) const {
  OperationCost cost;
  const Nanoseconds latency = profile_.microseconds("gpu.copy_latency_us");
  switch (route) {
    case Route::kDeviceToDevice:
      cost = bytes_bound_cost(2 * bytes);
      break;
    case Route::kToDevice:
      cost.resource = Resource::kCopyIn;
      cost.duration = latency + profile_.transfer(bytes, is_pageable ? "gpu.pageable_to_device_gb_s"
                                                                     : "gpu.pcie_to_device_gb_s");
      cost.device_bytes = cost.link_bytes = cost.host_bytes = bytes;
      break;
    case Route::kToHost:
      cost.resource = Resource::kCopyOut;
      cost.duration = latency + profile_.transfer(bytes, is_pageable ? "gpu.pageable_to_host_gb_s"
                                                                     : "gpu.pcie_to_host_gb_s");
      cost.device_bytes = cost.link_bytes = cost.host_bytes = bytes;
      break;
    case Route::kPeer:
      cost.resource = Resource::kPeerLink;
      cost.duration = latency + profile_.transfer(bytes, "gpu.peer_gb_s");
      cost.device_bytes = bytes;
      break;
    case Route::kHostToHost:
      cost.resource = Resource::kHostFunction;
      cost.duration = profile_.transfer(2 * bytes, "host.memory_bandwidth_gb_s");
      cost.host_bytes = 2 * bytes;
      break;
  }
  return cost;
}

OperationCost Clock::bytes_bound_cost(std::uint64_t bytes) const {
  OperationCost cost;
  cost.resource = Resource::kCompute;
  const bool fits_cache = static_cast<double>(bytes) <= profile_.at("gpu.l2_mib") * 1048576 / 2;
  const double rate =
      fits_cache ? profile_.at("gpu.l2_bandwidth_gb_s")
                 : profile_.at("gpu.memory_bandwidth_gb_s") * profile_.at("gpu.memory_efficiency");
  cost.duration =
      to_nanoseconds(profile_.at("gpu.kernel_ramp_us") * 1000 + static_cast<double>(bytes) / rate);
  if (!fits_cache) cost.device_bytes = bytes;
  const bool moves = static_cast<double>(bytes) / rate > profile_.at("gpu.kernel_ramp_us") * 1000;
  cost.limit = moves ? KernelLimit::kMemory : KernelLimit::kFixed;
  return cost;
}

// Puts a detached thread's operation on a lane, after marks for what the thread waited for.
void Clock::push_detached(LaneId lane, const StreamRef& stream, TimelineNode node) {
  const int device = stream == nullptr ? 0 : stream->device;
  const int priority = stream == nullptr ? 0 : stream->priority;
  for (const auto& [awaited, ticket] : DetachedThread::current().launch()) {
    if (awaited == lane || timeline_.is_done(awaited, ticket)) continue;
    TimelineNode mark;
    mark.ticket = node.ticket;
    mark.cost.shares_launch = true;
    mark.awaited_lane = awaited;
    mark.awaited_ticket = ticket;
    timeline_.append(lane, device, priority, stream, std::move(mark));
  }
  timeline_.append(lane, device, priority, stream, std::move(node));
}

void Clock::push(const StreamRef& stream, TimelineNode node) {
  if (turns_.is_detached()) return push_detached(stream->id, stream, std::move(node));
  const HostThread& thread = turns_.current();
  node.submitted = thread.now;
  if (node.cost.resource != Resource::kNone) node.submitted += launch_latency_;
  node.host = thread.stamp();
  timeline_.append(stream->id, stream->device, stream->priority, stream, std::move(node));
}

void Clock::append(const StreamRef& stream, const Operation& operation) {
  TimelineNode node;
  node.ticket = stream->enqueued;
  node.cost = operation.cost;
  node.name = node.cost.name != nullptr ? node.cost.name : operation.name;
  if (const auto* wait = std::get_if<WaitForTicket>(&operation.body)) {
    node.awaited_lane = wait->stream->id;
    node.awaited_ticket = wait->ticket;
  } else if (const auto* record = std::get_if<RecordTime>(&operation.body)) {
    node.mark = record->virtual_time;
  } else if (operation.is_host_function()) {
    node.cost.resource = Resource::kHostFunction;
    node.cost.duration = profile_.microseconds("host.function_us");
    node.needs_execution = true;
  } else if (std::holds_alternative<WaitValue>(operation.body) ||
             std::holds_alternative<Hold>(operation.body)) {
    node.needs_execution = true;
  } else if (node.cost.resource == Resource::kNone &&
             (std::holds_alternative<Kernel>(operation.body) ||
              std::holds_alternative<SharedKernel>(operation.body))) {
    node.cost = bytes_bound_cost(0);
    node.cost.shares_launch = operation.cost.shares_launch;
  } else if (node.cost.resource == Resource::kNone) {
    return;  // takes no time
  }
  push(stream, std::move(node));
}

void Clock::append_kernel(const StreamRef& stream, const char* name, const OperationCost& cost) {
  TimelineNode node;
  node.ticket = stream->enqueued;
  node.name = name;
  node.cost = cost;
  push(stream, std::move(node));
}

void Clock::throttle(Lock& lock, const StreamRef& stream) {
  if (turns_.is_detached()) return;
  const Ticket ticket = timeline_.launch_behind(stream->id, queue_depth_);
  if (ticket == 0) return;
  HostThread& thread = turns_.current();
  const Nanoseconds start = thread.now;
  run_until(lock, stream->id, ticket);
  end_wait(&thread, start, "launch queue full", timeline_.origin(stream->id));
}

void Clock::executed(const Stream& stream, Ticket ticket) {
  timeline_.executed(stream.id, ticket, std::exchange(callback_duration, 0));
}

void Clock::end_wait(HostThread* thread, Nanoseconds start, const char* cause, Origin origin) {
  if (thread->now <= start) return;
  thread->resumed = thread->now;
  thread->waited_for = origin;
  recorder_.add(HostWait{thread->id, cause, start, thread->now, origin});
}

// Really runs what must be run before time can go on. False where it has not come to its end.
bool Clock::execute(Lock& lock, const Timeline::Need& need, Patience patience) {
  if (need.stream == nullptr) {
    return work_ended_.wait_for(lock, kWorkWait,
                                [&] { return !timeline_.needs_execution(need.lane, need.ticket); });
  }
  if (patience == Patience::kBlock) {
    // What a host function tells other threads, they learn at this time.
    turns_.current().move_to(timeline_.now());
    machine_->scheduler.drain(lock, need.stream, need.ticket);
    return true;
  }
  return machine_->scheduler.drain_briefly(lock, need.stream, need.ticket, kBriefWait);
}

// Simulates until the ticket is done and moves the calling thread there.
bool Clock::run_until(Lock& lock, LaneId lane, Ticket ticket) {
  HostThread& thread = turns_.current();
  bool waited = false;
  while (!timeline_.is_done(lane, ticket)) {
    const Nanoseconds limit = turns_.limit();
    switch (timeline_.step(limit)) {
      case Timeline::Step::kAdvanced:
        waited = true;
        break;
      case Timeline::Step::kNeedsExecution:
        if (!execute(lock, Timeline::Need(timeline_.need()), Patience::kBlock)) return waited;
        waited = true;
        break;
      case Timeline::Step::kReachedLimit: {
        // Another thread may do something before the next thing happens on the device.
        const Nanoseconds next = timeline_.next_moment();
        if (next == kForever) return waited;
        lock.unlock();
        turns_.yield(next);
        lock.lock();
        waited = true;
        break;
      }
      case Timeline::Step::kIdle:
        return waited;
    }
  }
  if (waited) thread.move_to(timeline_.now());
  return waited;
}

void Clock::wait(Lock& lock, const StreamRef& stream, Ticket ticket) {
  if (current_work != 0) {  // the work that this thread does begins after that
    timeline_.await(kHostLanes + current_work, 1, stream->id, ticket);
    return;
  }
  if (turns_.is_detached()) return DetachedThread::current().wait(stream->id, ticket);
  HostThread& thread = turns_.current();
  const Nanoseconds start = thread.now;
  run_until(lock, stream->id, ticket);
  end_wait(&thread, start, current_call(), timeline_.origin(stream->id));
}

void Clock::wait_device(Lock& lock, int device) {
  if (turns_.is_detached()) {
    for (const auto& [lane, ticket] : timeline_.busy_lanes(device)) {
      DetachedThread::current().wait(lane, ticket);
    }
    return;
  }
  HostThread& thread = turns_.current();
  const Nanoseconds start = thread.now;
  Origin last;
  for (const auto& [lane, ticket] : timeline_.busy_lanes(device)) {
    if (run_until(lock, lane, ticket)) last = timeline_.origin(lane);
  }
  end_wait(&thread, start, current_call(), last);
}

// Simulates up to the calling thread's time. Whether the ticket is done then.
bool Clock::run_to_now(Lock& lock, LaneId lane, Ticket ticket) {
  if (turns_.is_detached()) {  // it has no time at which the ticket could be undone
    DetachedThread::current().wait(lane, ticket);
    return true;
  }
  HostThread& thread = turns_.current();
  while (!timeline_.is_done(lane, ticket)) {
    const Timeline::Step step = timeline_.step(thread.now);
    if (step == Timeline::Step::kAdvanced) continue;
    if (step != Timeline::Step::kNeedsExecution) break;
    if (!execute(lock, Timeline::Need(timeline_.need()), Patience::kBrief)) break;
  }
  if (timeline_.is_done(lane, ticket)) return true;
  charge_polling(&thread);
  return false;
}

// Allocators look at the events of what other threads freed, whenever that was, so a few queries
// cost nothing. Who polls makes many, and neither submits nor waits in between; what passes between
// them is not known: as much as can be at no more than a small part of the whole.
void Clock::charge_polling(HostThread* thread) {
  constexpr unsigned kFreeQueries = 32;
  constexpr Nanoseconds kPolledShare = 128;
  if (thread->queries == 0) thread->polls_since = thread->now;
  if (++thread->queries <= kFreeQueries) return;
  thread->now += std::max(profile_.microseconds("host.query_us"),
                          (thread->now - thread->polls_since) / kPolledShare);
}

bool Clock::has_passed(Lock& lock, const StreamRef& stream, Ticket ticket) {
  return run_to_now(lock, stream->id, ticket);
}

void Clock::advance(Nanoseconds duration) {
  if (turns_.is_detached()) return;
  HostThread& thread = turns_.current();
  thread.now += duration;
}

void Clock::charge_call(const char* function) {
  // A thread that does work for another has no time of its own, and whose turn it is when it calls
  // depends on the machine.
  if (current_work != 0) return;
  const auto found = call_costs_.find(std::string_view(function));
  if (found == call_costs_.end()) return;
  advance(found->second);
  if (submits_or_waits(function) && !turns_.is_detached()) turns_.current().queries = 0;
}

void Clock::charge_event() {
  advance(profile_.microseconds("host.event_us"));
}

void Clock::charge_pinning(std::uint64_t bytes) {
  advance(profile_.transfer(bytes, "host.pin_gb_s"));
}

OperationCost Clock::work_cost(Resource resource, std::uint64_t bytes, Nanoseconds duration) const {
  OperationCost cost;
  cost.resource = resource;
  cost.host_bytes = bytes;
  if (duration >= 0) {
    cost.duration = duration;
  } else if (resource == Resource::kOptimizer) {
    cost.duration = profile_.transfer(bytes, "host.optimizer_bandwidth_gb_s");
  } else if (resource == Resource::kHostOperator) {
    cost.duration = profile_.transfer(bytes, "host.memory_bandwidth_gb_s");
  } else if (resource == Resource::kDiskRead) {
    cost.duration =
        profile_.microseconds("disk.read_latency_us") + profile_.transfer(bytes, "disk.read_gb_s");
  } else {
    cost.duration = profile_.microseconds("disk.write_latency_us") +
                    profile_.transfer(bytes, "disk.write_gb_s");
  }
  return cost;
}

bool Clock::work(Lock& lock, const char* name, std::uint64_t bytes, Nanoseconds duration) {
  Resource resource{};
  if (!resource_of(name, &resource)) return false;
  perform(lock, resource_name(resource), work_cost(resource, bytes, duration));
  return true;
}

void Clock::host_operator(Lock& lock, const char* name, std::uint64_t bytes, bool is_optimizer) {
  if (bytes < kHostOperatorBytesMin || current_work != 0) return;
  const Resource resource = is_optimizer ? Resource::kOptimizer : Resource::kHostOperator;
  perform(lock, name, work_cost(resource, bytes, -1));
}

// The calling thread does the work and goes on when it is done.
void Clock::perform(Lock& lock, const char* name, const OperationCost& cost) {
  if (in_callback()) {  // a host function's work is part of its duration
    callback_duration += cost.duration;
    return;
  }
  const LaneId lane = kHostLanes + next_work_++;
  TimelineNode node;
  node.ticket = 1;
  node.name = name;
  node.cost = cost;
  if (turns_.is_detached()) {
    push_detached(lane, nullptr, std::move(node));
    DetachedThread::current().wait(lane, 1);
    return;
  }
  HostThread& thread = turns_.current();
  node.submitted = thread.now;
  node.host = thread.stamp();
  timeline_.append(lane, 0, 0, nullptr, std::move(node));
  const Nanoseconds start = thread.now;
  run_until(lock, lane, 1);
  end_wait(&thread, start, resource_name(cost.resource), timeline_.last_ended());
}

std::uint64_t Clock::submit_work(const char* name, std::uint64_t bytes) {
  Resource resource{};
  if (!resource_of(name, &resource)) return 0;
  const std::uint64_t id = next_work_++;
  TimelineNode node;
  node.ticket = 1;
  node.name = resource_name(resource);
  node.cost = work_cost(resource, bytes, -1);
  node.needs_execution = true;
  if (turns_.is_detached()) {
    push_detached(kHostLanes + id, nullptr, std::move(node));
    return id;
  }
  const HostThread& thread = turns_.current();
  node.submitted = thread.now;
  node.host = thread.stamp();
  timeline_.append(kHostLanes + id, 0, 0, nullptr, std::move(node));
  return id;
}

void Clock::begin_work(std::uint64_t id) {
  current_work = id;
}

void Clock::end_work(std::uint64_t id) {
  current_work = 0;
  timeline_.executed(kHostLanes + id, 1, 0);
  work_ended_.notify_all();
}

void Clock::wait_for_work(Lock& lock, std::uint64_t id) {
  if (turns_.is_detached()) return DetachedThread::current().wait(kHostLanes + id, 1);
  HostThread& thread = turns_.current();
  const Nanoseconds start = thread.now;
  const char* const name = timeline_.next_name(kHostLanes + id);
  run_until(lock, kHostLanes + id, 1);
  end_wait(&thread, start, name, timeline_.last_ended());
}

bool Clock::work_has_passed(Lock& lock, std::uint64_t id) {
  return run_to_now(lock, kHostLanes + id, 1);
}

void Clock::note_memory() {
  for (std::size_t device = 0; device < memory_bytes_.size(); ++device) {
    const std::uint64_t bytes = machine_->budget.used_bytes(static_cast<int>(device));
    if (bytes == memory_bytes_[device]) continue;
    memory_bytes_[device] = bytes;
    recorder_.add(MemorySample{now(), static_cast<int>(device), false, bytes});
  }
}

void Clock::note_block(std::int64_t bytes) {
  block_bytes_ = std::max<std::int64_t>(block_bytes_ + bytes, 0);
  recorder_.add(MemorySample{now(), 0, true, static_cast<std::uint64_t>(block_bytes_)});
}

void Clock::yield(Lock& lock) {
  if (turns_.limit() == kForever) return;
  lock.unlock();
  turns_.yield();
  lock.lock();
}

// Everything that was launched counts, so it is simulated to its end first.
Recorder::Facts Clock::facts(Lock& lock) {
  for (;;) {
    const Timeline::Step step = timeline_.step(kForever);
    if (step == Timeline::Step::kIdle) break;
    if (step == Timeline::Step::kNeedsExecution &&
        !execute(lock, Timeline::Need(timeline_.need()), Patience::kBrief)) {
      break;
    }
  }
  turns_.current().move_to(timeline_.now());
  Recorder::Facts facts;
  facts.threads = turns_.entries();
  facts.makespan = recorder_.last_end();
  for (const auto& thread : facts.threads) facts.makespan = std::max(facts.makespan, thread.now);
  facts.unseen_waits = turns_.unseen_waits();
  facts.profile = profile_name_;
  return facts;
}

std::int64_t Clock::mark() {
  return recorder_.mark(timeline_.submissions(), turns_.current().now);
}

std::string Clock::report(Lock& lock) {
  return recorder_.report(facts(lock));
}

bool Clock::write_trace(Lock& lock, const char* path) {
  const Recorder::Facts known = facts(lock);
  return recorder_.write_trace(path, known);
}

}  // namespace spillover::emulator
