#include "allocator/c_api.h"

#include <algorithm>
#include <array>
#include <exception>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "allocator/arenas.hpp"
#include "allocator/content_store.hpp"
#include "allocator/imports.hpp"
#include "allocator/out_of_memory.hpp"
#include "allocator/pending_uses.hpp"
#include "allocator/pools.hpp"
#include "allocator/size_rounding.hpp"
#include "base/error.hpp"
#include "driver/fork_guard.hpp"

namespace {

thread_local std::string t_last_error;

struct LastOutOfMemory {
  spillover_out_of_memory_t figures{};
  std::string details;
  std::string text;
  bool is_last = false;  // No other failure came after it.
};
thread_local LastOutOfMemory t_out_of_memory;

spillover_status fail(spillover_status status, const char* message) noexcept {
  t_out_of_memory.is_last = false;
  try {
    t_last_error = message;
  } catch (const std::exception&) {
    t_last_error.clear();  // Not even the message could be stored.
  }
  return status;
}

void keep_report(const spillover::OutOfMemoryReport& report) noexcept {
  LastOutOfMemory& kept = t_out_of_memory;
  try {
    kept.details = spillover::describe_details(report);
    kept.text = spillover::describe_for_torch(report);
  } catch (const std::exception&) {
    kept.details.clear();
    kept.text = "CUDA out of memory.";
  }
  kept.figures = {report.requested_bytes,
                  report.free_bytes,
                  report.total_bytes,
                  report.limit_bytes,
                  report.is_limited() ? 1 : 0,
                  report.reserved_bytes,
                  report.allocated_bytes,
                  report.waiting_bytes,
                  report.cached_bytes,
                  report.largest_bytes,
                  report.fragmentation(),
                  nullptr,
                  nullptr};
  kept.is_last = true;
}

// Runs body and turns what it throws into a status and this thread's last error.
template <class Body>
spillover_status guarded(Body body) noexcept {
  try {
    body();
    return SPILLOVER_OK;
  } catch (const spillover::ConfigError& error) {
    return fail(SPILLOVER_INVALID_ARGUMENT, error.what());
  } catch (const spillover::PoolOutOfMemoryError& error) {
    fail(SPILLOVER_OUT_OF_MEMORY, error.what());
    keep_report(error.report());
    return SPILLOVER_OUT_OF_MEMORY;
  } catch (const spillover::DeviceOutOfMemoryError& error) {
    return fail(SPILLOVER_OUT_OF_MEMORY, error.what());
  } catch (const spillover::HostOutOfMemoryError& error) {
    return fail(SPILLOVER_OUT_OF_MEMORY, error.what());
  } catch (const spillover::DriverError& error) {
    return fail(SPILLOVER_DRIVER_FAILURE, error.what());
  } catch (const std::exception& error) {
    return fail(SPILLOVER_BROKEN_STATE, error.what());
  }
}

void require_output(const void* out) {
  if (out == nullptr) throw spillover::ConfigError("the output pointer must not be null");
}

std::vector<spillover::ArenaId> read_tags(const uint32_t* tags, size_t tag_count) {
  if (tags == nullptr && tag_count != 0) {
    throw spillover::ConfigError("the tags must not be null");
  }
  for (size_t i = 0; i < tag_count; ++i) {
    // An arena sleeps with the tag under which it was made, or, with an upstream, not at all.
    if (spillover::is_private_arena(tags[i])) {
      throw spillover::ConfigError(std::to_string(tags[i]) +
                                   " is a private arena and no tag; give the tag under which it "
                                   "was made");
    }
    static_cast<void>(spillover::arena_name(tags[i]));  // Throws for a number that is none.
  }
  return {tags, tags + tag_count};
}

}  // namespace

