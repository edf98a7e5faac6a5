#include "emulator/core/events.hpp"

#include <chrono>
#include <thread>
#include <utility>

#include "emulator/core/machine.hpp"

namespace spillover::emulator {
namespace {

constexpr std::uint8_t kEventTag = 0x52;

}  // namespace

// Handles of events are not issued again, so that use after cuEventDestroy is an error.
Events::Events(Machine* machine) : machine_(machine), table_(kEventTag, HandleReuse::kNever) {}

CUevent Events::create(Context* context, unsigned flags) {
  auto event = std::make_unique<Event>();
  event->context = context;
  event->flags = flags;
  if ((flags & CU_EVENT_INTERPROCESS) != 0) {
    event->mark = SharedMark::create();
    if (event->mark == nullptr) return nullptr;
    event->record_number = event->mark->records();
  }
  return insert(std::move(event));
}

CUevent Events::import(Context* context, std::shared_ptr<SharedMark> mark) {
  auto event = std::make_unique<Event>();
  event->context = context;
  event->flags = CU_EVENT_DISABLE_TIMING | CU_EVENT_INTERPROCESS;
  event->mark = std::move(mark);
  return insert(std::move(event));
}

CUevent Events::insert(std::unique_ptr<Event> event) {
  CUevent handle = nullptr;
  table_.insert(std::move(event), &handle);
  if (machine_->hazards.enabled()) {
    machine_->hazards.history().begin(ObjectHistory::Kind::kEvent,
                                      reinterpret_cast<Address>(handle), 0);
  }
  return handle;
}

void Events::destroy(CUevent handle) {
  if (machine_->hazards.enabled()) {
    machine_->hazards.history().end(ObjectHistory::Kind::kEvent, reinterpret_cast<Address>(handle));
  }
  table_.erase(handle);
}

Event* Events::find(CUevent handle) {
  std::unique_ptr<Event>* found = table_.find(handle);
  if (found != nullptr) return found->get();
  machine_->report_dead_handle(ObjectHistory::Kind::kEvent, reinterpret_cast<Address>(handle));
  return nullptr;
}

CUresult Events::record(Lock& lock, Event* event, const StreamRef& stream) {
  if (event->context->device != stream->device) return CUDA_ERROR_INVALID_HANDLE;
  // Allocators record events without timing in whichever thread lets go of memory last, which need
  // not be the same in every run; such a record is ten times cheaper, and counts as nothing.
  if (machine_->clock.enabled() && event->has_timing()) machine_->clock.charge_event();
  mark(event, stream);
  machine_->scheduler.settle(lock, stream, 0);
  return CUDA_SUCCESS;
}

void Events::mark(Event* event, const StreamRef& stream) {
  event->capture.reset();
  event->capture_nodes.clear();
  machine_->streams.order_with_default(stream);
  event->stream = stream;
  event->query_count = 0;
  event->all_know = false;
  if (event->mark != nullptr) {
    event->ticket = machine_->streams.prepare(stream);
    event->clock = stream->clock;
    event->record_number = event->mark->begin_record();
    Operation operation;
    operation.body = PublishRecord{event->mark, event->record_number};
    operation.name = "event record";
    machine_->scheduler.append(stream, std::move(operation));
    return;
  }
  if (!event->has_timing()) {
    // Nothing has to happen at the event's turn, so the mark is the last operation's end.
    event->ticket = stream->enqueued;
    event->clock = stream->clock;
    return;
  }
  event->ticket = machine_->streams.prepare(stream);
  event->clock = stream->clock;
  event->time = std::make_shared<TimePoint>();
  Operation operation;
  // Negative until the event's turn comes.
  event->virtual_time = machine_->clock.enabled() ? std::make_shared<std::int64_t>(-1) : nullptr;
  operation.body = RecordTime{event->time, event->virtual_time};
  operation.name = "event record";
  machine_->streams.append(stream, std::move(operation));
}

// Nothing here is notified of what another process does.
void Events::synchronize_elsewhere(Lock& lock, const Event& event) {
  constexpr auto kPollInterval = std::chrono::microseconds(200);
  const std::shared_ptr<SharedMark> mark = event.mark;
  const std::uint64_t record = mark->records();
  lock.unlock();
  while (!mark->reached(record)) std::this_thread::sleep_for(kPollInterval);
  lock.lock();
}

void Events::synchronize(Lock& lock, Event* event) {
  if (event->is_recorded_elsewhere()) return synchronize_elsewhere(lock, *event);
  const StreamRef stream = event->stream;
  const Ticket ticket = event->ticket;
  const VectorClock clock = event->clock;
  if (stream == nullptr) return machine_->streams.host_learns(clock);
  if (machine_->clock.enabled()) machine_->clock.wait(lock, stream, ticket);
  machine_->scheduler.drain(lock, stream, ticket);
  machine_->streams.host_learns(clock);
}

CUresult Events::query(Lock& lock, CUevent handle) {
  Event* event = find(handle);
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (event->is_recorded_elsewhere()) {
    return event->is_complete() ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
  }
  if (machine_->clock.enabled() && event->stream != nullptr) {
    const StreamRef stream = event->stream;
    const Ticket ticket = event->ticket;
    if (!machine_->clock.has_passed(lock, stream, ticket)) return CUDA_ERROR_NOT_READY;
    machine_->scheduler.drain(lock, stream, ticket);
    event = find(handle);
    if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  }
  if (!event->is_complete() && ++event->query_count > machine_->config.query_spins) {
    event->query_count = 0;
    const StreamRef stream = event->stream;
    machine_->scheduler.advance(lock, stream, event->ticket);
    event = find(handle);  // another thread may have destroyed it meanwhile
    if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  }
  if (!event->is_complete()) return CUDA_ERROR_NOT_READY;
  if (!std::exchange(event->all_know, true)) machine_->streams.all_learn(event->clock);
  return CUDA_SUCCESS;
}

void Events::make_wait(const StreamRef& stream, const Event& event) {
  if (event.is_recorded_elsewhere()) {
    machine_->streams.prepare(stream);
    Operation wait;
    wait.body = WaitValue{.value = event.mark->records(), .mark = event.mark};
    wait.name = "wait for another process's event";
    machine_->scheduler.append(stream, std::move(wait));
    return;
  }
  if (event.stream == nullptr) return;
  machine_->streams.wait_for(stream, event.stream, event.ticket, event.clock);
}

CUresult Events::elapsed(const Event& start, const Event& end, float* milliseconds) {
  for (const Event* event : {&start, &end}) {
    if (!event->has_timing() || event->stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  }
  if (start.context->device != end.context->device) return CUDA_ERROR_INVALID_HANDLE;
  if (!start.is_complete() || !end.is_complete()) return CUDA_ERROR_NOT_READY;
  if (start.virtual_time != nullptr && end.virtual_time != nullptr) {
    if (*start.virtual_time < 0 || *end.virtual_time < 0) return CUDA_ERROR_NOT_READY;
    *milliseconds = static_cast<float>(*end.virtual_time - *start.virtual_time) * 1e-6F;
    return CUDA_SUCCESS;
  }
  *milliseconds = std::chrono::duration<float, std::milli>(*end.time - *start.time).count();
  return CUDA_SUCCESS;
}

}  // namespace spillover::emulator
