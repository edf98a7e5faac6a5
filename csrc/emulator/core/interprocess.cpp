#include "emulator/core/interprocess.hpp"

#include <unistd.h>

#include <cstring>
#include <utility>

#include "emulator/core/lifetimes.hpp"

namespace spillover::emulator {
namespace {

constexpr std::uint64_t kMemoryMagic = 0x6d65'6d6f'7279'5301;
constexpr std::uint64_t kEventMagic = 0x6576'656e'7473'5301;

struct MemoryHandle {
  std::uint64_t magic;
  ProcessFile file;
  std::uint64_t size_bytes;
  std::int32_t device;
};

struct EventHandle {
  std::uint64_t magic;
  SharedMark::Handle mark;
};

// CUDA's handles are 64 bytes whose meaning is the driver's own.
template <typename Ours, typename Cuda>
void encode(const Ours& ours, Cuda* handle) {
  static_assert(sizeof(Ours) <= sizeof(Cuda));
  std::memset(handle, 0, sizeof *handle);
  std::memcpy(handle, &ours, sizeof ours);
}

template <typename Ours, typename Cuda>
Ours decode(const Cuda& handle) {
  Ours ours{};
  std::memcpy(&ours, &handle, sizeof ours);
  return ours;
}

// CUDA's word for a handle of the process itself.
constexpr CUresult kOwnHandle = CUDA_ERROR_INVALID_CONTEXT;

}  // namespace

CUresult export_memory(Machine& machine, Address address, CUipcMemHandle* handle) {
  Allocation* allocation = machine.device_memory.find(address);
  if (allocation == nullptr || allocation->managed_by_pool() || allocation->is_imported()) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const CUresult shared = machine.device_memory.share(allocation);
  if (shared != CUDA_SUCCESS) return shared;
  encode(MemoryHandle{kMemoryMagic, describe_file(allocation->file), allocation->size_bytes,
                      allocation->device},
         handle);
  return CUDA_SUCCESS;
}

CUresult open_memory(Machine& machine, Context& context, const CUipcMemHandle& handle,
                     Address* address) {
  const auto memory = decode<MemoryHandle>(handle);
  if (memory.magic != kMemoryMagic) return CUDA_ERROR_INVALID_HANDLE;
  if (memory.file.process == getpid()) return kOwnHandle;
  if (memory.device >= machine.device_count()) return CUDA_ERROR_INVALID_DEVICE;
  // Opening a handle of a neighbour's memory enables peer access, as the call's only flag says.
  if (memory.device != context.device) context.enabled_peers |= 1U << memory.device;
  if (Allocation* known = machine.device_memory.find_imported(memory.file)) {
    ++known->open_count;
    *address = known->address;
    return CUDA_SUCCESS;
  }
  const int file = open_process_file(memory.file);
  if (file < 0) return CUDA_ERROR_INVALID_HANDLE;
  const CUresult result =
      machine.device_memory.import(file, memory.file, memory.size_bytes, memory.device, address);
  if (result != CUDA_SUCCESS) {
    close(file);
    return result;
  }
  machine.begin_memory(*address, memory.size_bytes);
  machine.note_foreign_writes("cuIpcOpenMemHandle", *address, memory.size_bytes);
  return CUDA_SUCCESS;
}

CUresult close_memory(Machine& machine, Lock& lock, Address address) {
  Allocation* allocation = machine.device_memory.find(address);
  if (allocation == nullptr || allocation->address != address || !allocation->is_imported()) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (allocation->open_count > 1) {
    --allocation->open_count;
    return CUDA_SUCCESS;
  }
  return release_imported_memory(machine, lock, address);
}

CUresult export_event(const Event& event, CUipcEventHandle* handle) {
  if (event.mark == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  encode(EventHandle{kEventMagic, event.mark->handle()}, handle);
  return CUDA_SUCCESS;
}

CUresult open_event(Machine& machine, Context& context, const CUipcEventHandle& handle,
                    CUevent* event) {
  const auto shared = decode<EventHandle>(handle);
  if (shared.magic != kEventMagic) return CUDA_ERROR_INVALID_HANDLE;
  if (shared.mark.file.process == getpid()) return kOwnHandle;
  std::shared_ptr<SharedMark> mark;
  const CUresult opened = SharedMark::open(shared.mark, &mark);
  if (opened == CUDA_SUCCESS) *event = machine.events.import(&context, std::move(mark));
  return opened;
}

}  // namespace spillover::emulator
