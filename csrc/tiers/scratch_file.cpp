#include "tiers/scratch_file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/bytes.hpp"
#include "base/error.hpp"
#include "base/file_descriptor.hpp"
#include "tiers/extent_space.hpp"
#include "tiers/file_operations.hpp"
#include "tiers/named_scratch.hpp"

namespace spillover {
namespace {

// Files grow in steps of an eighth, within these bounds, so that extents lie together on the
// device.
constexpr uint64_t kGrowthBytesMin = 16 * kMiB;
constexpr uint64_t kGrowthBytesMax = 256 * kMiB;

constexpr mode_t kMode = S_IRUSR | S_IWUSR;

// Each missing folder on the way is made for its owner alone.
void make_folders(const std::string& folder) {
  for (size_t end = folder.find('/', 1);; end = folder.find('/', end + 1)) {
    const std::string part = folder.substr(0, end);
    if (file_operations().make_folder(part.c_str(), 0700) != 0 && errno != EEXIST &&
        errno != EISDIR && errno != EROFS && errno != EACCES) {
      const int native_error = errno;
      throw StorageError(
          "cannot make the spill folder " + part + ": " + describe_errno(native_error), part,
          native_error);
    }
    if (end == std::string::npos) return;
  }
}

int open_unnamed(int folder, int flags) {
  // O_EXCL here forbids giving the file a name later.
  const int file = file_operations().open(folder, ".", flags | O_TMPFILE | O_EXCL, kMode);
  if (file >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != ENOENT)) return file;
  return open_named_scratch(folder, flags);
}

}  // namespace

ScratchFile::ScratchFile(const std::string& folder, Preallocation preallocation)
    : folder_(folder), is_preallocated_(preallocation == Preallocation::kReserve) {
  if (folder.empty()) throw ConfigError("a spill folder must have a name");
  make_folders(folder);
  const FileDescriptor directory(
      file_operations().open(AT_FDCWD, folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0));
  if (!directory.is_open()) {
    const int native_error = errno;
    throw StorageError(
        "cannot open the spill folder " + folder + ": " + describe_errno(native_error), folder,
        native_error);
  }
  constexpr int kFlags = O_RDWR | O_CLOEXEC;
  descriptor_ = open_unnamed(directory.number(), kFlags | O_DIRECT);
  if (descriptor_ < 0 && errno == EINVAL) {
    is_direct_ = false;
    descriptor_ = open_unnamed(directory.number(), kFlags);
  }
  if (descriptor_ < 0) {
    const int native_error = errno;
    throw StorageError(
        "cannot make a file in the spill folder " + folder + ": " + describe_errno(native_error),
        folder, native_error);
  }
  remove_abandoned_scratch(directory.number());
}

ScratchFile::~ScratchFile() {
  // Nothing is lost if this fails: the contents die with the file.
  if (descriptor_ >= 0) close(descriptor_);
}

ScratchFile::ScratchFile(ScratchFile&& other) noexcept
    : folder_(std::move(other.folder_)),
      descriptor_(std::exchange(other.descriptor_, -1)),
      is_direct_(other.is_direct_),
      is_preallocated_(other.is_preallocated_),
      reserved_end_(other.reserved_end_) {}

ScratchFile& ScratchFile::operator=(ScratchFile&& other) noexcept {
  std::swap(folder_, other.folder_);
  std::swap(descriptor_, other.descriptor_);
  std::swap(is_direct_, other.is_direct_);
  std::swap(is_preallocated_, other.is_preallocated_);
  std::swap(reserved_end_, other.reserved_end_);
  return *this;
}

void ScratchFile::reserve(uint64_t end, uint64_t end_max) {
  if (end <= reserved_end_) return;
  if (!is_preallocated_) {
    reserved_end_ = end;
    return;
  }
  // A step past the need may find the disk full when the need itself still fits.
  const uint64_t step = std::clamp<uint64_t>(end / 8, kGrowthBytesMin, kGrowthBytesMax);
  for (const uint64_t target : {std::min(round_up(end + step, kMiB), end_max), end}) {
    int native_error = EINTR;
    while (native_error == EINTR) {
      const uint64_t missing_bytes = target - reserved_end_;
      native_error =
          file_operations().allocate(descriptor_, reserved_end_, missing_bytes) == 0 ? 0 : errno;
    }
    if (native_error == 0) {
      reserved_end_ = target;
      return;
    }
    if (native_error == EOPNOTSUPP || native_error == ENOSYS || native_error == EINVAL) {
      is_preallocated_ = false;
      reserved_end_ = end;
      return;
    }
    if (target == end || !(means_full(native_error) || native_error == EFBIG)) {
      blocks().throw_error("reserving", reserved_end_, end - reserved_end_, native_error);
    }
  }
}

void ScratchFile::give_back(uint64_t end) noexcept {
  // Where it fails the space stays reserved, and may be given back another time.
  if (reserved_end_ <= end || file_operations().truncate(descriptor_, end) != 0) return;
  reserved_end_ = end;
}

}  // namespace spillover
