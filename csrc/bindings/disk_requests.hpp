// What the bindings of both kinds of disk store share: tickets and registrations that hold Python's
// memory. PRIVATE to bindings/.
//
// Note [Memory of a pending request]. The I/O threads know nothing of Python, so a Ticket holds the
// buffer of its request and, when it is dropped early, waits for the request without the GIL before
// it lets the buffer go.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "bindings/bindings.hpp"
#include "tiers/disk_store.hpp"
#include "tiers/ticket.hpp"

namespace spillover {

// Throws ConfigError for memory that is not contiguous.
pybind11::buffer_info contiguous_memory(const pybind11::buffer& buffer, bool writable);
size_t size_of(const pybind11::buffer_info& info);

// after is a torch.cuda.Event, a ticket of a transfer engine's or None. The request's ticket holds
// it, so it outlives the gate. Throws ConfigError for anything else.
WriteGate gate_for(const pybind11::object& after);
// Of a ticket of a transfer engine's, a null one for anything else.
WriteGate gate_for_transfer(const pybind11::object& after);

// Throws ConfigError for a name that there is not.
DiskEngineKind engine_named(const std::string& name);
const char* name_of(DiskEngineKind engine);

// Every method is called with the GIL held.
class PythonTicket {
 public:
  // Made before the request starts: what follows the start must not fail, as the I/O threads have
  // the memory by then.
  PythonTicket(pybind11::buffer_info&& memory, pybind11::object gate_event)
      : memory_(std::make_unique<pybind11::buffer_info>(std::move(memory))),
        gate_event_(std::move(gate_event)) {}
  PythonTicket(const PythonTicket&) = delete;
  PythonTicket& operator=(const PythonTicket&) = delete;

  void* address() const { return memory_->ptr; }
  void started(std::shared_ptr<Ticket> ticket) noexcept { ticket_ = std::move(ticket); }

  ~PythonTicket() {
    if (ticket_ == nullptr) return;  // The request did not start.
    const GilRelease released;
    ticket_->wait_quietly();
  }

  bool is_done() {
    const bool done = ticket_->is_done();
    if (done) let_go();
    return done;
  }

  void wait() {
    {
      const GilRelease released;
      ticket_->wait_quietly();
    }
    let_go();
    ticket_->wait();
  }

 private:
  void let_go() {
    memory_.reset();
    gate_event_ = pybind11::none();
  }

  std::shared_ptr<Ticket> ticket_;
  std::unique_ptr<pybind11::buffer_info> memory_;
  pybind11::object gate_event_;
};

// Memory that a store's engines have prepared; holds both until it is removed. Every method is
// called with the GIL held.
class MemoryRegistration {
 public:
  // Of a store, which it holds.
  template <class Store>
  static std::unique_ptr<MemoryRegistration> make(pybind11::object store,
                                                  const pybind11::buffer& buffer) {
    auto& of = store.cast<Store&>();
    std::unique_ptr<MemoryRegistration> made(new MemoryRegistration(std::move(store), buffer));
    made->unregister_ = [&of](void* address) { of.unregister_memory(address); };
    void* const address = made->memory_->ptr;
    const size_t size_bytes = size_of(*made->memory_);
    const GilRelease released;
    try {
      made->registered_bytes_ = of.register_memory(address, size_bytes);
    } catch (...) {
      made->unregister_ = nullptr;
      throw;
    }
    return made;
  }
  MemoryRegistration(const MemoryRegistration&) = delete;
  MemoryRegistration& operator=(const MemoryRegistration&) = delete;
  ~MemoryRegistration() { remove(); }

  size_t registered_bytes() const { return registered_bytes_; }

  void remove() {
    if (memory_ == nullptr) return;
    const std::unique_ptr<pybind11::buffer_info> memory = std::move(memory_);
    registered_bytes_ = 0;
    if (!unregister_) return;
    const GilRelease released;
    unregister_(memory->ptr);
  }

 private:
  MemoryRegistration(pybind11::object store, const pybind11::buffer& buffer)
      : store_(std::move(store)),
        memory_(std::make_unique<pybind11::buffer_info>(contiguous_memory(buffer, true))) {}

  pybind11::object store_;
  std::function<void(void*)> unregister_;  // Of the store; empty before memory was registered.
  std::unique_ptr<pybind11::buffer_info> memory_;
  size_t registered_bytes_ = 0;
};

}  // namespace spillover
