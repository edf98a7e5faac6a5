#include "tiers/scratch_file.hpp"

#include <fcntl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "base/bytes.hpp"
#include "base/error.hpp"
#include "tiers/extent_space.hpp"
#include "tiers/file_operations.hpp"

namespace spillover {
namespace {

// Files grow in steps of an eighth, within these bounds, so that extents lie together on the
// device.
constexpr uint64_t kGrowthBytesMin = 16 * kMiB;
constexpr uint64_t kGrowthBytesMax = 256 * kMiB;

constexpr mode_t kMode = S_IRUSR | S_IWUSR;

std::string describe(int native_error) {
  return std::string(std::strerror(native_error)) + " (errno " + std::to_string(native_error) + ")";
}

// Each missing folder on the way is made for its owner alone.
void make_folders(const std::string& folder) {
  for (size_t end = folder.find('/', 1);; end = folder.find('/', end + 1)) {
    const std::string part = folder.substr(0, end);
    if (file_operations().make_folder(part.c_str(), 0700) != 0 && errno != EEXIST &&
        errno != EISDIR && errno != EROFS && errno != EACCES) {
      const int native_error = errno;
      throw StorageError("cannot make the spill folder " + part + ": " + describe(native_error),
                         part, native_error);
    }
    if (end == std::string::npos) return;
  }
}

// For file systems without O_TMPFILE: a file that nobody else made, unlinked before it is used.
int open_and_unlink(int folder, int flags) {
  for (int attempt = 0; attempt < 100; ++attempt) {
    uint64_t number = 0;
    if (getrandom(&number, sizeof number, 0) != sizeof number) return -1;
    std::array<char, 48> name{};
    std::snprintf(name.data(), name.size(), ".spillover-%016llx",
                  static_cast<unsigned long long>(number));
    const int file =
        file_operations().open(folder, name.data(), flags | O_CREAT | O_EXCL | O_NOFOLLOW, kMode);
    if (file < 0 && errno == EEXIST) continue;
    if (file < 0 || file_operations().unlink(folder, name.data()) == 0) return file;
    // A file that keeps its name would be there for others to read after the process is gone.
    const int native_error = errno;
    close(file);
    errno = native_error;
    return -1;
  }
  errno = EEXIST;
  return -1;
}

int open_unnamed(int folder, int flags) {
  // O_EXCL here forbids giving the file a name later.
  const int file = file_operations().open(folder, ".", flags | O_TMPFILE | O_EXCL, kMode);
  if (file >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != ENOENT)) return file;
  return open_and_unlink(folder, flags);
}

bool means_full(int native_error) {
  return native_error == ENOSPC || native_error == EDQUOT;
}

}  // namespace

ScratchFile::ScratchFile(const std::string& folder, Preallocation preallocation)
    : folder_(folder), is_preallocated_(preallocation == Preallocation::kReserve) {
  if (folder.empty()) throw ConfigError("a spill folder must have a name");
  make_folders(folder);
  const int directory =
      file_operations().open(AT_FDCWD, folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
  if (directory < 0) {
    const int native_error = errno;
    throw StorageError("cannot open the spill folder " + folder + ": " + describe(native_error),
                       folder, native_error);
  }
  constexpr int kFlags = O_RDWR | O_CLOEXEC;
  descriptor_ = open_unnamed(directory, kFlags | O_DIRECT);
  if (descriptor_ < 0 && errno == EINVAL) {
    is_direct_ = false;
    descriptor_ = open_unnamed(directory, kFlags);
  }
  const int native_error = errno;
  close(directory);
  if (descriptor_ < 0) {
    throw StorageError(
        "cannot make a file in the spill folder " + folder + ": " + describe(native_error), folder,
        native_error);
  }
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
      throw_error("reserving", reserved_end_, end - reserved_end_, native_error);
    }
  }
}

void ScratchFile::give_back(uint64_t end) noexcept {
  // Where it fails the space stays reserved, and may be given back another time.
  if (reserved_end_ <= end || file_operations().truncate(descriptor_, end) != 0) return;
  reserved_end_ = end;
}

void ScratchFile::transfer(TransferDirection direction, std::byte* data, size_t size_bytes,
                           uint64_t offset, uint32_t& resubmits) const {
  TransferProgress progress(direction, size_bytes);
  auto next = TransferProgress::Next::kRepeat;
  for (bool is_first = true; next == TransferProgress::Next::kRepeat; is_first = false) {
    if (!is_first) ++resubmits;
    const size_t done_bytes = progress.done_bytes();
    next = progress.advance(file_operations().transfer(descriptor_, direction, data + done_bytes,
                                                       progress.left_bytes(), offset + done_bytes));
  }
  if (next == TransferProgress::Next::kFailed) throw_failure(progress, offset);
}

void ScratchFile::throw_failure(const TransferProgress& progress, uint64_t offset) const {
  offset += progress.done_bytes();
  if (progress.is_cut()) {
    throw CorruptDataError("the scratch file in " + folder_ + " ends at offset " +
                               std::to_string(offset) + ", where " +
                               format_bytes(progress.left_bytes()) +
                               " more were written: it was cut by another program",
                           folder_, EIO);
  }
  throw_error(progress.direction() == TransferDirection::kWrite ? "writing" : "reading", offset,
              progress.left_bytes(), progress.native_error());
}

void ScratchFile::throw_error(const char* operation, uint64_t offset, size_t size_bytes,
                              int native_error) const {
  const std::string message = std::string(operation) + " " + format_bytes(size_bytes) +
                              " at offset " + std::to_string(offset) + " of the scratch file in " +
                              folder_ + " failed: " + describe(native_error);
  if (means_full(native_error)) {
    throw DiskFullError(message + ". Free space there, or add another folder", folder_,
                        native_error);
  }
  throw StorageError(message, folder_, native_error);
}

}  // namespace spillover
