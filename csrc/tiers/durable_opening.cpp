#include "tiers/durable_opening.hpp"

#include <sys/random.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <utility>

#include "base/bytes.hpp"
#include "base/crc32c.hpp"
#include "base/error.hpp"
#include "tiers/extent_io.hpp"
#include "tiers/work_annotation.hpp"

namespace spillover {
namespace {

constexpr uint64_t kExtentBytesDefault = 8 * kMiB;
constexpr uint64_t kExtraBytesDefault = kMiB;
constexpr uint64_t kExtraBytesMax = kGiB;

using Folders = std::vector<std::unique_ptr<DurableFolder>>;

// Bytes go through memory that can be given to the disk as it is.
void write_blocks(const BlockFile& file, ByteSpan bytes, uint64_t offset) {
  const size_t padded_bytes = round_up(bytes.size(), kDiskBlockBytes);
  const BlockMemory memory = allocate_blocks(padded_bytes);
  std::memcpy(memory.get(), bytes.data(), bytes.size());
  std::memset(memory.get() + bytes.size(), 0, padded_bytes - bytes.size());
  uint32_t resubmits = 0;
  const AnnotatedWork work(kDiskWrite, padded_bytes);
  file.transfer(TransferDirection::kWrite, memory.get(), padded_bytes, offset, resubmits);
}

Bytes read_blocks(const BlockFile& file, uint64_t size_bytes, uint64_t offset) {
  const size_t padded_bytes = round_up(size_bytes, kDiskBlockBytes);
  const BlockMemory memory = allocate_blocks(padded_bytes);
  uint32_t resubmits = 0;
  const AnnotatedWork work(kDiskRead, padded_bytes);
  file.transfer(TransferDirection::kRead, memory.get(), padded_bytes, offset, resubmits);
  return {memory.get(), memory.get() + size_bytes};
}

[[noreturn]] void corrupt(const DurableFolder& folder, const std::string& what) {
  throw CorruptDataError(what + " of " + folder.file().name() +
                             " does not check out: it changed on the disk. Check that device; the "
                             "store cannot be used",
                         folder.path(), EIO);
}

DurableHeader read_header(const DurableFolder& folder) {
  const Bytes block = read_blocks(folder.file(), kDiskBlockBytes, 0);
  const auto header = decode_header(block, folder.file().name());
  if (!header) corrupt(folder, "the header");
  return *header;
}

std::vector<DurableEntry> read_table(const DurableFolder& folder, const DurableHeader& header) {
  const Bytes table = read_blocks(folder.file(), header.table_bytes, DurableLayout::kTableOffset);
  if (crc32c(table.data(), table.size()) != header.table_crc32c) corrupt(folder, "the table");
  auto entries = decode_table(table);
  if (!entries) corrupt(folder, "the table");
  return std::move(*entries);
}

// Nothing where the copy is damaged, which it may be so that its block cannot be read.
std::optional<DurableRecord> read_record(const DurableFolder& folder, const DurableShape& shape,
                                         uint64_t offset, std::exception_ptr* error) {
  try {
    return decode_record(read_blocks(folder.file(), kDiskBlockBytes, offset), shape.id);
  } catch (const StorageError&) {
    *error = std::current_exception();
    return std::nullopt;
  }
}

std::string joined(const Folders& folders) {
  std::string text;
  for (const auto& folder : folders) text += (text.empty() ? "" : ", ") + folder->path();
  return text;
}

[[noreturn]] void throw_no_store(const Folders& folders) {
  throw StorageError(
      "there is no durable store in " + joined(folders) + "; to make one, say which entries it has",
      folders.front()->path(), ENOENT);
}

// Where there is no store, there need be no lock file either.
void tidy(const Folders& folders) noexcept {
  for (const auto& folder : folders) {
    try {
      if (!folder->has(kDurableName) && !folder->has(kDurableNewName)) {
        folder->remove(kDurableLockName);
      }
    } catch (const StorageError&) {
      // An empty lock file is left.
    }
  }
}

Folders lock_folders(const std::vector<std::string>& paths, DurableFolder::WhenMissing missing) {
  if (paths.empty()) throw ConfigError("a durable store needs at least one folder");
  Folders folders;
  for (const std::string& path : paths) {
    folders.push_back(std::make_unique<DurableFolder>(path, missing));
  }
  const auto has_one = [](const auto& folder) {
    return folder->has(kDurableName) || folder->has(kDurableNewName);
  };
  if (missing == DurableFolder::WhenMissing::kFail && !std::ranges::any_of(folders, has_one)) {
    throw_no_store(folders);
  }
  size_t locked = 0;
  try {
    for (; locked < folders.size(); ++locked) folders[locked]->lock();
  } catch (...) {
    folders.resize(locked);  // The others' lock files may be somebody else's.
    tidy(folders);
    throw;
  }
  return folders;
}

// Whether the files without the primary are of a store that was being made or deleted.
bool is_unfinished(const Folders& folders, const DurableHeader& part) {
  return std::ranges::any_of(folders, [&](const auto& folder) {
    if (!folder->open(kDurableNewName)) return false;
    try {
      const DurableHeader header = read_header(*folder);
      return header.folder_index == 0 && header.shape.id == part.shape.id;
    } catch (const CorruptDataError&) {
      return false;
    }
  });
}

// Some folders have a file and some have none: an error, or all are removed.
void clear_unfinished(const Folders& folders) {
  const DurableFolder* missing = nullptr;
  std::optional<DurableHeader> part;
  bool has_primary = false;
  for (const auto& folder : folders) {
    if (!folder->open(kDurableName)) {
      if (missing == nullptr) missing = folder.get();
      continue;
    }
    part = read_header(*folder);
    has_primary = has_primary || part->folder_index == 0;
  }
  if (has_primary || !is_unfinished(folders, *part)) {
    throw StorageError("the folder " + missing->path() +
                           " has no part of the durable store, which has " +
                           std::to_string(part->shape.folder_count) +
                           " folders: it is lost, or not mounted. Give the folder back; without it "
                           "the store can only be deleted",
                       missing->path(), ENODEV);
  }
  for (const auto& folder : folders) {
    folder->remove(kDurableName);
    folder->sync_folder();
  }
}

DurableShape shape_of(const DurableOptions& options) {
  check_entries(options.entries);
  DurableShape shape;
  if (getrandom(shape.id.data(), shape.id.size(), 0) != static_cast<ssize_t>(shape.id.size())) {
    throw StorageError("no random numbers: " + describe_errno(errno), "", errno);
  }
  shape.folder_count = static_cast<uint32_t>(options.folders.size());
  shape.extent_bytes_max = options.extent_bytes_max.value_or(kExtentBytesDefault);
  shape.extra_bytes_max = options.extra_bytes_max.value_or(kExtraBytesDefault);
  shape.entries = options.entries;
  if (shape.extent_bytes_max < kDiskBlockBytes || shape.extent_bytes_max > kGiB ||
      shape.extent_bytes_max % kDiskBlockBytes != 0) {
    throw ConfigError("extent_bytes must be a multiple of " + std::to_string(kDiskBlockBytes) +
                      " up to 1 GiB");
  }
  if (shape.extra_bytes_max > kExtraBytesMax) throw ConfigError("extra_limit is 1 GiB at most");
  return shape;
}

// Everything of one file but its name, durably.
void make_file(OpenDurable& store, size_t index) {
  DurableFolder& folder = *store.folders[index];
  if (!folder.make(store.layout->file_bytes(index))) {
    store.notes = "the file system of " + folder.path() +
                  " does not reserve space, so the disk may be full in the middle of a step";
  }
  const Bytes table = encode_table(store.shape.entries);
  const DurableHeader header{store.shape, static_cast<uint32_t>(index), table.size(),
                             crc32c(table.data(), table.size())};
  write_blocks(folder.file(), encode_header(header), 0);
  write_blocks(folder.file(), table, DurableLayout::kTableOffset);
  if (index == 0) {
    store.record = write_manifest(folder, *store.layout, store.manifest, 0);
    for (const size_t copy : {0, 1}) write_record(folder, store, store.record, copy);
  }
  folder.sync(SyncKind::kAll);
  folder.sync_folder();
}

void remove_all(const Folders& folders) noexcept {
  for (const auto& folder : folders) {
    for (const char* name : {kDurableName, kDurableNewName}) {
      try {
        folder->remove(name);
      } catch (const StorageError&) {
        // An unfinished file is left, which the next who makes a store here removes.
      }
    }
  }
  tidy(folders);
}

OpenDurable make_store(Folders folders, const DurableOptions& options) {
  OpenDurable store;
  store.folders = std::move(folders);
  try {
    store.shape = shape_of(options);
    store.layout = std::make_unique<DurableLayout>(store.shape);
    store.manifest.extents.resize(store.layout->extents().size());
    for (const auto& folder : store.folders) folder->remove(kDurableNewName);
    for (size_t i = 0; i < store.folders.size(); ++i) make_file(store, i);
    for (size_t i = store.folders.size(); i-- > 0;) store.folders[i]->publish();
  } catch (...) {
    remove_all(store.folders);
    throw;
  }
  return store;
}

// In the order of their numbers.
std::vector<DurableHeader> read_headers(Folders* folders) {
  std::map<uint32_t, std::pair<DurableHeader, std::unique_ptr<DurableFolder>>> parts;
  const std::string first_path = folders->front()->path();
  const size_t count = folders->size();
  std::optional<DurableHeader> first;
  for (auto& folder : *folders) {
    const DurableHeader header = read_header(*folder);
    if (!first) first = header;
    if (header.shape.id != first->shape.id) {
      throw ConfigError("the folders " + first_path + " and " + folder->path() +
                        " have parts of different durable stores");
    }
    parts.insert_or_assign(header.folder_index, std::make_pair(header, std::move(folder)));
  }
  if (parts.size() != count || first->shape.folder_count != count ||
      parts.rbegin()->first != count - 1) {
    throw ConfigError("the durable store in " + first_path + " has " +
                      std::to_string(first->shape.folder_count) + " folders, and " +
                      std::to_string(count) + " were given: name each once");
  }
  std::vector<DurableHeader> headers;
  folders->clear();
  for (auto& [index, part] : parts) {
    headers.push_back(part.first);
    folders->push_back(std::move(part.second));
  }
  return headers;
}

// Throws ConfigError where the store is not what is asked for.
void check_shape(const DurableShape& shape, const DurableOptions& options,
                 const std::string& path) {
  const std::string store = "the durable store in " + path;
  const std::string advice =
      ". Open it with what it has, or delete it (spillover store delete) and make a new one";
  if (options.extent_bytes_max && *options.extent_bytes_max != shape.extent_bytes_max) {
    throw ConfigError(store + " has extents of " + std::to_string(shape.extent_bytes_max) +
                      " bytes, not of " + std::to_string(*options.extent_bytes_max) + advice);
  }
  if (options.extra_bytes_max && *options.extra_bytes_max > shape.extra_bytes_max) {
    throw ConfigError(store + " has room for " + std::to_string(shape.extra_bytes_max) +
                      " bytes of extra, not for " + std::to_string(*options.extra_bytes_max) +
                      advice);
  }
  if (options.entries.empty()) return;
  std::map<std::string_view, uint64_t> there;
  for (const DurableEntry& entry : shape.entries) there.emplace(entry.name, entry.size_bytes);
  for (const DurableEntry& entry : options.entries) {
    const auto found = there.find(entry.name);
    if (found == there.end()) {
      throw ConfigError(store + " has other entries than were asked for: it has no '" + entry.name +
                        "'" + advice);
    }
    if (found->second != entry.size_bytes) {
      throw ConfigError(store + " has other entries than were asked for: '" + entry.name +
                        "' has " + std::to_string(found->second) + " bytes there and " +
                        std::to_string(entry.size_bytes) + " were asked for" + advice);
    }
    there.erase(found);
  }
  if (!there.empty()) {
    throw ConfigError(store + " has other entries than were asked for: it also has '" +
                      std::string(there.begin()->first) + "'" + advice);
  }
}

// See Note [Recovery].
void recover(OpenDurable& store) {
  const DurableFolder& primary = *store.folders.front();
  std::optional<DurableRecord> newest;
  size_t newest_copy = 0;
  std::exception_ptr error;
  for (const size_t copy : {0, 1}) {
    const auto record =
        read_record(primary, store.shape, store.layout->record_offset(copy), &error);
    if (!record || (newest && newest->sequence >= record->sequence)) continue;
    newest = record;
    newest_copy = copy;
  }
  if (!newest && error) std::rethrow_exception(error);
  if (!newest) corrupt(primary, "both copies of the commit record");
  store.record = *newest;
  if (newest->manifest_slot > 1 || newest->manifest_bytes > store.layout->manifest_bytes()) {
    corrupt(primary, "the commit record");
  }
  const Bytes bytes = read_blocks(primary.file(), newest->manifest_bytes,
                                  store.layout->manifest_offset(newest->manifest_slot));
  if (crc32c(bytes.data(), bytes.size()) != newest->manifest_crc32c) {
    corrupt(primary, "the manifest of commit " + std::to_string(newest->sequence));
  }
  auto manifest = decode_manifest(bytes, newest->sequence);
  if (!manifest || manifest->extents.size() != store.layout->extents().size()) {
    corrupt(primary, "the manifest of commit " + std::to_string(newest->sequence));
  }
  store.manifest = std::move(*manifest);
  for (const size_t copy : {1 - newest_copy, newest_copy}) {
    write_record(primary, store, store.record, copy);
    primary.sync(SyncKind::kData);
  }
}

OpenDurable open_store(Folders folders, const DurableOptions& options) {
  OpenDurable store;
  store.folders = std::move(folders);
  const std::vector<DurableHeader> headers = read_headers(&store.folders);
  store.shape = headers.front().shape;
  for (size_t i = 0; i < headers.size(); ++i) {
    std::vector<DurableEntry> entries = read_table(*store.folders[i], headers[i]);
    if (i > 0 && entries != store.shape.entries) corrupt(*store.folders[i], "the table");
    store.shape.entries = std::move(entries);
  }
  check_shape(store.shape, options, store.folders.front()->path());
  store.layout = std::make_unique<DurableLayout>(store.shape);
  recover(store);
  return store;
}

}  // namespace

OpenDurable open_durable(const DurableOptions& options) {
  using WhenMissing = DurableFolder::WhenMissing;
  const bool may_make = !options.entries.empty();
  Folders folders =
      lock_folders(options.folders, may_make ? WhenMissing::kMake : WhenMissing::kFail);
  try {
    size_t present = 0;
    for (const auto& folder : folders) present += folder->open(kDurableName) ? 1 : 0;
    if (present > 0 && present < folders.size()) {
      clear_unfinished(folders);
      present = 0;
    }
    if (present == 0 && !may_make) throw_no_store(folders);
    if (present == 0) return make_store(std::move(folders), options);
    return open_store(std::move(folders), options);
  } catch (...) {
    // Folders that were handed on are closed by now, or have been seen to.
    if (!folders.empty()) tidy(folders);
    throw;
  }
}

void delete_durable(const std::vector<std::string>& paths) {
  Folders folders = lock_folders(paths, DurableFolder::WhenMissing::kFail);
  const auto is_primary = [](const std::unique_ptr<DurableFolder>& folder) {
    try {
      return folder->open(kDurableName) && read_header(*folder).folder_index == 0;
    } catch (const StorageError&) {
      return false;  // Damaged stores are deleted, too.
    }
  };
  std::stable_partition(folders.begin(), folders.end(), is_primary);
  for (const auto& folder : folders) folder->retire();
  for (size_t i = folders.size(); i-- > 0;) {
    folders[i]->remove(kDurableNewName);
    folders[i]->sync_folder();
    folders[i]->remove(kDurableLockName);
  }
}

void write_record(const DurableFolder& primary, const OpenDurable& store,
                  const DurableRecord& record, size_t copy) {
  write_blocks(primary.file(), encode_record(record, store.shape.id),
               store.layout->record_offset(copy));
}

DurableRecord write_manifest(const DurableFolder& primary, const DurableLayout& layout,
                             const DurableManifest& manifest, uint64_t sequence) {
  const Bytes bytes = encode_manifest(manifest, sequence);
  const auto slot = static_cast<uint32_t>(sequence % 2);
  write_blocks(primary.file(), bytes, layout.manifest_offset(slot));
  return {sequence, slot, bytes.size(), crc32c(bytes.data(), bytes.size())};
}

}  // namespace spillover
