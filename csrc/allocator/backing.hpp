// The device memory that one pool holds from the driver.
//
// Where the device has virtual memory, that is physical *chunks* of 2 MiB, or 32 MiB in
// very large blocks.
// A chunk is mapped at an address of the pool's choice or kept in a cache without an address:
// making a chunk costs several times what mapping one costs, so an unmapped chunk is not given back
// at once. Where the device has none, a chunk is what cuMemAlloc gives, at a fixed address. On
// either kind of device a chunk may come from an *upstream* (upstream.hpp), at a fixed address,
// too.
//
//   held = mapped + detached + cached;  with fixed addresses detached = cached = asleep = 0;
//   reserved addresses = gaps + mapped - upstreams' + detached + asleep + lost (where an unmapping
//   failed).
// Chunks do not overlap, and their sizes are multiples of the unit.
//
// Note [Chunks that sleep]. A chunk at an address may be without memory (*asleep*), or have memory
// that is not mapped there (*detached*), which keeps what is in it: so a sleep that fails is undone
// without a copy. Chunks that sleep are of one unit each; the memory that they get at last may be
// divided in another way. An unmapping that the driver reports as failed may have done its work:
// the chunk is *doubtful*, and is unmapped once more before anything is mapped there.
//
// Owned by one Pool and guarded by its mutex, under which it calls the driver. Unmapping is not
// ordered with streams: the caller knows that the work on what it takes away is complete.
#pragma once

#include <cstddef>
#include <map>
#include <optional>
#include <vector>

#include "allocator/address_space.hpp"
#include "allocator/settings.hpp"
#include "allocator/shared_memory.hpp"
#include "allocator/upstream.hpp"
#include "base/file_descriptor.hpp"
#include "driver/device_memory.hpp"
#include "driver/virtual_memory.hpp"
#include "trace/tracks.hpp"

namespace spillover {

struct AddressRange {
  DeviceAddress begin = 0;
  DeviceAddress end = 0;

  size_t size_bytes() const { return end - begin; }
};

class Backing {
 public:
  // Throws ConfigError where virtual memory is asked for and the device has none.
  Backing(int device, VirtualMemory virtual_memory);

  bool is_virtual() const { return is_virtual_; }
  // Sizes and addresses of chunks are multiples of this.
  size_t unit_bytes() const { return unit_bytes_; }
  size_t mapped_bytes() const { return mapped_bytes_; }
  size_t cached_bytes() const { return cached_bytes_; }
  // Chunks that keep their addresses without being mapped.
  size_t detached_bytes() const { return detached_bytes_; }
  size_t asleep_bytes() const { return asleep_bytes_; }
  size_t held_bytes() const { return mapped_bytes_ + detached_bytes_ + cached_bytes_; }
  // What of the mapped chunks came from upstreams.
  size_t upstream_bytes() const { return upstream_bytes_; }

  // Addresses for size_bytes that nothing is mapped at.
  DeviceAddress find_gap(const void* owner, size_t size_bytes);
  size_t gap_at(DeviceAddress address) const { return space_.gap_at(address); }

  // Maps size_bytes, a multiple of the unit, at the start of a gap: cached chunks first, then new
  // ones of together at most created_bytes_max. Where only a somewhat larger chunk is cached, and
  // the gap has room, it maps more. Gives what is mapped, empty where memory does not suffice.
  // Throws DriverError. A failure leaves chunks that were made in the cache, everything else as it
  // was.
  std::optional<AddressRange> map(DeviceAddress address, size_t size_bytes,
                                  size_t created_bytes_max);

  // One chunk at a fixed address; empty when the device has not that much left.
  std::optional<AddressRange> allocate(size_t size_bytes);

  // A chunk of an upstream's memory, whose size is a multiple of the unit.
  AddressRange take_over(UpstreamMemory memory);

  // Whether a chunk starts at the address.
  bool is_mapped(DeviceAddress address) const { return mapped_.count(address) != 0; }
  // Whether that chunk came from an upstream.
  bool is_from_upstream(DeviceAddress address) const {
    return mapped_.at(address).upstream.has_value();
  }

  // The chunks that lie wholly within a mapped range: they are neighbours. Empty where there are
  // none.
  AddressRange chunks_within(const AddressRange& range) const;
  // The first of those chunks, as few as have size_bytes together.
  AddressRange first_chunks(const AddressRange& chunks, size_t size_bytes) const;

  // Takes whole chunks away from their addresses: into the cache, or where addresses are fixed, to
  // what take_released() or take_returned() gives. Throws DriverError: while the driver could not
  // be asked nothing has changed, and after a call that failed the memory is held no longer and its
  // addresses are never used again.
  void unmap(const AddressRange& chunks);

