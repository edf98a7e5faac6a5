// Python's view of the transfer engine. Addresses and stream handles are integers.
//
// Note [Owners of memory]. A copy holds the Python object whose memory it works on. The engine
// gives the objects of copies that are over back, and the binding that called it lets go of them
// once it holds the GIL again: no thread of ours waits for it to drop a tensor.
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "allocator/stream_key.hpp"
#include "base/error.hpp"
#include "bindings/bindings.hpp"
#include "bindings/disk_requests.hpp"
#include "driver/fork_guard.hpp"
#include "tiers/disk_store.hpp"
#include "tiers/host_pool.hpp"
#include "transfer/copy_streams.hpp"
#include "transfer/residency.hpp"
#include "transfer/transfer_engine.hpp"

namespace py = pybind11;

namespace spillover {
namespace {

StreamHandle stream_of(uintptr_t handle) {
  return reinterpret_cast<StreamHandle>(handle);
}

CopyDirection direction_of(bool is_out) {
  return is_out ? CopyDirection::kOut : CopyDirection::kIn;
}

MemoryOwner owner_of(py::object object) {
  return {object.release().ptr(), [](void* owner) {
            if (Py_IsInitialized() == 0) return;  // The process is ending, and takes all with it.
            const GilAcquire acquired;
            Py_DECREF(static_cast<PyObject*>(owner));
          }};
}

// An engine with what it must outlive. In a forked child nothing of it may be touched, as its locks
// may be held for ever, so it is leaked there.
class EngineReference {
 public:
  explicit EngineReference(std::shared_ptr<TransferEngine> engine) : engine_(std::move(engine)) {}
  ~EngineReference() {
    if (in_forked_child()) new std::shared_ptr<TransferEngine>(std::move(engine_));
  }
  EngineReference(const EngineReference&) = default;
  EngineReference& operator=(const EngineReference&) = delete;

  TransferEngine* operator->() const { return engine_.get(); }
  TransferEngine& operator*() const { return *engine_; }

  // Does something without the GIL, and lets go of what copies have held with it.
  template <class Action>
  auto without_gil(Action action) const {
    const Released released{*engine_};
    const GilRelease gil;
    return action();
  }

 private:
  struct Released {
    TransferEngine& engine;
    ~Released() {
      if (!in_forked_child()) engine.take_released();
    }
  };

  std::shared_ptr<TransferEngine> engine_;
};

class PythonPayload {
 public:
  PythonPayload(const EngineReference& engine, std::shared_ptr<Payload> payload)
      : engine_(engine), payload_(std::move(payload)) {}
  ~PythonPayload() {
    if (in_forked_child()) {
      new std::shared_ptr<Payload>(std::move(payload_));
      return;
    }
    engine_->drop(payload_);
  }
  PythonPayload(const PythonPayload&) = delete;
  PythonPayload& operator=(const PythonPayload&) = delete;

  const std::shared_ptr<Payload>& payload() const { return payload_; }
  size_t size_bytes() const { return payload_->size_bytes; }
  const char* state() const { return engine_->describe(payload_); }
  void drop() const { engine_->drop(payload_); }

 private:
  const EngineReference engine_;
  std::shared_ptr<Payload> payload_;
};

class PythonTransferTicket {
 public:
  PythonTransferTicket(const EngineReference& engine, std::shared_ptr<TransferTicket> ticket,
                       std::vector<std::shared_ptr<Payload>> payloads = {})
      : engine_(engine), ticket_(std::move(ticket)), payloads_(std::move(payloads)) {}
  ~PythonTransferTicket() {
    if (in_forked_child()) new auto(std::pair(std::move(ticket_), std::move(payloads_)));
  }
  PythonTransferTicket(const PythonTransferTicket&) = delete;
  PythonTransferTicket& operator=(const PythonTransferTicket&) = delete;

  bool is_done() const {
    return engine_.without_gil([&] {
      const bool done = ticket_->is_done();
      if (done) engine_->collect();
      return done;
    });
  }

  void wait() const {
    engine_.without_gil([&] {
      ticket_->wait();
      engine_->collect();
    });
  }

  void stream_wait(uintptr_t stream) const {
    engine_.without_gil([&] { ticket_->put_before(stream_of(stream)); });
  }

