#include "tiers/gpu_direct.hpp"

#include <dlfcn.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <exception>
#include <optional>
#include <string_view>
#include <utility>

#include "base/bytes.hpp"
#include "base/error.hpp"
#include "driver/context.hpp"
#include "driver/copy.hpp"
#include "driver/device.hpp"
#include "driver/device_memory.hpp"
#include "driver/pinned_region.hpp"
#include "driver/stream.hpp"
#include "tiers/cufile_abi.hpp"
#include "tiers/extent_io.hpp"
#include "tiers/scratch_file.hpp"

namespace spillover {
namespace {

constexpr size_t kProbeBytes = kMiB;

// The ones that a machine without GPUDirect meets.
constexpr std::array<std::pair<int, std::string_view>, 13> kTexts = {{
    {5001, "the kernel has no nvidia-fs"},
    {5004, "the kernel's nvidia-fs has another version"},
    {5007, "not supported on this platform"},
    {5008, "not supported on this file system or its disk"},
    {5009, "not supported on this device"},
    {5010, "an error of nvidia-fs"},
    {5011, "an error of the CUDA driver"},
    {5020, "the file is not open for direct access"},
    {5025, "permission denied"},
    {5026, "its driver is open already"},
    {5033, "its driver did not start"},
    {5034, "switched off by cuFile's configuration"},
    {5036, "the device's memory could not be pinned"},
}};

class NotUsable : public Error {
 public:
  using Error::Error;
};

std::string describe(int code, int driver_code) {
  std::string text = "cuFile error " + std::to_string(code);
  for (const auto& [known, meaning] : kTexts) {
    if (known == code) text.append(", ").append(meaning);
  }
  if (code == cufile::kCudaDriverError) text += " (" + std::to_string(driver_code) + ")";
  return text;
}

void check(cufile::Status status, const char* call) {
  if (status.code == 0) return;
  throw NotUsable(std::string(call) + ": " + describe(status.code, status.driver_code));
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

cufile::Functions load(const std::string& name, int& version) {
  // Never closed: it has threads and handlers of its own.
  void* const library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* const reason = dlerror();
    throw NotUsable(reason != nullptr ? reason : "cannot load " + name);
  }
  cufile::Functions functions;
  std::string missing;
#define SPILLOVER_FIND(member, symbol, result, arguments)                                  \
  functions.member = reinterpret_cast<decltype(functions.member)>(dlsym(library, symbol)); \
  if (functions.member == nullptr) missing += missing.empty() ? symbol : std::string(", ") + symbol;
  SPILLOVER_CUFILE_FUNCTIONS(SPILLOVER_FIND)
#undef SPILLOVER_FIND
  if (functions.get_version != nullptr) check(functions.get_version(&version), "cuFileGetVersion");
  const std::string remedy =
      "; install CUDA 12.9 or later, whose libcufile is " + version_text(cufile::kVersionMin);
  if (functions.get_version != nullptr && version < cufile::kVersionMin) {
    throw NotUsable("libcufile " + version_text(version) + " is too old" + remedy);
  }
  if (!missing.empty()) throw NotUsable(name + " has no " + missing + remedy);
  return functions;
}

// Has cuFile's driver open, without the mode in which it stands in for itself.
class OpenDriver {
 public:
  explicit OpenDriver(const cufile::Functions& functions) : functions_(functions) {
    // These fail where the driver is open already; the question after it decides.
    functions_.set_bool(cufile::kAllowCompatMode, false);
    functions_.set_bool(cufile::kForceCompatMode, false);
    check(functions_.open_driver(), "cuFileDriverOpen");
    try {
      for (const int mode : {cufile::kAllowCompatMode, cufile::kForceCompatMode}) {
        bool is_on = true;
        check(functions_.get_bool(mode, &is_on), "cuFileGetParameterBool");
        if (is_on) {
          throw NotUsable(
              "cuFile's compatibility mode is on and cannot be switched off: another part of the "
              "process has opened its driver, or its configuration forbids it");
        }
      }
    } catch (...) {
      close();
      throw;
    }
  }
  ~OpenDriver() { close(); }
  OpenDriver(const OpenDriver&) = delete;
  OpenDriver& operator=(const OpenDriver&) = delete;

 private:
  void close() noexcept { static_cast<void>(functions_.close_driver()); }

  const cufile::Functions& functions_;
};

class RegisteredFile {
 public:
  RegisteredFile(const cufile::Functions& functions, int descriptor) : functions_(functions) {
    cufile::Descriptor file;
    file.file.descriptor = descriptor;
    check(functions_.register_file(&handle_, &file), "cuFileHandleRegister");
  }
  ~RegisteredFile() { functions_.unregister_file(handle_); }
  RegisteredFile(const RegisteredFile&) = delete;
  RegisteredFile& operator=(const RegisteredFile&) = delete;
  cufile::Handle handle() const { return handle_; }

