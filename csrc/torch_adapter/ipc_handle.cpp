#include "torch_adapter/ipc_handle.hpp"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "torch_adapter/allocator.hpp"

namespace spillover::torch_adapter {
namespace {

// Of the torch that this is compiled for, and the newest that is understood.
constexpr char kVersion = SPILLOVER_TORCH_AT_LEAST(2, 13) ? 3 : 2;
constexpr char kVersionMax = 3;

constexpr char kFixed = 'c';
constexpr char kMapped = 'e';
constexpr char kMappedSizes = 's';

constexpr size_t kFixedBytes = sizeof(spillover_shared_block::handle);
constexpr char kIdentities[] = "spillover identities";

// torch's structures, as it writes them; what it leaves uninitialised is zero here.
struct Header {
  int32_t process = 0;
  int32_t padding = 0;
  uint64_t chunk_bytes = 0;
  uint64_t chunk_count = 0;
};
struct FileKind {
  int32_t number = 1;  // 1: a file descriptor; 2: a fabric handle
  int32_t padding = 0;
};
constexpr int32_t kFiles = 1;
constexpr size_t kFabricHandleBytes = 64;

struct SizedChunk {
  uint64_t size_bytes = 0;
  uint64_t identity = 0;
  int32_t file = 0;
  int32_t padding = 0;
};

template <class Value>
void append(std::string& text, const Value& value) {
  static_assert(std::is_trivially_copyable_v<Value>);
  text.append(reinterpret_cast<const char*>(&value), sizeof value);
}

class Reader {
 public:
  explicit Reader(const std::string& text) : text_(text) {}

  size_t left() const { return text_.size() - position_; }

  template <class Value>
  Value read() {
    static_assert(std::is_trivially_copyable_v<Value>);
    const std::string bytes = read_bytes(sizeof(Value));
    Value value;
    std::memcpy(&value, bytes.data(), sizeof value);
    return value;
  }

  std::string read_bytes(size_t size_bytes) {
    TORCH_CHECK(size_bytes <= left(), "spillover: the IPC handle of ", text_.size(),
                " bytes ends too early: it was cut, or is none");
    position_ += size_bytes;
    return text_.substr(position_ - size_bytes, size_bytes);
  }

  bool skip_if(const char* word) {
    if (text_.compare(position_, std::strlen(word), word) != 0) return false;
    position_ += std::strlen(word);
    return true;
  }

 private:
  const std::string& text_;
  size_t position_ = 0;
};

bool have_one_size(const std::vector<spillover_shared_chunk>& chunks) {
  return std::all_of(chunks.begin(), chunks.end(), [&](const spillover_shared_chunk& chunk) {
    return chunk.size_bytes == chunks.front().size_bytes;
  });
}

void encode_mapped(const IpcHandle& handle, std::string& text) {
  append(text, Header{handle.process, 0, handle.chunks.front().size_bytes, handle.chunks.size()});
  if (kVersion >= 3) append(text, FileKind{});
  for (const spillover_shared_chunk& chunk : handle.chunks) append(text, int32_t{chunk.file});
  text += kIdentities;
  for (const spillover_shared_chunk& chunk : handle.chunks) append(text, chunk.identity);
}

void encode_sizes(const IpcHandle& handle, std::string& text) {
  append(text, int32_t{handle.process});
  append(text, uint64_t{handle.chunks.size()});
  for (const spillover_shared_chunk& chunk : handle.chunks) {
    append(text, SizedChunk{chunk.size_bytes, chunk.identity, chunk.file, 0});
  }
}

void check_count(uint64_t count, size_t each_bytes, const Reader& reader) {
  TORCH_CHECK(count != 0 && count <= reader.left() / each_bytes, "spillover: the IPC handle names ",
              count, " chunks of memory and has room for ", reader.left() / each_bytes,
              ": it was cut, or is none");
}

void decode_mapped(char version, Reader& reader, IpcHandle& handle) {
  const auto header = reader.read<Header>();
  handle.process = header.process;
  // Before version 3 the length alone says which kind it is.
  const bool is_fabric = version >= 3
                             ? reader.read<FileKind>().number != kFiles
                             : header.chunk_count != 0 &&
                                   reader.left() / kFabricHandleBytes == header.chunk_count &&
                                   reader.left() % kFabricHandleBytes == 0;
  TORCH_CHECK_NOT_IMPLEMENTED(
      !is_fabric,
      "spillover's allocator cannot open memory that is shared by fabric handles; set "
      "PYTORCH_CUDA_ALLOC_CONF=expandable_segments_handle_type:posix_fd in the sending process");
  check_count(header.chunk_count, sizeof(int32_t), reader);
  for (uint64_t i = 0; i < header.chunk_count; ++i) {
    handle.chunks.push_back({header.chunk_bytes, reader.read<int32_t>(), 0});
  }
  if (!reader.skip_if(kIdentities)) return;
  for (spillover_shared_chunk& chunk : handle.chunks) chunk.identity = reader.read<uint64_t>();
}

void decode_sizes(Reader& reader, IpcHandle& handle) {
  handle.process = reader.read<int32_t>();
  const auto count = reader.read<uint64_t>();
  check_count(count, sizeof(SizedChunk), reader);
  for (uint64_t i = 0; i < count; ++i) {
    const auto chunk = reader.read<SizedChunk>();
    handle.chunks.push_back({chunk.size_bytes, chunk.file, chunk.identity});
  }
}

}  // namespace

std::string encode(const IpcHandle& handle) {
  std::string text{kVersion};
  if (handle.chunks.empty()) {
    text += kFixed + handle.fixed;
  } else if (have_one_size(handle.chunks)) {
    text += kMapped;
    encode_mapped(handle, text);
  } else {
    text += kMappedSizes;
    encode_sizes(handle, text);
  }
  return text;
}

IpcHandle decode(const std::string& text) {
  Reader reader(text);
  IpcHandle handle;
  const auto version = reader.read<char>();
  TORCH_CHECK(version >= 1 && version <= kVersionMax, "spillover: the IPC handle has version ",
              int{version}, ", where 1 to ", int{kVersionMax},
              " are known: a newer torch has sent it, or it is none");
  const auto kind = reader.read<char>();
  switch (kind) {
    case kFixed:
      handle.fixed = reader.read_bytes(kFixedBytes);
      return handle;
    case kMapped:
      decode_mapped(version, reader, handle);
      return handle;
    case kMappedSizes:
      decode_sizes(reader, handle);
      return handle;
    default:
      TORCH_CHECK(false, "spillover: the IPC handle is of kind ", int{kind},
                  ", where 'c', 'e' and 's' are known: a newer torch has sent it, or it is none");
  }
}

}  // namespace spillover::torch_adapter
