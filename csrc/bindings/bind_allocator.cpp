// Python's view of the device pools. Addresses and stream handles are integers.
#include <memory>
#include <string>
#include <vector>

#include "allocator/pools.hpp"
#include "allocator/statistics.hpp"
#include "bindings/bindings.hpp"

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
    const py::gil_scoped_release released;
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
    const py::gil_scoped_release released;
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
    segment["is_small"] = copy.info.is_small != 0;
    segment["blocks"] = blocks;
    result.append(segment);
  }
  return result;
}

}  // namespace

void register_allocator(py::module_& module) {
  module.def("abi_version", &spillover_abi_version, "Version of libspillover.so's C interface.");
  module.def(
      "device_of", [](uintptr_t address) { return spillover_device_of(pointer_of(address)); },
      py::arg("address"), ReleaseGil(),
      "Device of a live block's address, -1 where it is not ours.");

  // Pools are leaked singletons, so the Python object owns nothing. Each call asks for the pool
  // again: that is where a forked child is told apart.
  struct PoolReference {
    int device;
    Pool& get() const { return pool_of_device(device); }
  };
  py::class_<PoolReference>(module, "Pool", "The pool of one device's memory.")
      .def(py::init([](int device) {
             pool_of_device(device);
             return PoolReference{device};
           }),
           py::arg("device") = 0, ReleaseGil())
      .def_readonly("device", &PoolReference::device)
      .def(
          "alloc",
          [](const PoolReference& pool, size_t size_bytes, uintptr_t stream) {
            return reinterpret_cast<uintptr_t>(pool.get().allocate(size_bytes, pointer_of(stream)));
          },
          py::arg("size_bytes"), py::arg("stream") = 0, ReleaseGil())
      .def(
          "free",
          [](const PoolReference& pool, uintptr_t address) {
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
          "trim", [](const PoolReference& pool) { pool.get().trim(); }, ReleaseGil())
      .def(
          "check_invariants", [](const PoolReference& pool) { pool.get().check_invariants(); },
          ReleaseGil())
      .def(
          "largest_free_bytes",
          [](const PoolReference& pool) { return pool.get().largest_free_bytes(); }, ReleaseGil())
      .def(
          "memory_fraction", [](const PoolReference& pool) { return pool.get().memory_fraction(); },
          ReleaseGil())
      .def(
          "set_memory_fraction",
          [](const PoolReference& pool, double fraction) {
            pool.get().set_memory_fraction(fraction);
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

}  // namespace spillover
