#include "tiers/named_scratch.hpp"

#include <fcntl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include "base/crc32c.hpp"
#include "base/file_descriptor.hpp"
#include "tiers/file_operations.hpp"

namespace spillover {
namespace {

constexpr int kAttemptsMax = 100;
constexpr mode_t kMode = S_IRUSR | S_IWUSR;
constexpr size_t kNumberDigits = 16;

std::string name_of(std::string_view number) {
  std::array<char, 16> check{};
  std::snprintf(check.data(), check.size(), "-%08x", crc32c(number.data(), number.size(), 0));
  return std::string(kScratchPrefix).append(number).append(check.data());
}

bool is_scratch_name(const std::string& name) {
  const std::string_view prefix = kScratchPrefix;
  if (name.compare(0, prefix.size(), prefix) != 0) return false;
  return name == name_of(std::string_view(name).substr(prefix.size()).substr(0, kNumberDigits));
}

// Empty, with errno set, where the system has no random numbers.
std::string new_name() {
  uint64_t number = 0;
  if (getrandom(&number, sizeof number, 0) != sizeof number) return {};
  std::array<char, kNumberDigits + 1> digits{};
  std::snprintf(digits.data(), digits.size(), "%016llx", static_cast<unsigned long long>(number));
  return name_of(digits.data());
}

// The lock is held, so that neither answer changes any more.
bool is_abandoned(int folder, const std::string& name, int file) {
  struct stat opened{};
  struct stat named{};
  return fstat(file, &opened) == 0 && S_ISREG(opened.st_mode) && opened.st_size == 0 &&
         opened.st_nlink == 1 && fstatat(folder, name.c_str(), &named, AT_SYMLINK_NOFOLLOW) == 0 &&
         named.st_dev == opened.st_dev && named.st_ino == opened.st_ino;
}

bool remove_if_abandoned(int folder, const std::string& name) {
  if (!is_scratch_name(name)) return false;
  // Not to be held up by what is no file.
  constexpr int kFlags = O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC;
  const FileDescriptor file(file_operations().open(folder, name.c_str(), kFlags, 0));
  return file.is_open() && file_operations().lock(file.number()) == 0 &&
         is_abandoned(folder, name, file.number()) &&
         file_operations().unlink(folder, name.c_str()) == 0;
}

}  // namespace

int open_named_scratch(int folder, int flags) {
  for (int attempt = 0; attempt < kAttemptsMax; ++attempt) {
    const std::string name = new_name();
    if (name.empty()) return -1;
    const int file =
        file_operations().open(folder, name.c_str(), flags | O_CREAT | O_EXCL | O_NOFOLLOW, kMode);
    if (file < 0) {
      const int native_error = errno;
      if (native_error == EEXIST) continue;
      // Some file systems make the file before they refuse O_DIRECT.
      if (native_error == EINVAL) file_operations().unlink(folder, name.c_str());
      errno = native_error;
      return -1;
    }
    // Where it cannot be locked, others cannot either, and leave it alone.
    static_cast<void>(file_operations().lock(file));
    if (file_operations().unlink(folder, name.c_str()) == 0) return file;
    // One that keeps its name would be there for others to read after the process is gone.
    const int native_error = errno;
    close(file);
    if (native_error == ENOENT) continue;  // Somebody has removed it; see Note [Abandoned scratch].
    errno = native_error;
    return -1;
  }
  errno = EEXIST;
  return -1;
}

size_t remove_abandoned_scratch(int folder) noexcept {
  size_t removed = 0;
  try {
    std::vector<std::string> names;
    if (file_operations().list(folder, names) != 0) return 0;
    for (const std::string& name : names) removed += remove_if_abandoned(folder, name) ? 1 : 0;
  } catch (const std::bad_alloc&) {
    // Whoever opens a store next finds the rest.
  }
  return removed;
}

}  // namespace spillover
