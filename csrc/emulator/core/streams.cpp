#include "emulator/core/streams.hpp"

#include <algorithm>
#include <array>
#include <utility>

#include "emulator/core/machine.hpp"
#include "emulator/core/process.hpp"

namespace spillover::emulator {
namespace {

constexpr std::uint8_t kStreamTag = 0x51;

// A thread's per-thread default streams; its end destroys them. Calls that come later on the same
// thread, from destructors that run after this one, find the flag.
struct PerThreadStreams {
  std::array<StreamRef, kDeviceCountMax> streams;
  ~PerThreadStreams();
};

thread_local bool per_thread_streams_gone = false;

PerThreadStreams& per_thread_streams() {
  thread_local PerThreadStreams instance;
  return instance;
}

PerThreadStreams::~PerThreadStreams() {
  per_thread_streams_gone = true;
  if (!process_ready()) {
    // A forked child: destroying what they refer to would be harmless, locking would not.
    for (StreamRef& stream : streams) new StreamRef(std::move(stream));
    return;
  }
  Machine& machine = Machine::instance();
  const Lock lock(machine.mutex);
  for (StreamRef& stream : streams) {
    if (stream != nullptr) machine.streams.close(stream);
    stream.reset();
  }
}

}  // namespace

Streams::Streams(Machine* machine, int device_count)
    : machine_(machine),
      tracks_order_(machine->hazards.enabled()),
      table_(kStreamTag, HandleReuse::kAtOnce),
      blocking_(static_cast<std::size_t>(device_count)),
      ended_(static_cast<std::size_t>(device_count)) {
  for (int device = 0; device < device_count; ++device) {
    legacy_.push_back(make(machine->contexts.primary(device), 0, 0, StreamKind::kLegacy));
  }
}

void Streams::take_actor(Stream* stream) {
  if (!tracks_order_) return;
  const VectorClock& host = threads_.current().clock;
  const auto known = std::find_if(retired_.begin(), retired_.end(), [&](const RetiredActor& actor) {
    return host.at(actor.actor) >= actor.last_tick;
  });
  // Whoever launches on it got the handle from this thread.
  stream->clock.merge(host);
  if (known == retired_.end()) {
    stream->actor = next_actor_++;
    return;
  }
  // Tickets go on where the old stream's ended, so that nobody's knowledge of that one covers the
  // new.
  stream->actor = known->actor;
  stream->enqueued = stream->completed = known->last_tick;
  retired_.erase(known);
}

StreamRef Streams::make(Context* context, unsigned flags, int priority, StreamKind kind) {
  auto stream = std::make_shared<Stream>();
  stream->id = next_id_++;
  stream->kind = kind;
  stream->context = context;
  stream->device = context->device;
  stream->flags = flags;
  stream->priority = priority;
  take_actor(stream.get());
  return stream;
}

StreamRef Streams::create(Context* context, unsigned flags, int priority) {
  StreamRef stream = make(context, flags, priority, StreamKind::kCreated);
  table_.insert(stream, &stream->handle);
  if (stream->is_blocking()) blocking_[static_cast<std::size_t>(stream->device)].push_back(stream);
  if (tracks_order_) {
    machine_->hazards.history().begin(ObjectHistory::Kind::kStream,
                                      reinterpret_cast<Address>(stream->handle), 0, stream->id);
  }
  return stream;
}

StreamRef Streams::create_lane(Context* context) {
  return make(context, CU_STREAM_NON_BLOCKING, 0, StreamKind::kCreated);
}

StreamRef Streams::per_thread(Context* context) {
  if (per_thread_streams_gone) return nullptr;
  StreamRef& stream = per_thread_streams().streams[static_cast<std::size_t>(context->device)];
  if (stream == nullptr) {
    stream = make(context, 0, 0, StreamKind::kPerThread);
    stream->handle = CU_STREAM_PER_THREAD;
    blocking_[static_cast<std::size_t>(stream->device)].push_back(stream);
  }
  return stream;
}

void Streams::destroy(CUstream handle) {
  if (tracks_order_) {
    machine_->hazards.history().end(ObjectHistory::Kind::kStream,
                                    reinterpret_cast<Address>(handle));
  }
  const StreamRef stream = table_.erase(handle);
  machine_->captures.abandon(stream);
  close(stream);
}

void Streams::close(const StreamRef& stream) {
  stream->destroyed = true;
  if (stream->idle()) retire(*stream);
}

void Streams::retire(const Stream& stream) {
  if (stream.is_blocking()) {
    std::erase_if(blocking_[static_cast<std::size_t>(stream.device)],
                  [&](const StreamRef& other) { return other.get() == &stream; });
    if (tracks_order_) ended_[static_cast<std::size_t>(stream.device)].merge(stream.clock);
  }
  if (tracks_order_) retired_.push_back({stream.actor, stream.enqueued, stream.device});
}

CUresult Streams::find(CUstream handle, StreamRef* stream) {
  const auto value = reinterpret_cast<std::uintptr_t>(handle);
  if (value > reinterpret_cast<std::uintptr_t>(CU_STREAM_PER_THREAD)) {
    const StreamRef* found = table_.find(handle);
    if (found == nullptr) {
      machine_->report_dead_handle(ObjectHistory::Kind::kStream, value);
      return CUDA_ERROR_INVALID_HANDLE;
    }
    *stream = *found;
    return CUDA_SUCCESS;
  }
  Context* context = CurrentContext::get();
  if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  const bool is_per_thread =
      handle == CU_STREAM_PER_THREAD || (handle == nullptr && default_stream_is_per_thread());
  *stream = is_per_thread ? per_thread(context) : legacy(context->device);
  return *stream == nullptr ? CUDA_ERROR_INVALID_HANDLE : CUDA_SUCCESS;
}

void Streams::depend(const StreamRef& stream, const StreamRef& other, std::uint64_t* seen) {
  if (other->version == *seen) return;
  *seen = other->version;
  wait_for(stream, other, other->enqueued, other->clock);
}

void Streams::order_with_default(const StreamRef& stream) {
  if (stream->kind == StreamKind::kLegacy) {
    for (const StreamRef& other : blocking_[static_cast<std::size_t>(stream->device)]) {
      depend(stream, other, &other->seen_by_default);
    }
    if (tracks_order_) {
      VectorClock& ended = ended_[static_cast<std::size_t>(stream->device)];
      if (stream->clock.merge(std::exchange(ended, VectorClock()))) ++stream->version;
    }
  } else if (stream->is_blocking()) {
    depend(stream, legacy(stream->device), &stream->default_seen);
  }
  order_after_host(stream.get());
}

void Streams::order_after_host(Stream* stream) {
  if (!tracks_order_) return;
  stream->clock.set(kHostActor, host_tick_);
  const HostThreads::Knowledge& host = threads_.current();
  if (stream->host_version_seen == host.version) return;
  stream->host_version_seen = host.version;
  stream->clock.merge(host.clock);
}

Ticket Streams::prepare(const StreamRef& stream) {
  order_with_default(stream);
  const Ticket ticket = stream->enqueued + 1;
  if (tracks_order_) stream->clock.set(stream->actor, ticket);
  return ticket;
}

void Streams::submit(Lock& lock, const StreamRef& stream, Operation operation) {
  if (tracks_order_) {
    auto* const function = std::get_if<HostFunction>(&operation.body);
    if (function != nullptr) function->clock = stream->clock;
  }
  machine_->scheduler.enqueue(lock, stream, std::move(operation));
}

void Streams::append(const StreamRef& stream, Operation operation) {
  if (tracks_order_) {
    auto* const function = std::get_if<HostFunction>(&operation.body);
    if (function != nullptr) function->clock = stream->clock;
  }
  machine_->scheduler.append(stream, std::move(operation));
}

void Streams::perform(Lock& lock, const StreamRef& stream) {
  order_with_default(stream);
  while (!stream->idle()) machine_->scheduler.drain(lock, stream, stream->enqueued);
  order_after_host(stream.get());
  stream->completed = ++stream->enqueued;
  ++stream->version;
  if (tracks_order_) stream->clock.set(stream->actor, stream->enqueued);
}

void Streams::wait_for(const StreamRef& stream, const StreamRef& other, Ticket ticket,
                       const VectorClock& clock) {
  if (tracks_order_ && stream->clock.merge(clock)) ++stream->version;
  const bool is_done = other->completed >= ticket &&
                       (!machine_->clock.enabled() || machine_->clock.is_done(*other, ticket));
  if (other == stream || is_done) return;
  Operation wait;
  wait.body = WaitForTicket{other, ticket};
  wait.name = "wait";
  if (tracks_order_) stream->clock.set(stream->actor, stream->enqueued + 1);
  machine_->scheduler.append(stream, std::move(wait));
}

std::vector<StreamRef> Streams::covered_by(const StreamRef& stream) const {
  std::vector<StreamRef> covered{stream};
  if (stream->kind == StreamKind::kLegacy) {
    const auto& blocking = blocking_[static_cast<std::size_t>(stream->device)];
    covered.insert(covered.end(), blocking.begin(), blocking.end());
  }
  return covered;
}

VectorClock Streams::clock_of(const std::vector<StreamRef>& streams) const {
  VectorClock known;
  if (!tracks_order_) return known;
  for (const StreamRef& stream : streams) known.merge(stream->clock);
  const StreamRef& first = streams.front();
  if (first->kind == StreamKind::kLegacy) {
    known.merge(ended_[static_cast<std::size_t>(first->device)]);
  }
  return known;
}

// Waiting for a stream puts nothing on it: what is not ordered before its last operation is not
// waited for, and its next operation is ordered after nothing more.
void Streams::synchronize(Lock& lock, const StreamRef& stream) {
  const std::vector<StreamRef> covered = covered_by(stream);
  const VectorClock clock = clock_of(covered);
  std::vector<Ticket> tickets;
  for (const StreamRef& other : covered) tickets.push_back(other->enqueued);
  for (std::size_t i = 0; i < covered.size(); ++i) {
    if (machine_->clock.enabled()) machine_->clock.wait(lock, covered[i], tickets[i]);
    machine_->scheduler.drain(lock, covered[i], tickets[i]);
  }
  host_learns(clock);
}

VectorClock Streams::clock_of_device(int device) const {
  VectorClock known;
  const auto merge = [&](const StreamRef& stream) {
    if (device < 0 || stream->device == device) known.merge(stream->clock);
  };
  for (const StreamRef& stream : legacy_) merge(stream);
  table_.for_each(merge);
  for (const auto& streams : blocking_) {  // per-thread default streams are in no table
    for (const StreamRef& stream : streams) merge(stream);
  }
  for (const StreamRef& stream : machine_->scheduler.active_streams()) merge(stream);
  for (const RetiredActor& actor : retired_) {
    if (device >= 0 && actor.device != device) continue;
    known.set(actor.actor, std::max(known.at(actor.actor), actor.last_tick));
  }
  return known;
}

void Streams::synchronize_device(Lock& lock, int device) {
  VectorClock known;
  if (tracks_order_) known = clock_of_device(device);
  if (machine_->clock.enabled()) machine_->clock.wait_device(lock, device);
  machine_->scheduler.drain_device(lock, device);
  host_learns(known);
}

CUresult Streams::query(Lock& lock, const StreamRef& stream) {
  const std::vector<StreamRef> covered = covered_by(stream);
  if (machine_->clock.enabled()) {
    for (const StreamRef& other : covered) {
      const Ticket ticket = other->enqueued;
      if (!machine_->clock.has_passed(lock, other, ticket)) return CUDA_ERROR_NOT_READY;
      machine_->scheduler.drain(lock, other, ticket);
    }
  }
  const auto first_busy = [&] {
    return std::find_if(covered.begin(), covered.end(),
                        [](const StreamRef& other) { return !other->idle(); });
  };
  auto busy = first_busy();
  if (busy != covered.end() && ++stream->query_count > machine_->config.query_spins) {
    stream->query_count = 0;
    machine_->scheduler.advance(lock, *busy, (*busy)->completed + 1);
    busy = first_busy();
  }
  if (busy != covered.end()) return CUDA_ERROR_NOT_READY;
  all_learn(clock_of(covered));
  return CUDA_SUCCESS;
}

void Streams::release_value(const Stream& stream, Address address) {
  if (tracks_order_) value_clocks_[address].merge(stream.clock);
}

void Streams::acquire_value(Stream* stream, Address address) {
  const auto known = value_clocks_.find(address);
  if (known != value_clocks_.end()) stream->clock.merge(known->second);
}

void Streams::forget_values(Address address, std::size_t size_bytes) {
  value_clocks_.erase(value_clocks_.lower_bound(address),
                      value_clocks_.lower_bound(address + size_bytes));
}

}  // namespace spillover::emulator
