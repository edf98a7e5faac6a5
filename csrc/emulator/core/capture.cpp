#include "emulator/core/capture.hpp"

#include <algorithm>
#include <atomic>
#include <unordered_set>
#include <utility>

#include "emulator/core/c_api.h"
#include "emulator/core/machine.hpp"

// How many captures are going on; read without the mutex by whoever puts work on streams.
extern "C" {
__attribute__((visibility("default"))) int spillover_emulator_captures = 0;
}

namespace spillover::emulator {
namespace {

std::atomic<bool> values_wanted{false};

thread_local CUstreamCaptureMode this_thread_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

void publish_count(std::size_t count) {
  __atomic_store_n(&spillover_emulator_captures, static_cast<int>(count), __ATOMIC_RELAXED);
}

// Every stream's work must come before what the stream where the capture began does next.
bool is_joined(const Capture& capture) {
  const auto known = ancestors_of(capture.origin->capture->tail);
  const std::unordered_set<const GraphNode*> joined(known.begin(), known.end());
  return std::all_of(capture.members.begin(), capture.members.end(), [&](const StreamRef& member) {
    if (member->capture == nullptr) return true;
    const auto& tail = member->capture->tail;
    return std::all_of(tail.begin(), tail.end(),
                       [&](const GraphNode* node) { return joined.contains(node); });
  });
}

void merge_into(std::vector<GraphNode*>* tail, const std::vector<GraphNode*>& nodes) {
  for (GraphNode* node : nodes) {
    if (std::find(tail->begin(), tail->end(), node) == tail->end()) tail->push_back(node);
  }
}

}  // namespace

CUstreamCaptureMode& Captures::thread_mode() {
  return this_thread_mode;
}

bool Captures::follows_values() {
  return values_wanted.load(std::memory_order_relaxed);
}

CUresult Captures::begin(const StreamRef& stream, CUstreamCaptureMode mode, Graph* graph,
                         std::vector<GraphNode*> dependencies) {
  if (stream->kind == StreamKind::kLegacy) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (stream->capture != nullptr) return CUDA_ERROR_ILLEGAL_STATE;
  if (graph != nullptr && graph->is_capturing) return CUDA_ERROR_ILLEGAL_STATE;
  auto capture = std::make_shared<Capture>(machine_);
  capture->id = next_id_++;
  capture->mode = mode;
  capture->thread = std::this_thread::get_id();
  capture->origin = stream;
  capture->is_new_graph = graph == nullptr;
  capture->graph = graph == nullptr ? machine_->graphs.create() : graph;
  capture->graph->is_capturing = true;
  capture->members.push_back(stream);
  stream->capture = std::make_shared<StreamCapture>();
  stream->capture->capture = capture;
  stream->capture->tail = std::move(dependencies);
  active_.push_back(std::move(capture));
  publish_count(active_.size());
  return CUDA_SUCCESS;
}

void Captures::close(const std::shared_ptr<Capture>& capture) {
  capture->is_over = true;
  capture->graph->is_capturing = false;
  for (const StreamRef& member : capture->members) {
    if (member->capture != nullptr && member->capture->capture == capture) member->capture.reset();
  }
  std::erase(active_, capture);
  publish_count(active_.size());
}

CUresult Captures::end(const StreamRef& stream, CUgraph* graph, std::shared_ptr<Graph>* garbage) {
  *graph = nullptr;
  if (stream->capture == nullptr) return CUDA_ERROR_ILLEGAL_STATE;
  const std::shared_ptr<Capture> capture = stream->capture->capture;
  if (capture->origin != stream) {
    invalidate(capture.get());
    return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
  }
  if (capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED &&
      capture->thread != std::this_thread::get_id()) {
    return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
  }
  CUresult result = CUDA_SUCCESS;
  if (!capture->is_valid) {
    result = CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  } else if (!is_joined(*capture)) {
    result = CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
  }
  close(capture);
  if (result == CUDA_SUCCESS) {
    *graph = capture->graph->handle;
  } else if (capture->is_new_graph) {
    *garbage = machine_->graphs.destroy(capture->graph);
  }
  return result;
}

void Captures::abandon(const StreamRef& stream) {
  if (stream->capture == nullptr) return;
  const std::shared_ptr<Capture> capture = stream->capture->capture;
  invalidate(capture.get());
  // Nobody can end it any more. Its graph is kept: what it holds must not die under the mutex.
  if (capture->origin == stream) close(capture);
}

// The streams that order with a device's default stream and that are being captured.
bool Captures::invalidate_blocking(int device) {
  bool found = false;
  for (const auto& capture : active_) {
    for (const StreamRef& member : capture->members) {
      if (member->capture == nullptr || !member->is_blocking() || member->device != device)
        continue;
      invalidate(capture.get());
      found = true;
    }
  }
  return found;
}

CUresult Captures::check_work(const StreamRef& stream) {
  if (stream->capture != nullptr) {
    return stream->capture->capture->is_valid ? CUDA_SUCCESS
                                              : CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  }
  if (stream->kind == StreamKind::kLegacy && invalidate_blocking(stream->device)) {
    return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  }
  return CUDA_SUCCESS;
}

CUresult Captures::check_wait(const StreamRef& stream) {
  if (stream->capture != nullptr) {
    Capture& capture = *stream->capture->capture;
    if (!capture.is_valid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    invalidate(&capture);
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  if (stream->kind == StreamKind::kLegacy && invalidate_blocking(stream->device)) {
    return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  }
  return check_unsafe_call();
}

CUresult Captures::admit_event_wait(const Event& event) {
  if (event.capture == nullptr) return admit_unsafe_call();
  if (!event.capture->is_over) invalidate(event.capture.get());
  return CUDA_ERROR_CAPTURED_EVENT;
}

CUresult Captures::admit_device_wait(int device) {
  bool found = false;
  for (const auto& capture : active_) {
    for (const StreamRef& member : capture->members) {
      if (device >= 0 && member->device != device) continue;
      invalidate(capture.get());
      found = true;
    }
  }
  return found ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}

CUresult Captures::check_unsafe_call() {
  if (this_thread_mode == CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_SUCCESS;
  const bool minds_others = this_thread_mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
  bool found = false;
  for (const auto& capture : active_) {
    const bool is_own = capture->thread == std::this_thread::get_id();
    const bool conflicts = is_own ? capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED
                                  : minds_others && capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
    if (!conflicts) continue;
    invalidate(capture.get());
    found = true;
  }
  return found ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}

CUresult Captures::status(const StreamRef& stream, CUstreamCaptureStatus* status) const {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  if (stream->capture != nullptr) {
    *status = stream->capture->capture->is_valid ? CU_STREAM_CAPTURE_STATUS_ACTIVE
                                                 : CU_STREAM_CAPTURE_STATUS_INVALIDATED;
    return CUDA_SUCCESS;
  }
  if (stream->kind != StreamKind::kLegacy) return CUDA_SUCCESS;
  for (const auto& capture : active_) {
    for (const StreamRef& member : capture->members) {
      if (member->is_blocking() && member->device == stream->device) {
        return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
      }
    }
  }
  return CUDA_SUCCESS;
}

GraphNode* Captures::add(const StreamRef& stream, const char* name, NodeWork work) {
  StreamCapture& mine = *stream->capture;
  GraphNode* const node =
      machine_->graphs.add_node(mine.capture->graph, name, std::move(work), mine.tail);
  mine.tail.assign(1, node);
  return node;
}

void Captures::change_tail(const StreamRef& stream, const std::vector<GraphNode*>& nodes,
                           bool replaces) {
  if (replaces) stream->capture->tail.clear();
  merge_into(&stream->capture->tail, nodes);
}

CUresult Captures::record(const StreamRef& stream, CUevent handle, Event* event, unsigned flags) {
  if (event->context->device != stream->device) return CUDA_ERROR_INVALID_HANDLE;
  if ((flags & CU_EVENT_RECORD_EXTERNAL) != 0) {
    add(stream, "event record", EventRecordWork{handle});
    return CUDA_SUCCESS;
  }
  event->capture = stream->capture->capture;
  event->capture_nodes = stream->capture->tail;
  event->stream = nullptr;
  return CUDA_SUCCESS;
}

CUresult Captures::wait(const StreamRef& stream, CUevent handle, const Event& event,
                        unsigned flags) {
  const bool is_capturing = stream->capture != nullptr;
  if ((flags & CU_EVENT_WAIT_EXTERNAL) != 0) {
    if (!is_capturing) return CUDA_ERROR_CAPTURED_EVENT;
    add(stream, "event wait", EventWaitWork{handle});
    return CUDA_SUCCESS;
  }
  if (event.capture == nullptr) {
    invalidate(stream->capture->capture.get());
    return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
  }
  if (event.capture->is_over) {
    if (is_capturing) invalidate(stream->capture->capture.get());
    return is_capturing ? CUDA_ERROR_STREAM_CAPTURE_ISOLATION : CUDA_ERROR_CAPTURED_EVENT;
  }
  if (!event.capture->is_valid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  if (is_capturing && stream->capture->capture != event.capture) {
    invalidate(stream->capture->capture.get());
    invalidate(event.capture.get());
    return CUDA_ERROR_STREAM_CAPTURE_MERGE;
  }
  if (!is_capturing) {
    if (stream->kind == StreamKind::kLegacy) {
      invalidate(event.capture.get());
      return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    }
    stream->capture = std::make_shared<StreamCapture>();
    stream->capture->capture = event.capture;
    event.capture->members.push_back(stream);
  }
  merge_into(&stream->capture->tail, event.capture_nodes);
  return CUDA_SUCCESS;
}

}  // namespace spillover::emulator

extern "C" void spillover_emulator_follow_captured_values(void) {
  spillover::emulator::values_wanted.store(true, std::memory_order_relaxed);
}
