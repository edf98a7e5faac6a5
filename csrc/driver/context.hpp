// The primary context of a device, which torch and the CUDA runtime use too, and guards for calls.
//
// PrimaryContext::of() is thread-safe. A scope belongs to the thread that made it.
#pragma once

namespace spillover {

// Holds one retain of a device's primary context. Move-only.
class PrimaryContext {
 public:
  // Throws ConfigError for a device that does not exist.
  explicit PrimaryContext(int device);
  ~PrimaryContext();
  PrimaryContext(PrimaryContext&& other) noexcept;
  PrimaryContext& operator=(PrimaryContext&& other) noexcept;
  PrimaryContext(const PrimaryContext&) = delete;
  PrimaryContext& operator=(const PrimaryContext&) = delete;

  int device() const { return device_; }
  void* handle() const { return handle_; }

  // The process's own retain of a device's context: made at first use and leaked on purpose, as a
  // release at exit would run after the driver has shut down.
  static const PrimaryContext& of(int device);

 private:
  int device_ = -1;
  void* handle_ = nullptr;  // A CUcontext; null when moved from.
};

// Makes a device's primary context current on this thread, and restores the former one.
class ContextScope {
 public:
  explicit ContextScope(int device);
  ~ContextScope();
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;

 private:
  bool is_pushed_ = false;
};

// The same for destructors: never throws. What holds device resources must ask the driver to
// release them even if it cannot say which context is current, since nobody asks again.
class ReleaseContextScope {
 public:
  explicit ReleaseContextScope(int device) noexcept;
  ~ReleaseContextScope();
  ReleaseContextScope(const ReleaseContextScope&) = delete;
  ReleaseContextScope& operator=(const ReleaseContextScope&) = delete;

 private:
  bool is_pushed_ = false;
};

// Lets this thread make calls, such as cuMemAlloc, that a stream capture elsewhere in the process
// would otherwise forbid and that would invalidate it. Does nothing where the driver knows no
// modes.
class RelaxedCaptureScope {
 public:
  RelaxedCaptureScope();
  ~RelaxedCaptureScope();
  RelaxedCaptureScope(const RelaxedCaptureScope&) = delete;
  RelaxedCaptureScope& operator=(const RelaxedCaptureScope&) = delete;

 private:
  int former_mode_ = -1;  // -1: nothing to restore.
};

}  // namespace spillover
