#include "emulator/core/address_space.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "emulator/core/config.hpp"
#include "emulator/core/process_file.hpp"
#include "emulator/core/writer_pause.hpp"

namespace spillover::emulator {
namespace {

constexpr std::size_t kArenaBytesMax = std::size_t{4} << 40;
constexpr std::size_t kArenaBytesMin = std::size_t{16} << 30;
constexpr std::size_t kPoisonFileBytes = std::size_t{32} << 20;

// From this size on, fresh memory shows the poison file and costs only what is written to. Below
// it, huge pages that are filled at once are cheaper than many small page faults.
constexpr std::size_t kPoisonFileUseBytes = std::size_t{64} << 20;

void* at(Address address) {
  return reinterpret_cast<void*>(address);
}

// An unmapped span aligned to the granularity, or 0.
Address reserve(std::size_t size_bytes) {
  void* start = mmap(nullptr, size_bytes + kGranularityBytes, PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) return 0;
  return round_up(reinterpret_cast<Address>(start), kGranularityBytes);
}

struct Arenas {
  Address base;
  Address shadow;
  std::size_t size_bytes;
};

// Both arenas, as large as this process may have them: a limit on address space (ulimit -v) is
// common in batch systems.
const Arenas& arenas() {
  static const Arenas found = [] {
    for (std::size_t size = kArenaBytesMax; size >= kArenaBytesMin; size /= 2) {
      const Address base = reserve(size);
      if (base == 0) continue;
      const Address shadow = reserve(size);
      if (shadow != 0) return Arenas{base, shadow, size};
      munmap(at(base), size);
    }
    report("cannot reserve 2 x %zu GiB of address space; raise the limit (ulimit -v).",
           kArenaBytesMin >> 30);
    std::abort();
  }();
  return found;
}

}  // namespace

AddressSpace::AddressSpace()
    : base_(arenas().base),
      size_bytes_(arenas().size_bytes),
      shadow_offset_(arenas().shadow - arenas().base),
      ranges_(arenas().base, arenas().size_bytes) {}

std::optional<Address> AddressSpace::take(std::size_t size_bytes, std::size_t alignment,
                                          Address hint) {
  if (hint != 0 && hint % alignment == 0 && ranges_.take_at(hint, size_bytes)) return hint;
  return ranges_.take(size_bytes, alignment);
}

int AddressSpace::poison_file() {
  if (poison_file_ != -2) return poison_file_;
  poison_file_ = memfd_create("spillover-emulator-poison", MFD_CLOEXEC);
  if (poison_file_ < 0) return poison_file_ = -1;
  const std::vector<unsigned char> bytes(kPoisonFileBytes, 0xFF);
  std::size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t written = write(poison_file_, bytes.data() + done, bytes.size() - done);
    if (written <= 0) {
      close(poison_file_);
      return poison_file_ = -1;
    }
    done += static_cast<std::size_t>(written);
  }
  return poison_file_;
}

bool AddressSpace::map_fresh(Address address, std::size_t size_bytes, FreshMemory kind) {
  const bool poison = kind == FreshMemory::kPoisoned;
  const Address shadow = to_host(address);
  constexpr int kAccess = PROT_READ | PROT_WRITE;
  if (poison && size_bytes >= kPoisonFileUseBytes && poison_file() >= 0) {
    for (std::size_t offset = 0; offset < size_bytes; offset += kPoisonFileBytes) {
      const std::size_t part = std::min(kPoisonFileBytes, size_bytes - offset);
      if (mmap(at(shadow + offset), part, kAccess, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE,
               poison_file(), 0) == MAP_FAILED) {
        unmap(address, size_bytes);
        return false;
      }
    }
    return true;
  }
  if (mmap(at(shadow), size_bytes, kAccess, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE,
           -1, 0) == MAP_FAILED) {
    return false;
  }
  if (kind == FreshMemory::kPhantom) return true;
  // Page faults dominate a fresh allocation's cost; without huge pages it is slower, not wrong.
  if (size_bytes >= kGranularityBytes) madvise(at(shadow), size_bytes, MADV_HUGEPAGE);
  if (poison) std::memset(at(shadow), 0xFF, size_bytes);
  return true;
}

bool AddressSpace::map_file(Address address, std::size_t size_bytes, int file,
                            std::size_t offset_bytes, int protection) {
  return mmap(at(to_host(address)), size_bytes, protection, MAP_SHARED | MAP_FIXED, file,
              static_cast<off_t>(offset_bytes)) != MAP_FAILED;
}

int AddressSpace::move_to_file(Address address, std::size_t size_bytes) {
  const int file = open_memory_file("spillover-emulator-shared", size_bytes);
  if (file < 0) return -1;
  const Address shadow = to_host(address);
  const WriterPause pause(shadow, size_bytes);
  bool moved = protect(address, size_bytes, PROT_READ);
  std::size_t done = 0;
  while (moved && done < size_bytes) {
    const ssize_t written =
        pwrite(file, at(shadow + done), size_bytes - done, static_cast<off_t>(done));
    moved = written > 0;
    if (moved) done += static_cast<std::size_t>(written);
  }
  moved = moved && mmap(at(shadow), size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                        file, 0) != MAP_FAILED;
  if (moved) return file;
  protect(address, size_bytes, PROT_READ | PROT_WRITE);
  close(file);
  return -1;
}

bool AddressSpace::protect(Address address, std::size_t size_bytes, int protection) {
  return mprotect(at(to_host(address)), size_bytes, protection) == 0;
}

void AddressSpace::unmap(Address address, std::size_t size_bytes) {
  // A fixed mapping of nothing, not munmap: the arena must stay ours.
  if (mmap(at(to_host(address)), size_bytes, PROT_NONE,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == MAP_FAILED) {
    report("cannot unmap %zu bytes of emulated device memory: %s", size_bytes,
           std::strerror(errno));
    std::abort();
  }
}

}  // namespace spillover::emulator