 private:
  const cufile::Functions& functions_;
  cufile::Handle handle_ = nullptr;
};

class RegisteredMemory {
 public:
  RegisteredMemory(const cufile::Functions& functions, void* address, size_t size_bytes)
      : functions_(functions), address_(address) {
    check(functions_.register_memory(address, size_bytes, 0), "cuFileBufRegister");
  }
  ~RegisteredMemory() { static_cast<void>(functions_.unregister_memory(address_)); }
  RegisteredMemory(const RegisteredMemory&) = delete;
  RegisteredMemory& operator=(const RegisteredMemory&) = delete;

 private:
  const cufile::Functions& functions_;
  void* const address_;
};

// Repeats what is short. transfer(done) moves what is left after done.
template <typename Transfer>
void move_all(const char* call, Transfer&& transfer) {
  size_t done = 0;
  while (done < kProbeBytes) {
    const ssize_t moved = transfer(done);
    if (moved > 0 && static_cast<size_t>(moved) <= kProbeBytes - done) {
      done += static_cast<size_t>(moved);
      continue;
    }
    const int native_error = errno;
    throw NotUsable(std::string(call) + ": " +
                    (moved == -1  ? std::strerror(native_error)
                     : moved < -1 ? describe(static_cast<int>(-moved), 0)
                                  : "moved " + std::to_string(moved) + " bytes"));
  }
}

// Both ways through the device's memory; what arrives is compared on the host.
class Exchange {
 public:
  Exchange(const cufile::Functions& functions, const std::string& folder, int device)
      : functions_(functions),
        file_(folder, Preallocation::kReserve),
        host_(allocate_blocks(2 * kProbeBytes)),
        pinned_(device, host_.get(), 2 * kProbeBytes),
        stream_(device),
        memory_(DeviceMemory::try_allocate(device, kProbeBytes)) {
    if (!file_.is_direct()) throw NotUsable("the file system of " + folder + " refuses O_DIRECT");
    if (!memory_) throw NotUsable("the device has no memory left for the probe");
    file_.reserve(kProbeBytes, kProbeBytes);
  }

  void run() {
    const RegisteredFile file(functions_, file_.descriptor());
    auto* const memory = reinterpret_cast<std::byte*>(memory_->address());
    const RegisteredMemory registered(functions_, memory, kProbeBytes);
    fill(1);
    copy_to_device(memory_->address(), sent(), kProbeBytes, stream_);
    stream_.synchronize();
    move_all("cuFileWrite", [&](size_t done) {
      const auto at = static_cast<off_t>(done);
      return functions_.write(file.handle(), memory, kProbeBytes - done, at, at);
    });
    file_.blocks().transfer(TransferDirection::kRead, received(), kProbeBytes, 0, repeats_);
    compare("cuFileWrite");
    fill(2);
    file_.blocks().transfer(TransferDirection::kWrite, sent(), kProbeBytes, 0, repeats_);
    move_all("cuFileRead", [&](size_t done) {
      const auto at = static_cast<off_t>(done);
      return functions_.read(file.handle(), memory, kProbeBytes - done, at, at);
    });
    copy_to_host(received(), memory_->address(), kProbeBytes, stream_);
    stream_.synchronize();
    compare("cuFileRead");
  }

 private:
  std::byte* sent() const { return host_.get(); }
  std::byte* received() const { return host_.get() + kProbeBytes; }

  void fill(uint32_t seed) const {
    std::memset(received(), 0, kProbeBytes);
    for (size_t at = 0; at < kProbeBytes; at += sizeof seed) {
      seed = seed * 1664525 + 1013904223;
      std::memcpy(sent() + at, &seed, sizeof seed);
    }
  }
  void compare(const char* call) const {
    if (std::memcmp(sent(), received(), kProbeBytes) == 0) return;
    throw NotUsable(std::string(call) + " reported success, and other bytes arrived");
  }

  const cufile::Functions& functions_;
  ScratchFile file_;
  BlockMemory host_;
  PinnedRegion pinned_;
  Stream stream_;
  std::optional<DeviceMemory> memory_;
  uint32_t repeats_ = 0;  // Nobody asks.
};

}  // namespace

GpuDirectAnswer probe_gpu_direct(const std::string& library, const std::string& folder,
                                 int device) {
  GpuDirectAnswer answer;
  try {
    const cufile::Functions functions = load(library, answer.library_version);
    require_device(device);
    const ContextScope scope(device);
    const OpenDriver driver(functions);
    Exchange(functions, folder, device).run();
    answer.works = true;
  } catch (const std::exception& error) {
    answer.reason = error.what();
  }
  return answer;
}

}  // namespace spillover