  bool cancel() const {
    return engine_.without_gil([&] {
      const bool cancelled = engine_->cancel(ticket_);
      if (cancelled) {
        for (const auto& payload : payloads_) engine_->drop(payload);
      }
      return cancelled;
    });
  }

  bool is_cancelled() const { return ticket_->is_cancelled(); }

  const std::shared_ptr<TransferTicket>& ticket() const { return ticket_; }

 private:
  const EngineReference engine_;
  std::shared_ptr<TransferTicket> ticket_;
  std::vector<std::shared_ptr<Payload>> payloads_;  // Of a put.
};

// Address, bytes, owner.
using Range = std::tuple<uintptr_t, size_t, py::object>;
// The same and the next use.
using Source = std::tuple<uintptr_t, size_t, py::object, std::optional<uint64_t>>;
// The device's range, and the address and owner on the host.
using HostPair = std::tuple<uintptr_t, size_t, py::object, uintptr_t, py::object>;

class PythonTransferEngine {
 public:
  PythonTransferEngine(std::shared_ptr<HostPool> pool, py::object disk, int device,
                       std::optional<size_t> host_bytes_max, size_t staging_bytes,
                       size_t chunk_bytes, size_t leaving_bytes_max, size_t prefetch_bytes)
      : disk_(std::move(disk)),
        engine_(make(std::move(pool), disk_.is_none() ? nullptr : disk_.cast<DiskStore*>(),
                     {device, host_bytes_max.value_or(SIZE_MAX), staging_bytes, chunk_bytes,
                      leaving_bytes_max, prefetch_bytes})) {}
  ~PythonTransferEngine() {
    if (!in_forked_child()) close();
  }
  PythonTransferEngine(const PythonTransferEngine&) = delete;
  PythonTransferEngine& operator=(const PythonTransferEngine&) = delete;

  py::tuple put(const std::vector<Source>& given, uintptr_t stream) const {
    std::vector<PutSource> sources;
    sources.reserve(given.size());
    for (const auto& [address, size_bytes, owner, next_use] : given) {
      sources.push_back(
          {{address, size_bytes, owner_of(owner)}, next_use.value_or(Payload::kNoUse)});
    }
    TransferEngine::PutResult result =
        engine_.without_gil([&] { return engine_->put(std::move(sources), stream_of(stream)); });
    py::list payloads;
    for (const auto& payload : result.payloads)
      payloads.append(std::make_unique<PythonPayload>(engine_, payload));
    return py::make_tuple(std::move(payloads),
                          std::make_unique<PythonTransferTicket>(engine_, std::move(result.ticket),
                                                                 std::move(result.payloads)));
  }

  std::unique_ptr<PythonTransferTicket> fetch(
      const std::vector<std::pair<PythonPayload*, Range>>& wanted, uintptr_t stream,
      int priority) const {
    std::vector<FetchTarget> targets;
    for (const auto& [payload, range] : wanted) {
      if (payload == nullptr) throw ConfigError("a payload is needed, not None");
      const auto& [address, size_bytes, owner] = range;
      targets.push_back({payload->payload(), {address, size_bytes, owner_of(owner)}});
    }
    return std::make_unique<PythonTransferTicket>(engine_, engine_.without_gil([&] {
      return engine_->fetch(targets, stream_of(stream), priority);
    }));
  }

  std::unique_ptr<PythonTransferTicket> copy(const std::vector<HostPair>& pairs, bool is_out,
                                             uintptr_t stream) const {
    std::vector<PinnedCopy> copies;
    copies.reserve(pairs.size());
    for (const auto& [address, size_bytes, owner, host, host_owner] : pairs) {
      copies.push_back({{address, size_bytes, owner_of(owner)},
                        reinterpret_cast<void*>(host),
                        owner_of(host_owner)});
    }
    return std::make_unique<PythonTransferTicket>(engine_, engine_.without_gil([&] {
      return engine_->copy(std::move(copies), direction_of(is_out), stream_of(stream));
    }));
  }

