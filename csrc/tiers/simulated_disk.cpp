#include "tiers/simulated_disk.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "base/check.hpp"

namespace spillover {
namespace {

constexpr size_t kNoNode = SIZE_MAX;

int fail(int native_error) {
  errno = native_error;
  return -1;
}

FileDescriptor make_memory_file() {
  FileDescriptor file(memfd_create("spillover-simulated", MFD_CLOEXEC));
  SPILLOVER_CHECK(file.is_open(), "memfd_create failed");
  return file;
}

uint64_t size_of(int file) {
  struct stat found{};
  return fstat(file, &found) == 0 ? static_cast<uint64_t>(found.st_size) : 0;
}

}  // namespace

// Tells the history when the write is complete.
class SimulatedDisk::RecordedWrite : public TransferPlan {
 public:
  RecordedWrite(SimulatedDisk& disk, size_t node, size_t event, std::byte* data, size_t size_bytes)
      : TransferPlan(data, size_bytes), disk_(disk), node_(node), event_(event) {}

  ssize_t finish(ssize_t result) noexcept override {
    const std::lock_guard lock(disk_.mutex_);
    disk_.record({DiskEvent::Kind::kWritten, node_, event_, 0, {}, {}, {}});
    return result;
  }

 private:
  SimulatedDisk& disk_;
  const size_t node_;
  const size_t event_;
};

SimulatedDisk& SimulatedDisk::instance() {
  static auto& disk = *new SimulatedDisk;
  return disk;
}

void SimulatedDisk::begin() {
  DiskImage empty;
  empty.nodes.push_back({true, {}, {}});
  {
    const std::lock_guard lock(mutex_);
    load(std::move(empty));
  }
  replace_file_operations(this);
}

void SimulatedDisk::end() {
  replace_file_operations(nullptr);
  const std::lock_guard lock(mutex_);
  load({});
}

size_t SimulatedDisk::event_count() const {
  const std::lock_guard lock(mutex_);
  return events_.size();
}

std::shared_ptr<DiskHistory> SimulatedDisk::take_history() const {
  const std::lock_guard lock(mutex_);
  return std::make_shared<DiskHistory>(start_, events_);
}

void SimulatedDisk::crash(const DiskHistory& history, const DiskHistory::Cut& cut) {
  DiskImage image = history.image(cut);
  const std::lock_guard lock(mutex_);
  load(std::move(image));
}

void SimulatedDisk::load(DiskImage image) {
  nodes_.clear();
  open_.clear();
  events_.clear();
  nodes_.resize(image.nodes.size());
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const DiskImage::Node& from = image.nodes[i];
    nodes_[i].is_folder = from.is_folder;
    nodes_[i].names = from.names;
    if (from.is_folder) continue;
    nodes_[i].file = make_memory_file();
    const ssize_t written =
        pwrite(nodes_[i].file.number(), from.contents.data(), from.contents.size(), 0);
    SPILLOVER_CHECK(written == static_cast<ssize_t>(from.contents.size()),
                    "the memory for a simulated disk is not there");
  }
  start_ = std::move(image);
}

size_t SimulatedDisk::record(DiskEvent event) {
  events_.push_back(std::move(event));
  return events_.size() - 1;
}

size_t SimulatedDisk::lookup(size_t folder, const std::string& name) const {
  const auto found = nodes_[folder].names.find(name);
  return found == nodes_[folder].names.end() ? kNoNode : found->second;
}

size_t SimulatedDisk::find(const std::string& path) const {
  size_t node = 0;
  for (size_t begin = 1; begin < path.size() && node != kNoNode;) {
    const size_t end = std::min(path.find('/', begin), path.size());
    node = lookup(node, path.substr(begin, end - begin));
    begin = end + 1;
  }
  return node;
}

size_t SimulatedDisk::make_node(size_t folder, const std::string& name, bool is_folder) {
  const size_t node = nodes_.size();
  nodes_.emplace_back();
  nodes_[node].is_folder = is_folder;
  if (!is_folder) nodes_[node].file = make_memory_file();
  nodes_[folder].names[name] = node;
  record({DiskEvent::Kind::kLink, folder, node, is_folder ? uint64_t{1} : 0, {}, name, {}});
  return node;
}