  // Fixed chunks that are held no longer. The caller gives them to the driver without the mutex:
  // cuMemFree waits for all of the device's work.
  std::vector<DeviceMemory> take_released();

  // The same of upstreams' chunks.
  std::vector<UpstreamMemory> take_returned();

  // Gives cached chunks to the driver, at least size_bytes together where there are as many, and
  // unused reservations. Throws the first DriverError when all of them had their turn.
  void release_cached(size_t size_bytes);

  // Lets another device use this one's memory, what is mapped now and later. Throws DriverError,
  // and then may be called again.
  void add_peer(int device);
  // The devices that may use the memory; this one first.
  const std::vector<int>& devices() const { return devices_; }

  // The chunks that a mapped range touches, for other processes (Note [Shared memory]). Throws
  // StateError where the driver has no way to share them, DriverError.
  SharedBlock share(const AddressRange& range);
  // Closes the files of the chunks that touch none of the ranges, which are by address.
  void close_files(const std::vector<AddressRange>& kept);
  // How many chunks have files.
  size_t file_count() const { return file_count_; }

  // For Note [Chunks that sleep]; ranges are of whole chunks, and only with virtual memory.
  // Unmaps chunks, which keep their memory. Throws DriverError: they are detached all the same, or
  // where the driver could not be asked as they were.
  void detach(const AddressRange& chunks);
  // Maps what is detached in the range. Throws DriverError: all of that is detached still.
  void attach(const AddressRange& range);
  // The memory of detached chunks, which sleep from now on; it is held no longer.
  std::vector<PhysicalMemory> take_detached(const AddressRange& chunks);
  // Memory for chunks that sleep: cached first, then new of together at most created_bytes_max.
  // False where that does not suffice. Throws DriverError. Either way they sleep on then.
  bool provide(const AddressRange& chunks, size_t created_bytes_max);
  // Undoes provide().
  void withdraw(const AddressRange& chunks) noexcept;
  // Gives up the addresses of chunks that sleep.
  void forget(const AddressRange& chunks);
  // The chunks of a range one by one, in whichever state, and what of it sleeps.
  std::vector<AddressRange> chunks_in(const AddressRange& range) const;
  size_t asleep_bytes_in(const AddressRange& range) const;

  // O(chunks). Throws StateError that says which equation does not hold.
  void check_invariants() const;

 private:
  struct Chunk {
    size_t size_bytes;
    std::optional<PhysicalMemory> physical;
    std::optional<DeviceMemory> fixed;
    std::optional<UpstreamMemory> upstream;
    FileDescriptor file;    // Open while the chunk is shared.
    uint64_t identity = 0;  // Of the file.
    bool is_mapped = true;
    bool is_doubtful = false;
  };
  using Chunks = std::map<DeviceAddress, Chunk>;

  SharedBlock share_upstream(const AddressRange& range) const;
  std::optional<PhysicalMemory> create(size_t size_bytes);
  void close_file(Chunk& chunk);
  std::optional<PhysicalMemory> take_cached(size_t size_bytes_max);
  std::optional<PhysicalMemory> take_cached_larger(size_t size_bytes, size_t size_bytes_max);
  void cache(PhysicalMemory memory);
  bool gather(size_t size_bytes, size_t room_bytes, size_t created_bytes_max, size_t growth_bytes,
              std::vector<PhysicalMemory>& chunks);
  void map_provided(const AddressRange& range, std::vector<PhysicalMemory>& chunks);
  void make_asleep(const AddressRange& range, bool is_doubtful);
  void set_doubtful(const AddressRange& range, bool is_doubtful);
  void clear_doubts(const AddressRange& range);
  void map_chunks(DeviceAddress address, std::vector<PhysicalMemory>& chunks, size_t size_bytes);
  void trace_mapped() noexcept;

  const int device_;
  const bool is_virtual_;
  const size_t unit_bytes_;
  PhysicalMemory::Sharing sharing_;
  AddressSpace space_;
  Chunks mapped_;  // By first address, those too that are not mapped now.
  std::map<size_t, std::vector<PhysicalMemory>> cached_;  // By size; no list is empty.
  std::vector<DeviceMemory> released_;
  std::vector<UpstreamMemory> returned_;
  std::vector<int> devices_;  // That may use the memory; this one first.
  LazyTrack track_;           // Of mapped_bytes_.
  size_t mapped_bytes_ = 0;
  size_t cached_bytes_ = 0;
  size_t detached_bytes_ = 0;
  size_t asleep_bytes_ = 0;
  size_t upstream_bytes_ = 0;  // Of what is mapped.
  size_t file_count_ = 0;
};

}  // namespace spillover