  void set_next_use(const PythonPayload& payload, std::optional<uint64_t> next_use) const {
    engine_->set_next_use(payload.payload(), next_use.value_or(Payload::kNoUse));
  }
  void advance(uint64_t position) const {
    engine_.without_gil([&] { engine_->advance(position); });
  }
  uint64_t position() const { return engine_->position(); }
  size_t collect(size_t wanted_bytes) const {
    return engine_.without_gil([&] { return engine_->collect(wanted_bytes); });
  }
  void synchronize() const {
    engine_.without_gil([&] { engine_->synchronize(); });
  }
  void close() const {
    engine_.without_gil([&] { engine_->close(); });
  }
  size_t leaving_bytes() const { return engine_->leaving_bytes(); }
  py::dict stats() const;

 private:
  static EngineReference make(std::shared_ptr<HostPool> pool, DiskStore* disk,
                              const TransferOptions& options) {
    const GilRelease released;
    return EngineReference(TransferEngine::create(options, std::move(pool), disk));
  }

  const py::object disk_;
  const EngineReference engine_;
};

py::dict PythonTransferEngine::stats() const {
  const TransferStats stats = engine_.without_gil([&] { return engine_->stats(); });
  const TransferCounters& counters = stats.counters;
  py::dict result;
  result["out_bytes"] = counters.out_bytes.load();
  result["in_bytes"] = counters.in_bytes.load();
  result["out_transfers"] = counters.out_transfers.load();
  result["in_transfers"] = counters.in_transfers.load();
  result["written_bytes"] = counters.written_bytes.load();
  result["read_bytes"] = counters.read_bytes.load();
  result["prefetched_bytes"] = counters.prefetched_bytes.load();
  result["evicted_bytes"] = counters.evicted_bytes.load();
  result["host_hits"] = counters.host_hits.load();
  result["host_misses"] = counters.host_misses.load();
  result["disk_errors"] = counters.disk_errors.load();
  result["host_bytes"] = stats.host_bytes;
  result["host_bytes_max"] = stats.host_bytes_peak;
  result["dirty_bytes"] = stats.dirty_bytes;
  result["leaving_bytes"] = stats.leaving_bytes;
  result["writing_bytes"] = stats.writing_bytes;
  result["reading_bytes"] = stats.reading_bytes;
  result["waiting_pieces"] = stats.waiting_pieces;
  result["copies_out"] = stats.copies_out;
  result["copies_in"] = stats.copies_in;
  const char* const causes[kStallCauses] = {"host_budget", "disk", "copy"};
  py::dict count;
  py::dict time;
  for (size_t i = 0; i < kStallCauses; ++i) {
    count[causes[i]] = counters.stalls[i].load();
    time[causes[i]] = counters.stall_ns[i].load();
  }
  result["stalls"] = count;
  result["stall_ns"] = time;
  return result;
}

// The state machine by itself, for its tests.
void register_residency(py::module_& module) {
  py::class_<Residency>(module, "_Residency")
      .def(py::init())
      .def("begin_leaving", &Residency::begin_leaving)
      .def("has_left", &Residency::has_left)
      .def("leaving_failed", &Residency::leaving_failed)
      .def("begin_writing", &Residency::begin_writing)
      .def("has_written", &Residency::has_written)
      .def("writing_failed", &Residency::writing_failed)
      .def("begin_reading", &Residency::begin_reading)
      .def("has_read", &Residency::has_read)
      .def("reading_failed", &Residency::reading_failed)
      .def("add_reader", &Residency::add_reader)
      .def("remove_reader", &Residency::remove_reader)
      .def("evict", &Residency::evict)
      .def("drop", &Residency::drop)
      .def_property_readonly("can_evict", &Residency::can_evict)
      .def_property_readonly("is_over", &Residency::is_over)
      .def_property_readonly("is_at_hand", &Residency::is_at_hand)
      .def_property_readonly("is_dirty", &Residency::is_dirty)
      .def_property_readonly("is_on_disk_only", &Residency::is_on_disk_only)
      .def_property_readonly("is_valid", &Residency::is_valid)
      .def_property_readonly("name", &Residency::name);
}

// The streams, which live as long as the process; the pool need not ask whether they do.
CopyStreams& copy_streams_of(int device) {
  CopyStreams& streams = CopyStreams::of(device);
  keep_stream(device, streams.out().handle());
  keep_stream(device, streams.in().handle());
  return streams;
}

void register_copy_streams(py::module_& module) {
  py::class_<CopyStreams, std::unique_ptr<CopyStreams, py::nodelete>>(
      module, "CopyStreams", "The copy-out and the copy-in stream of a device.")
      .def(py::init([](int device) {
             const GilRelease released;
             return std::unique_ptr<CopyStreams, py::nodelete>(&copy_streams_of(device));
           }),
           py::arg("device"))
      .def(
          "handle",
          [](const CopyStreams& streams, bool is_out) {
            return reinterpret_cast<uintptr_t>(streams.stream(direction_of(is_out)).handle());
          },
          py::kw_only(), py::arg("is_out"))
      .def(
          "count",
          [](CopyStreams& streams, size_t size_bytes, bool is_out) {
            streams.count(direction_of(is_out), size_bytes);
          },
          py::arg("size_bytes"), py::kw_only(), py::arg("is_out"))
      .def(
          "counts",
          [](const CopyStreams& streams, bool is_out) {
            const CopyCounts counts = streams.counts(direction_of(is_out));
            return std::pair(counts.copies, counts.bytes);
          },
          py::kw_only(), py::arg("is_out"));
}

}  // namespace

WriteGate gate_for_transfer(const py::object& after) {
  // Python's class has it as its first attribute.
  const py::object inner = py::getattr(after, "_ticket", after);
  if (!py::isinstance<PythonTransferTicket>(inner)) return nullptr;
  return [ticket = inner.cast<const PythonTransferTicket&>().ticket()] { ticket->wait_detached(); };
}

void register_transfer(py::module_& module) {
  register_residency(module);
  register_copy_streams(module);
  py::class_<PythonPayload>(module, "Payload", "Bytes that a TransferEngine keeps.")
      .def_property_readonly("size_bytes", &PythonPayload::size_bytes)
      .def_property_readonly("state", &PythonPayload::state)
      .def("drop", &PythonPayload::drop);
  py::class_<PythonTransferTicket>(module, "TransferTicket", "Completion of a transfer.")
      .def("done", &PythonTransferTicket::is_done)
      .def("wait", &PythonTransferTicket::wait)
      .def("_stream_wait", &PythonTransferTicket::stream_wait, py::arg("stream"))
      .def("cancel", &PythonTransferTicket::cancel)
      .def_property_readonly("is_cancelled", &PythonTransferTicket::is_cancelled);
  py::class_<PythonTransferEngine>(module, "TransferEngine",
                                   "Moves payloads between a device, pinned memory and disks.")
      .def(py::init<std::shared_ptr<HostPool>, py::object, int, std::optional<size_t>, size_t,
                    size_t, size_t, size_t>(),
           py::arg("pool"), py::arg("disk"), py::kw_only(), py::arg("device"),
           py::arg("host_bytes_max"), py::arg("staging_bytes"), py::arg("chunk_bytes"),
           py::arg("leaving_bytes_max"), py::arg("prefetch_bytes"))
      .def("_put", &PythonTransferEngine::put, py::arg("sources"), py::arg("stream"))
      .def("_fetch", &PythonTransferEngine::fetch, py::arg("targets"), py::arg("stream"),
           py::arg("priority"))
      .def("_copy", &PythonTransferEngine::copy, py::arg("pairs"), py::arg("is_out"),
           py::arg("stream"))
      .def("_set_next_use", &PythonTransferEngine::set_next_use, py::arg("payload"),
           py::arg("next_use"))
      .def("advance", &PythonTransferEngine::advance, py::arg("position"))
      .def_property_readonly("position", &PythonTransferEngine::position)
      .def_property_readonly("_leaving_bytes", &PythonTransferEngine::leaving_bytes)
      .def(
          "collect",
          [](const PythonTransferEngine& engine, bool wait) {
            return engine.collect(wait ? SIZE_MAX : 0);
          },
          py::kw_only(), py::arg("wait") = false)
      .def("_collect_bytes", &PythonTransferEngine::collect, py::arg("wanted_bytes"))
      .def("synchronize", &PythonTransferEngine::synchronize)
      .def("close", &PythonTransferEngine::close)
      .def("_stats", &PythonTransferEngine::stats);
}

}  // namespace spillover