int SimulatedDisk::open_node(size_t node) {
  int file = -1;
  if (nodes_[node].is_folder) {
    file = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
  } else {
    const std::string path = "/proc/self/fd/" + std::to_string(nodes_[node].file.number());
    file = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  }
  if (file >= 0) open_[file] = node;
  return file;
}

size_t SimulatedDisk::node_of(int file) const {
  const auto found = open_.find(file);
  SPILLOVER_CHECK(found != open_.end(), "a file that was opened before the simulated disk began");
  return found->second;
}

int SimulatedDisk::make_folder(const char* path, mode_t /*mode*/) {
  const std::lock_guard lock(mutex_);
  const std::string whole(path);
  if (find(whole) != kNoNode) return fail(EEXIST);
  const size_t slash = whole.rfind('/');
  const size_t parent = find(whole.substr(0, slash));
  if (parent == kNoNode) return fail(ENOENT);
  make_node(parent, whole.substr(slash + 1), true);
  return 0;
}

int SimulatedDisk::open(int folder, const char* name, int flags, mode_t /*mode*/) {
  const std::lock_guard lock(mutex_);
  if ((flags & O_TMPFILE) == O_TMPFILE) return fail(EOPNOTSUPP);
  size_t node = folder == AT_FDCWD ? find(name) : lookup(node_of(folder), name);
  if (node != kNoNode && (flags & O_CREAT) != 0 && (flags & O_EXCL) != 0) return fail(EEXIST);
  if (node == kNoNode) {
    if ((flags & O_CREAT) == 0) return fail(ENOENT);
    node = make_node(node_of(folder), name, false);
  }
  return open_node(node);
}

int SimulatedDisk::unlink(int folder, const char* name) {
  const std::lock_guard lock(mutex_);
  const size_t node = node_of(folder);
  if (nodes_[node].names.erase(name) == 0) return fail(ENOENT);
  record({DiskEvent::Kind::kUnlink, node, 0, 0, {}, name, {}});
  return 0;
}

int SimulatedDisk::rename(int folder, const char* name, const char* new_name) {
  const std::lock_guard lock(mutex_);
  const size_t node = node_of(folder);
  const size_t target = lookup(node, name);
  if (target == kNoNode) return fail(ENOENT);
  nodes_[node].names.erase(name);
  nodes_[node].names[new_name] = target;
  record({DiskEvent::Kind::kRename, node, target, 0, {}, name, new_name});
  return 0;
}

int SimulatedDisk::allocate(int file, uint64_t offset, uint64_t size_bytes) {
  return size_of(file) < offset + size_bytes ? truncate(file, offset + size_bytes) : 0;
}

int SimulatedDisk::truncate(int file, uint64_t size_bytes) {
  if (FileOperations::truncate(file, size_bytes) != 0) return -1;
  const std::lock_guard lock(mutex_);
  record({DiskEvent::Kind::kResize, node_of(file), 0, size_bytes, {}, {}, {}});
  return 0;
}

int SimulatedDisk::sync(int file, SyncKind /*kind*/) {
  size_t begun = 0;
  size_t node = 0;
  {
    const std::lock_guard lock(mutex_);
    node = node_of(file);
    begun = record({DiskEvent::Kind::kSync, node, 0, 0, {}, {}, {}});
  }
  const std::lock_guard lock(mutex_);
  record({DiskEvent::Kind::kSynced, node, begun, 0, {}, {}, {}});
  return 0;
}

std::unique_ptr<TransferPlan> SimulatedDisk::plan(int file, TransferDirection direction,
                                                  std::byte* data, size_t size_bytes,
                                                  uint64_t offset) {
  if (direction == TransferDirection::kRead) return nullptr;
  const std::lock_guard lock(mutex_);
  const size_t node = node_of(file);
  const size_t event =
      record({DiskEvent::Kind::kWrite, node, 0, offset, {data, data + size_bytes}, {}, {}});
  return std::make_unique<RecordedWrite>(*this, node, event, data, size_bytes);
}

}  // namespace spillover
