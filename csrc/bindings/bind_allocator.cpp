// Python's view of the device pools. Addresses and stream handles are integers.
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "allocator/arenas.hpp"
#include "allocator/block_annotation.hpp"
#include "allocator/pools.hpp"
#include "allocator/statistics.hpp"
#include "bindings/bindings.hpp"
#include "driver/device.hpp"
#include "transfer/host_store.hpp"

namespace py = pybind11;

namespace spillover {
namespace {

void* pointer_of(uintptr_t address) {
  return reinterpret_cast<void*>(address);
}

py::dict to_dict(const spillover_counter& counter) {
  py::dict result;
  result["current"] = counter.current;
  result["peak"] = counter.peak;
  result["allocated"] = counter.allocated;
  result["freed"] = counter.freed;
  return result;
}

// Nested as torch.cuda.memory_stats_as_nested_dict: name, class of blocks, counter.
py::dict stats_of(Pool& pool) {
  spillover_stats_t statistics;
  {
    const GilRelease released;
    statistics = pool.statistics();
  }
  py::dict result;
  for_each_counters(statistics, [&](const char* name, const ClassCounters& counters) {
    py::dict classes;
    classes["all"] = to_dict(counters[SPILLOVER_CLASS_ALL]);
    classes["small_pool"] = to_dict(counters[SPILLOVER_CLASS_SMALL]);
    classes["large_pool"] = to_dict(counters[SPILLOVER_CLASS_LARGE]);
    result[name] = classes;
  });
  result["num_alloc_retries"] = statistics.alloc_retries;
  result["num_ooms"] = statistics.ooms;
  return result;
}

struct SegmentCopy {
  spillover_segment_info info;
  std::vector<spillover_block_info> blocks;
};

void copy_segment(void* user, const spillover_segment_info* segment,
                  const spillover_block_info* blocks) {
  auto& copies = *static_cast<std::vector<SegmentCopy>*>(user);
  copies.push_back({*segment, {blocks, blocks + segment->block_count}});
}

py::dict to_dict(const spillover_block_info& block) {
  static constexpr const char* kStates[] = {"free", "live", "waiting"};
  py::dict result;
  result["address"] = reinterpret_cast<uintptr_t>(block.address);
  result["size_bytes"] = block.size_bytes;
  result["requested_bytes"] = block.requested_bytes;
  result["state"] = kStates[block.state];
  return result;
}

py::list segments_of(Pool& pool) {
  std::vector<SegmentCopy> copies;
  {
    const GilRelease released;
    pool.visit_segments(copy_segment, &copies);
  }
  py::list result;
  for (const SegmentCopy& copy : copies) {
    py::list blocks;
    for (const spillover_block_info& block : copy.blocks) blocks.append(to_dict(block));
    py::dict segment;
    segment["address"] = reinterpret_cast<uintptr_t>(copy.info.address);
    segment["size_bytes"] = copy.info.size_bytes;
    segment["stream"] = reinterpret_cast<uintptr_t>(copy.info.stream);
    segment["tag"] = arena_name(copy.info.tag);
    segment["arena"] = copy.info.tag;
    segment["is_small"] = copy.info.is_small != 0;
    segment["is_fixed"] = copy.info.is_fixed != 0;
    segment["is_asleep"] = copy.info.is_asleep != 0;
    segment["blocks"] = blocks;
    result.append(segment);
  }
  return result;
}

py::object bytes_or_none(size_t size_bytes) {
  if (size_bytes == Settings::kNoLimit) return py::none();
  return py::int_(size_bytes);
}

py::dict settings_of(Pool& pool) {
  static constexpr const char* kVirtualMemory[] = {"auto", "on", "off"};
  Settings settings;
  {
    const GilRelease released;
    settings = pool.settings();
  }
  py::dict result;
  result["limit"] = bytes_or_none(settings.limit_bytes);
  result["fraction"] = settings.fraction;
  result["wait_max"] = static_cast<double>(settings.wait_max.count()) / 1e3;
  result["virtual_memory"] = kVirtualMemory[static_cast<size_t>(settings.virtual_memory)];
  result["unmapped_max"] = bytes_or_none(settings.unmapped_max_bytes);
  result["thread_cache"] = settings.has_thread_cache;
  result["check_every"] = settings.check_every;
  return result;
}

py::dict tag_stats_of(Pool& pool, ArenaId tag) {
  spillover_tag_stats_t statistics;
  {
    const GilRelease released;
    static_cast<void>(arena_name(tag));  // Throws for a number that is none.
    statistics = pool.arena_statistics(tag);
  }
  py::dict result;
  result["allocation"] = statistics.allocation;
  result["allocated_bytes"] = statistics.allocated_bytes;
  result["reserved_bytes"] = statistics.reserved_bytes;
  result["reserved_bytes_peak"] = statistics.reserved_bytes_peak;
  result["asleep_bytes"] = statistics.asleep_bytes;
  result["saved_bytes"] = statistics.saved_bytes;
  return result;
}

// Needs the GIL. What is raised, or no number of bytes, is reported and counts as 0.
size_t ask_reclaimer(PyObject* function, size_t missing_bytes, StreamHandle stream) {
  constexpr auto kFailed = static_cast<size_t>(-1);
  size_t freed_bytes = kFailed;
  PyObject* result = PyObject_CallFunction(function, "KK", missing_bytes, stream);
  PyObject* number = result == nullptr ? nullptr : PyNumber_Index(result);
  if (number != nullptr) freed_bytes = PyLong_AsSize_t(number);
  Py_XDECREF(number);
  Py_XDECREF(result);
  if (freed_bytes != kFailed || PyErr_Occurred() == nullptr) return freed_bytes;
  PyErr_WriteUnraisable(function);
  return 0;
}

// Holds a Python function that threads without the GIL call and let go of.
Reclaimers::Reclaim make_reclaimer(py::function function) {
  const std::shared_ptr<PyObject> held(function.release().ptr(), [](PyObject* last) {
    const GilAcquire gil;
    Py_DECREF(last);
  });
  return [held](size_t missing_bytes, StreamHandle stream) -> size_t {
    const GilAcquire gil;
    return call_python([&] { return ask_reclaimer(held.get(), missing_bytes, stream); });
  };
}

// Pools are leaked singletons, so the Python object owns nothing. Each call asks for the pool
// again: that is where a forked child is told apart.
struct PoolReference {
  int device;
  Pool& get() const { return pool_of_device(device); }
};
using PoolClass = py::class_<PoolReference>;

void define_arenas(PoolClass& pool_class) {
  pool_class
      .def(
          "make_arena", [](const PoolReference& pool) { return pool.get().make_arena(); },
          ReleaseGil(), "Begin a private arena; gives its number.")
      .def(
          "alloc_in",
          [](const PoolReference& pool, ArenaId arena, size_t size_bytes, uintptr_t stream) {
            // Not told to the checker: a graph may write to blocks of its pool that are free.
            return reinterpret_cast<uintptr_t>(
                pool.get().allocate_in(arena, size_bytes, pointer_of(stream)));
          },
          py::arg("arena"), py::arg("size_bytes"), py::arg("stream") = 0, ReleaseGil())
      .def(
          "expect_stream",
          [](const PoolReference& pool, ArenaId arena, uintptr_t stream) {
            pool.get().expect_stream(arena, pointer_of(stream));
          },
          py::arg("arena"), py::arg("stream"), ReleaseGil())
      .def(
          "restore_arena",
          [](const PoolReference& pool, ArenaId arena,
             const std::vector<std::pair<uintptr_t, size_t>>& blocks) {
            std::vector<spillover_block_info> infos;
            infos.reserve(blocks.size());
            for (const auto& [address, size_bytes] : blocks) {
              infos.push_back({pointer_of(address), size_bytes, size_bytes, 1});
            }
            pool.get().restore_arena(arena, std::move(infos));
          },
          py::arg("arena"), py::arg("blocks"), ReleaseGil(),
          "Make exactly these blocks, addresses and sizes, the arena's live ones.")
      .def(
          "release_arena",
          [](const PoolReference& pool, ArenaId arena) { pool.get().release_arena(arena); },
          py::arg("arena"), ReleaseGil())
      .def(
          "trim_arena",
          [](const PoolReference& pool, ArenaId arena) { pool.get().trim_arena(arena); },
          py::arg("arena"), ReleaseGil())
      .def(
          "set_arena_options",
          [](const PoolReference& pool, ArenaId arena, bool lends, bool is_whole) {
            pool.get().set_arena_options(arena, {lends, is_whole});
          },
          py::arg("arena"), py::arg("lends") = false, py::arg("is_whole") = false, ReleaseGil());
}

void define_sleep(PoolClass& pool_class) {
  pool_class
      .def(
          "sleep",
          [](const PoolReference& pool, const std::vector<ArenaId>& tags,
             std::shared_ptr<HostPool> host) {
            if (host == nullptr) return pool.get().sleep(tags, nullptr);
            HostStore store(std::move(host));
            return pool.get().sleep(tags, &store);
          },
          py::arg("tags"), py::arg("host"), ReleaseGil(),
          "Put tags to sleep, with contents in host or without; gives the bytes that were copied.")
      .def(
          "wake",
          [](const PoolReference& pool, const std::vector<ArenaId>& tags) {
            return pool.get().wake(tags);
          },
          py::arg("tags"), ReleaseGil())
      .def(
          "sleeping_tags", [](const PoolReference& pool) { return pool.get().sleeping_tags(); },
          ReleaseGil());
}

void define_memory(PoolClass& pool_class) {
  pool_class
      .def(
          "alloc",
          [](const PoolReference& pool, size_t size_bytes, uintptr_t stream) {
            void* const block = pool.get().allocate(size_bytes, pointer_of(stream));
            annotate_block_begin(block, size_bytes);
            return reinterpret_cast<uintptr_t>(block);
          },
          py::arg("size_bytes"), py::arg("stream") = 0, ReleaseGil())
      .def(
          "free",
          [](const PoolReference& pool, uintptr_t address) {
            annotate_block_end(pointer_of(address));
            pool.get().free(pointer_of(address));
          },
          py::arg("address"), ReleaseGil())
      .def(
          "record_stream",
          [](const PoolReference& pool, uintptr_t address, uintptr_t stream) {
            pool.get().record_stream(pointer_of(address), pointer_of(stream));
          },
          py::arg("address"), py::arg("stream"), ReleaseGil())
      .def(
          "keep_stream",
          [](const PoolReference& pool, uintptr_t stream) {
            keep_stream(pool.get().device(), pointer_of(stream));
          },
          py::arg("stream"), ReleaseGil(), "Promise that the stream lives as long as the process.")
      .def(
          "trim", [](const PoolReference& pool, size_t keep_bytes) { pool.get().trim(keep_bytes); },
          py::arg("keep_bytes") = 0, ReleaseGil());
}

void define_settings(PoolClass& pool_class) {
  pool_class
      .def(
          "configure",
          [](const PoolReference& pool, const std::string& settings, const std::string& source) {
            configure_pool(pool.device, settings, source);
          },
          py::arg("settings"), py::arg("source"), ReleaseGil())
      .def("settings", [](const PoolReference& pool) { return settings_of(pool.get()); })
      .def(
          "limit_bytes", [](const PoolReference& pool) { return pool.get().limit_bytes(); },
          ReleaseGil())
      .def("tag_stats",
           [](const PoolReference& pool, ArenaId tag) { return tag_stats_of(pool.get(), tag); })
      .def(
          "add_reclaimer",
          [](const PoolReference& pool, py::function function) {
            return pool.get().reclaimers().add(make_reclaimer(std::move(function)));
          },
          py::arg("function"))
      .def(
          "remove_reclaimer",
          [](const PoolReference& pool, uint64_t number) {
            return pool.get().reclaimers().remove(number);
          },
          py::arg("number"), ReleaseGil(),
          "Waits until the reclaimer does not run; false where it was removed before.");
}

void define_figures(PoolClass& pool_class) {
  pool_class
      .def(
          "check_invariants", [](const PoolReference& pool) { pool.get().check_invariants(); },
          ReleaseGil())
      .def(
          "largest_free_bytes",
          [](const PoolReference& pool) { return pool.get().largest_free_bytes(); }, ReleaseGil())
      .def(
          "memory_fraction",
          [](const PoolReference& pool) { return pool.get().settings().fraction; }, ReleaseGil())
      .def(
          "set_memory_fraction",
          [](const PoolReference& pool, double fraction) {
            set_memory_fraction(pool.device, fraction);
          },
          py::arg("fraction"), ReleaseGil())
      .def(
          "reset_peak_stats", [](const PoolReference& pool) { pool.get().reset_peak_statistics(); },
          ReleaseGil())
      .def(
          "reset_accumulated_stats",
          [](const PoolReference& pool) { pool.get().reset_accumulated_statistics(); },
          ReleaseGil())
      .def("stats", [](const PoolReference& pool) { return stats_of(pool.get()); })
      .def("segments", [](const PoolReference& pool) { return segments_of(pool.get()); });
}

}  // namespace

void register_allocator(py::module_& module) {
  module.def("abi_version", &spillover_abi_version, "Version of libspillover.so's C interface.");
  module.def(
      "device_of", [](uintptr_t address) { return spillover_device_of(pointer_of(address)); },
      py::arg("address"), ReleaseGil(),
      "Device of a live block's address, -1 where it is not ours.");

  module.def(
      "configure",
      [](const std::string& settings, const std::string& source, std::optional<int> device) {
        if (device) {
          configure_pool(*device, settings, source);
        } else {
          configure_pools(settings, source);
        }
      },
      py::arg("settings"), py::arg("source"), py::arg("device") = py::none(), ReleaseGil(),
      "Change the settings of one device's pool, or of every pool, those too that are made later.");
  module.def(
      "check_settings",
      [](const std::string& settings, const std::string& source) {
        static_cast<void>(parse_settings(settings, source, {}));
      },
      py::arg("settings"), py::arg("source"), "Raise what configure() would, and change nothing.");
  module.def(
      "tag_number", [](const std::string& name) { return arena_of(name); }, py::arg("name"),
      ReleaseGil(), "The number of a tag, made where it is new.");
  module.def(
      "find_tag",
      [](const std::string& name) -> py::object {
        const auto arena = find_arena(name);
        if (!arena) return py::none();
        return py::int_(*arena);
      },
      py::arg("name"), "The number of a tag; None where nobody has used it.");
  module.def("tag_names", &arena_names, ReleaseGil(), "Every tag so far, \"\" first.");
  module.def(
      "devices_with_pool",
      [] {
        std::vector<int> devices;
        for (int device = 0; device < kDevicesMax; ++device) {
          if (existing_pool(device) != nullptr) devices.push_back(device);
        }
        return devices;
      },
      "Devices whose pool was made.");
  module.def(
      "set_tag", [](ArenaId tag) { return ThreadCache::set_current_arena(tag); }, py::arg("tag"),
      "Tag what the calling thread allocates from now on; gives the number of the tag before.");

  PoolClass pool_class(module, "Pool", "The pool of one device's memory.");
  pool_class
      .def(py::init([](int device) {
             pool_of_device(device);
             return PoolReference{device};
           }),
           py::arg("device") = 0, ReleaseGil())
      .def_readonly("device", &PoolReference::device);
  define_memory(pool_class);
  define_sleep(pool_class);
  define_arenas(pool_class);
  define_settings(pool_class);
  define_figures(pool_class);
}

}  // namespace spillover
