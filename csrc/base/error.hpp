// Errors that cross layers. One class a kind of failure; bindings/translate_errors.cpp maps each to
// the Python exception of the same name. Messages say what happened, with sizes, and what to do.
//
// Thread-safe: values only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace spillover {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A caller's mistake in an argument or option.
class ConfigError : public Error {
 public:
  using Error::Error;
};

// Calls in a wrong order, or on an object that is closed.
class StateError : public Error {
 public:
  using Error::Error;
};

class DeviceOutOfMemoryError : public Error {
 public:
  DeviceOutOfMemoryError(const std::string& message, size_t requested_bytes)
      : Error(message), requested_bytes_(requested_bytes) {}
  size_t requested_bytes() const { return requested_bytes_; }

 private:
  size_t requested_bytes_;
};

class HostOutOfMemoryError : public Error {
 public:
  HostOutOfMemoryError(const std::string& message, size_t requested_bytes)
      : Error(message), requested_bytes_(requested_bytes) {}
  size_t requested_bytes() const { return requested_bytes_; }

 private:
  size_t requested_bytes_;
};

// A CUDA driver call that failed; code is its CUresult.
class DriverError : public Error {
 public:
  DriverError(const std::string& message, int code) : Error(message), code_(code) {}
  int code() const { return code_; }

 private:
  int code_;
};

// An operation on a file that failed; native_error is its errno (0 where there was none).
class StorageError : public Error {
 public:
  StorageError(const std::string& message, std::string path, int native_error)
      : Error(message), path_(std::move(path)), native_error_(native_error) {}
  const std::string& path() const { return path_; }
  int native_error() const { return native_error_; }

 private:
  std::string path_;
  int native_error_;
};

class DiskFullError : public StorageError {
 public:
  using StorageError::StorageError;
};

class CorruptDataError : public StorageError {
 public:
  using StorageError::StorageError;
};

}  // namespace spillover
