// Device addresses for mappings: reservations, and the gaps in them that nothing is mapped into.
//
// Addresses cost nothing but driver calls, physical memory is what is scarce. So each heap gets a
// reservation as large as the device, in which it can grow without meeting another heap, and a
// reservation in which nothing is mapped any more goes to the next heap that needs one.
//
// A guard at the end of each, which nothing is mapped at, keeps two reservations apart that the
// driver gives side by side: a range of mapped addresses lies in one, and is unmapped by one call.
//
// Addresses at which an unmapping failed are *lost*: nobody knows what is mapped there. They would
// be a hole for ever, so a reservation that has nothing else in use is abandoned, and its heap
// begins anew in a whole one.
//
// Between calls: gaps of one reservation do not touch, and with the mapped and lost ranges they
// cover it.
// Owned by one Backing and guarded by the pool's mutex, under which it calls the driver.
#pragma once

#include <cstddef>
#include <map>
#include <vector>

#include "driver/virtual_memory.hpp"

namespace spillover {

class AddressSpace {
 public:
  AddressSpace(int device, size_t reservation_bytes, size_t guard_bytes)
      : device_(device), reservation_bytes_(reservation_bytes), guard_bytes_(guard_bytes) {}

  // Start of a gap of at least size_bytes in one of the owner's reservations, the smallest such; in
  // a new one where there is none. Takes nothing yet. Throws DriverError.
  DeviceAddress find(const void* owner, size_t size_bytes);

  // Bytes of the gap that starts at the address; 0 where there is none.
  size_t gap_at(DeviceAddress address) const;

  // Takes the first size_bytes of the gap that starts at the address, and gives a range back.
  void take(DeviceAddress address, size_t size_bytes);
  void give(DeviceAddress address, size_t size_bytes);

  // Gives up a range that was taken.
  void lose(DeviceAddress address, size_t size_bytes);

  // Gives the reservations without a mapping back to the driver, but for those with lost addresses,
  // which are abandoned.
  void release_unused();

  struct Sums {
    size_t reserved_bytes = 0;
    size_t gap_bytes = 0;
    size_t lost_bytes = 0;
  };
  // Of the reservations that are not abandoned. O(gaps). Throws StateError that says which equation
  // does not hold.
  Sums check_invariants() const;
  bool is_free_of_gaps(DeviceAddress address, size_t size_bytes) const;

 private:
  struct Reservation {
    AddressReservation range;  // With the guard.
    size_t size_bytes;         // Without it.
    const void* owner;
    size_t lost_bytes = 0;

    DeviceAddress end() const { return range.address() + size_bytes; }
  };
  using Reservations = std::map<DeviceAddress, Reservation>;

  Reservations::const_iterator reservation_of(DeviceAddress address) const;
  bool is_unused(const Reservation& reservation) const;
  void abandon_lost();
  DeviceAddress reserve(const void* owner, size_t size_bytes);

  const int device_;
  const size_t reservation_bytes_;
  const size_t guard_bytes_;
  Reservations reservations_;             // By first address.
  std::map<DeviceAddress, size_t> gaps_;  // Address to size.
  std::vector<AddressReservation> abandoned_;
};

}  // namespace spillover