extern "C" {

int spillover_abi_version(void) {
  return SPILLOVER_ABI_VERSION;
}

const char* spillover_last_error(void) {
  return t_last_error.c_str();
}

spillover_status spillover_last_out_of_memory(spillover_out_of_memory_t* out) {
  if (out == nullptr || !t_out_of_memory.is_last) return SPILLOVER_INVALID_ARGUMENT;
  *out = t_out_of_memory.figures;
  out->details = t_out_of_memory.details.c_str();
  out->text = t_out_of_memory.text.c_str();
  return SPILLOVER_OK;
}

spillover_status spillover_alloc(int device, size_t size_bytes, void* stream, void** out) {
  return guarded([&] {
    require_output(out);
    *out = spillover::pool_of_device(device).allocate(size_bytes, stream);
  });
}

spillover_status spillover_try_alloc(int device, size_t size_bytes, void* stream, void** out) {
  spillover::Pool* pool = spillover::existing_pool(device);
  if (pool == nullptr || out == nullptr) return SPILLOVER_BUSY;
  void* pointer = pool->allocate_cached(size_bytes, stream);
  if (pointer == nullptr) return SPILLOVER_BUSY;
  *out = pointer;
  return SPILLOVER_OK;
}

spillover_status spillover_free(void* pointer) {
  if (pointer == nullptr || spillover::in_forked_child()) return SPILLOVER_OK;
  if (spillover::Pool::free_to_magazine(pointer)) return SPILLOVER_OK;
  return guarded([&] { spillover::pool_of_address(pointer).free(pointer); });
}

spillover_status spillover_try_free(void* pointer) {
  if (pointer == nullptr || spillover::in_forked_child()) return SPILLOVER_OK;
  if (spillover::Pool::free_to_magazine(pointer)) return SPILLOVER_OK;
  bool is_freed = true;
  const spillover_status status =
      guarded([&] { is_freed = spillover::pool_of_address(pointer).try_free(pointer); });
  return status == SPILLOVER_OK && !is_freed ? SPILLOVER_BUSY : status;
}

int spillover_in_forked_child(void) {
  return spillover::in_forked_child() ? 1 : 0;
}

spillover_status spillover_record_stream(void* pointer, void* stream) {
  if (pointer == nullptr) return SPILLOVER_OK;
  return guarded([&] { spillover::pool_of_address(pointer).record_stream(pointer, stream); });
}

spillover_status spillover_record_stream_of(void* pointer, int stream_device, void* stream) {
  if (pointer == nullptr) return SPILLOVER_OK;
  return guarded(
      [&] { spillover::pool_of_address(pointer).record_stream(pointer, stream_device, stream); });
}

spillover_status spillover_base(const void* pointer, void** base, size_t* size_bytes) {
  return guarded([&] {
    require_output(base);
    require_output(size_bytes);
    const auto segment = spillover::pool_of_address(pointer).segment_of(pointer);
    *base = reinterpret_cast<void*>(segment.begin);
    *size_bytes = segment.size_bytes();
  });
}

spillover_status spillover_tag_of(const void* pointer, uint32_t* out) {
  return guarded([&] {
    require_output(out);
    *out = spillover::pool_of_address(pointer).arena_of_block(pointer);
  });
}

int spillover_device_of(const void* pointer) {
  int device = -1;
  guarded([&] {
    const spillover::Pool* pool = spillover::find_pool(pointer);
    if (pool != nullptr && pool->is_live(pointer)) device = pool->device();
  });
  return device;
}

spillover_status spillover_stats(int device, spillover_stats_t* out) {
  return guarded([&] {
    require_output(out);
    spillover::Pool* pool = spillover::pool_if_made(device);
    *out = pool == nullptr ? spillover_stats_t{} : pool->statistics();
  });
}

spillover_status spillover_reset_accumulated_stats(int device) {
  return guarded([&] {
    if (auto* pool = spillover::pool_if_made(device)) pool->reset_accumulated_statistics();
  });
}

spillover_status spillover_reset_peak_stats(int device) {
  return guarded([&] {
    if (auto* pool = spillover::pool_if_made(device)) pool->reset_peak_statistics();
  });
}

spillover_status spillover_take_interval(int device, spillover_interval* out) {
  return guarded([&] {
    require_output(out);
    spillover::Pool* pool = spillover::pool_if_made(device);
    *out = pool == nullptr ? spillover_interval{} : pool->take_interval();
  });
}

spillover_status spillover_trim(int device, size_t keep_bytes) {
  return guarded([&] {
    if (auto* pool = spillover::pool_if_made(device)) pool->trim(keep_bytes);
  });
}

spillover_status spillover_configure(int device, const char* settings) {
  return guarded([&] {
    if (settings == nullptr) throw spillover::ConfigError("the settings must not be null");
    if (device == -1) {
      spillover::configure_pools(settings, "settings");
    } else {
      spillover::configure_pool(device, settings, "settings");
    }
  });
}

spillover_status spillover_round_sizes(const size_t divisions[SPILLOVER_ROUNDING_INTERVALS]) {
  return guarded([&] {
    if (divisions == nullptr) throw spillover::ConfigError("the divisions must not be null");
    std::array<size_t, spillover::SizeRounding::kIntervalCount> all;
    static_assert(all.size() == SPILLOVER_ROUNDING_INTERVALS);
    std::copy_n(divisions, all.size(), all.begin());
    spillover::SizeRounding::set(all);
  });
}

spillover_status spillover_reuse_in_capture(int is_on) {
  spillover::PendingUses::set_reuses_in_capture(is_on != 0);
  return SPILLOVER_OK;
}

spillover_status spillover_limit(int device, size_t* out) {
  return guarded([&] {
    require_output(out);
    *out = spillover::pool_of_device(device).limit_bytes();
  });
}

spillover_status spillover_tag(const char* name, uint32_t* out) {
  return guarded([&] {
    if (name == nullptr) throw spillover::ConfigError("the name of a tag must not be null");
    require_output(out);
    *out = spillover::arena_of(name);
  });
}

spillover_status spillover_set_tag(uint32_t tag, uint32_t* previous) {
  return guarded([&] {
    static_cast<void>(spillover::arena_name(tag));  // Throws for a number that is none.
    const spillover::ArenaId before = spillover::ThreadCache::set_current_arena(tag);
    if (previous != nullptr) *previous = before;
  });
}

spillover_status spillover_tag_stats(int device, uint32_t tag, spillover_tag_stats_t* out) {
  return guarded([&] {
    require_output(out);
    static_cast<void>(spillover::arena_name(tag));
    *out = spillover::pool_of_device(device).arena_statistics(tag);
  });
}

spillover_status spillover_sleep(int device, const uint32_t* tags, size_t tag_count,
                                 spillover_content_store* store, size_t* copied_bytes) {
  return guarded([&] {
    const std::vector<spillover::ArenaId> numbers = read_tags(tags, tag_count);
    spillover::Pool* pool = spillover::pool_if_made(device);
    auto* const contents = reinterpret_cast<spillover::ContentStore*>(store);
    const size_t bytes = pool == nullptr ? 0 : pool->sleep(numbers, contents);
    if (copied_bytes != nullptr) *copied_bytes = bytes;
  });
}

spillover_status spillover_wake(int device, const uint32_t* tags, size_t tag_count,
                                size_t* copied_bytes) {
  return guarded([&] {
    const std::vector<spillover::ArenaId> numbers = read_tags(tags, tag_count);
    spillover::Pool* pool = spillover::pool_if_made(device);
    const size_t bytes = pool == nullptr ? 0 : pool->wake(numbers);
    if (copied_bytes != nullptr) *copied_bytes = bytes;
  });
}

spillover_status spillover_make_arena(int device, uint32_t* out) {
  return guarded([&] {
    require_output(out);
    *out = spillover::pool_of_device(device).make_arena();
  });
}

spillover_status spillover_make_arena_from(int device, spillover_upstream_alloc alloc,
                                           spillover_upstream_free free, void (*done)(void* user),
                                           void* user, uint32_t* out) {
  return guarded([&] {
    if (alloc == nullptr || free == nullptr) {
      throw spillover::ConfigError("the functions of an arena's allocator must not be null");
    }
    require_output(out);
    spillover::Pool& pool = spillover::pool_of_device(device);
    const auto upstream = std::make_shared<spillover::Upstream>();
    upstream->allocate = [alloc, user](size_t size_bytes, spillover::StreamHandle stream) {
      return alloc(user, size_bytes, stream);
    };
    upstream->free = [free, user](void* pointer, size_t size_bytes) {
      free(user, pointer, size_bytes);
    };
    *out = pool.make_arena(upstream);
    if (done != nullptr) upstream->done = [done, user] { done(user); };
  });
}

spillover_status spillover_alloc_in(int device, size_t size_bytes, void* stream, uint32_t arena,
                                    void** out) {
  return guarded([&] {
    require_output(out);
    *out = spillover::pool_of_device(device).allocate_in(arena, size_bytes, stream);
  });
}

spillover_status spillover_alloc_at(int device, size_t size_bytes, void* stream, uint32_t arena,
                                    void* address, void** out) {
  return guarded([&] {
    require_output(out);
    *out = spillover::pool_of_device(device).allocate_at(address, arena, size_bytes, stream);
  });
}

spillover_status spillover_expect_stream(int device, uint32_t arena, void* stream) {
  return guarded([&] { spillover::pool_of_device(device).expect_stream(arena, stream); });
}

spillover_status spillover_restore_arena(int device, uint32_t arena,
                                         const spillover_block_info* blocks, size_t block_count) {
  return guarded([&] {
    if (blocks == nullptr && block_count != 0) {
      throw spillover::ConfigError("the blocks to restore must not be null");
    }
    spillover::pool_of_device(device).restore_arena(arena, {blocks, blocks + block_count});
  });
}

spillover_status spillover_release_arena(int device, uint32_t arena) {
  return guarded([&] { spillover::pool_of_device(device).release_arena(arena); });
}

spillover_status spillover_trim_arena(int device, uint32_t arena) {
  return guarded([&] { spillover::pool_of_device(device).trim_arena(arena); });
}

spillover_status spillover_set_arena_options(int device, uint32_t arena, int lends, int is_whole) {
  return guarded([&] {
    spillover::pool_of_device(device).set_arena_options(arena, {lends != 0, is_whole != 0});
  });
}

spillover_status spillover_add_reclaimer(int device, spillover_reclaimer reclaimer, void* user,
                                         uint64_t* out) {
  return guarded([&] {
    if (reclaimer == nullptr) throw spillover::ConfigError("the reclaimer must not be null");
    require_output(out);
    *out = spillover::pool_of_device(device).reclaimers().add(
        [reclaimer, user](size_t missing_bytes, spillover::StreamHandle stream) {
          return reclaimer(user, missing_bytes, stream);
        });
  });
}

spillover_status spillover_remove_reclaimer(int device, uint64_t number) {
  return guarded([&] {
    if (!spillover::pool_of_device(device).reclaimers().remove(number)) {
      throw spillover::ConfigError("there is no reclaimer " + std::to_string(number) +
                                   "; it was removed before");
    }
  });
}

spillover_status spillover_keep_stream(int device, void* stream) {
  return guarded([&] {
    spillover::pool_of_device(device);
    spillover::keep_stream(device, stream);
  });
}

spillover_status spillover_add_peer(int device, int peer) {
  return guarded([&] {
    spillover::pool_of_device(device).add_peer(peer);
    spillover::Imports::instance().follow_peers(device);
  });
}

spillover_status spillover_share(const void* pointer, spillover_shared_visitor visitor,
                                 void* user) {
  return guarded([&] {
    if (visitor == nullptr) throw spillover::ConfigError("the visitor must not be null");
    const spillover::SharedBlock block = spillover::pool_of_address(pointer).share(pointer);
    std::vector<spillover_shared_chunk> chunks;
    chunks.reserve(block.chunks.size());
    for (const spillover::SharedChunk& chunk : block.chunks) {
      chunks.push_back({chunk.size_bytes, chunk.file, chunk.identity});
    }
    spillover_shared_block shared{
        block.offset_bytes, block.process, chunks.size(), chunks.data(), {}};
    std::copy(block.handle.begin(), block.handle.end(), shared.handle);
    visitor(user, &shared);
  });
}

spillover_status spillover_open_shared(int device, const spillover_shared_block* block,
                                       void** out) {
  return guarded([&] {
    require_output(out);
    if (block == nullptr || (block->chunks == nullptr && block->chunk_count != 0)) {
      throw spillover::ConfigError("the shared block and its chunks must not be null");
    }
    spillover::SharedBlock shared;
    shared.process = block->process;
    for (size_t i = 0; i < block->chunk_count; ++i) {
      const spillover_shared_chunk& chunk = block->chunks[i];
      shared.chunks.push_back({chunk.size_bytes, chunk.file, chunk.identity});
    }
    std::copy(std::begin(block->handle), std::end(block->handle), shared.handle.begin());
    *out = spillover::Imports::instance().open(device, shared);
  });
}

spillover_status spillover_close_shared(void* address) {
  return guarded([&] { spillover::Imports::instance().close(address); });
}

spillover_status spillover_set_memory_fraction(int device, double fraction) {
  return guarded([&] { spillover::set_memory_fraction(device, fraction); });
}

spillover_status spillover_memory_fraction(int device, double* out) {
  return guarded([&] {
    require_output(out);
    *out = spillover::pool_of_device(device).settings().fraction;
  });
}

spillover_status spillover_largest_free(int device, size_t* out) {
  return guarded([&] {
    require_output(out);
    spillover::Pool* pool = spillover::pool_if_made(device);
    *out = pool == nullptr ? 0 : pool->largest_free_bytes();
  });
}

spillover_status spillover_visit_segments(int device, spillover_segment_visitor visitor,
                                          void* user) {
  return guarded([&] {
    if (visitor == nullptr) throw spillover::ConfigError("the visitor must not be null");
    if (auto* pool = spillover::pool_if_made(device)) pool->visit_segments(visitor, user);
  });
}

void spillover_observe_segments(spillover_segment_observer observer) {
  spillover::Pool::observe_segments(observer);
}

spillover_status spillover_check_invariants(int device) {
  return guarded([&] {
    if (auto* pool = spillover::pool_if_made(device)) pool->check_invariants();
  });
}

}  // extern "C"
