// Blocks of a pool as DLPack capsules. The structures are those of DLPack's dlpack.h 1.0, which
// never changes within a major version, so that no header of another project is needed.
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "base/error.hpp"
#include "bindings/bindings.hpp"
#include "driver/context.hpp"
#include "driver/event.hpp"
#include "driver/stream.hpp"

namespace py = pybind11;

namespace spillover {
namespace {

struct Tensor {  // DLTensor
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t type_code;
  uint8_t type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct Unversioned {  // DLManagedTensor
  static constexpr const char* kName = "dltensor";

  Tensor tensor;
  void* manager;
  void (*deleter)(Unversioned*);
};

struct Versioned {  // DLManagedTensorVersioned
  static constexpr const char* kName = "dltensor_versioned";

  uint32_t major_version;
  uint32_t minor_version;
  void* manager;
  void (*deleter)(Versioned*);
  uint64_t flags;
  Tensor tensor;
};

constexpr int32_t kCudaDevice = 2;
constexpr uint8_t kUnsignedInteger = 1;

// What a consumer holds: the tensor, its shape, and the Python object whose memory it is.
template <class Managed>
struct Export {
  Managed managed{};
  std::array<int64_t, 1> shape{};
  std::array<int64_t, 1> strides{1};
  py::object owner;
};

// Called by the consumer, on any thread, with or without the GIL.
template <class Managed>
void delete_export(Managed* managed) {
  // The program is over and its objects are gone: the memory ends with the process.
  if (Py_IsInitialized() == 0) return;
  const py::gil_scoped_acquire gil;
  delete static_cast<Export<Managed>*>(managed->manager);
}

// A consumer renames the capsule that it has taken the tensor from, and then deletes that itself.
template <class Managed>
void delete_capsule(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, Managed::kName) == 0) return;
  auto* const managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule, Managed::kName));
  managed->deleter(managed);
}

template <class Managed>
py::object make_capsule(py::object owner, uintptr_t address, size_t size_bytes, int device) {
  auto exported = std::make_unique<Export<Managed>>();
  exported->owner = std::move(owner);
  exported->shape[0] = static_cast<int64_t>(size_bytes);
  Managed& managed = exported->managed;
  managed.tensor.data = reinterpret_cast<void*>(address);
  managed.tensor.device_type = kCudaDevice;
  managed.tensor.device_id = device;
  managed.tensor.ndim = 1;
  managed.tensor.type_code = kUnsignedInteger;
  managed.tensor.type_bits = 8;
  managed.tensor.type_lanes = 1;
  managed.tensor.shape = exported->shape.data();
  managed.tensor.strides = exported->strides.data();
  managed.manager = exported.get();
  managed.deleter = &delete_export<Managed>;
  if constexpr (requires { managed.major_version; }) managed.major_version = 1;
  PyObject* const capsule = PyCapsule_New(&managed, Managed::kName, &delete_capsule<Managed>);
  if (capsule == nullptr) throw py::error_already_set();
  exported.release();  // The capsule's, or its consumer's.
  return py::reinterpret_steal<py::object>(capsule);
}

// Both streams are alive.
void put_before(int device, uintptr_t first, uintptr_t then) {
  const StreamHandle first_stream = normalize_stream(reinterpret_cast<StreamHandle>(first));
  const StreamHandle then_stream = normalize_stream(reinterpret_cast<StreamHandle>(then));
  if (first_stream == then_stream) return;
  const ContextScope scope(device);
  Event event(device);
  event.record(first_stream);
  if (event.try_put_before(then_stream) != RecordOutcome::kRecorded) {
    throw StateError(
        "the stream cannot wait for the block's, as it records a CUDA graph or the "
        "device has failed");
  }
}

}  // namespace

void register_dlpack(py::module_& module) {
  module.def(
      "dlpack_capsule",
      [](py::object owner, uintptr_t address, size_t size_bytes, int device, bool versioned) {
        return versioned ? make_capsule<Versioned>(std::move(owner), address, size_bytes, device)
                         : make_capsule<Unversioned>(std::move(owner), address, size_bytes, device);
      },
      py::arg("owner"), py::arg("address"), py::arg("size_bytes"), py::arg("device"),
      py::arg("versioned"), "Device memory as a DLPack array of bytes that holds its owner.");
  module.def("put_before", &put_before, py::arg("device"), py::arg("first"), py::arg("then"),
             ReleaseGil(), "Have a stream wait for what was submitted to another one so far.");
}

}  // namespace spillover
