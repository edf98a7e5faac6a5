#include "tiers/uring_engine.hpp"

#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <future>
#include <optional>
#include <utility>

#include "base/bytes.hpp"
#include "base/check.hpp"
#include "base/crc32c.hpp"
#include "base/error.hpp"
#include "tiers/host_annotation.hpp"
#include "trace/recorder.hpp"

namespace spillover {
namespace {

constexpr size_t kNoBounce = SIZE_MAX;
constexpr IoUring::Tag kWakeupTag = UINT64_MAX;

// How many are handed to the kernel in one call while the device has others to do.
constexpr size_t kBatch = 4;

// How often entering the kernel is tried again that has no memory now, a millisecond apart, and how
// long transfers may take to end after that.
constexpr int kAttemptsMax = 1000;
constexpr int kDrainMillisecondsMax = 10'000;

void wait_a_millisecond() {
  std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

bool is_transient(int native_error) {
  return native_error == EAGAIN || native_error == EBUSY || native_error == ENOMEM;
}

}  // namespace

struct UringEngine::Request {
  Request(DiskPiece&& taken, size_t aligned_bytes)
      : direct_bytes(aligned_bytes),
        direct_chunks(round_up(aligned_bytes, kChunkBytes) / kChunkBytes),
        sums(direct_chunks +
             round_up(taken.extent.size_bytes - aligned_bytes, kChunkBytes) / kChunkBytes),
        piece(std::move(taken)) {}

  size_t begin_of(size_t chunk) const {
    return chunk < direct_chunks ? chunk * kChunkBytes
                                 : direct_bytes + (chunk - direct_chunks) * kChunkBytes;
  }
  size_t bytes_of(size_t chunk) const {
    const size_t end = chunk < direct_chunks ? direct_bytes : piece.extent.size_bytes;
    return std::min(kChunkBytes, end - begin_of(chunk));
  }
  bool is_over() const { return running == 0 && (error || started == sums.size()); }

  size_t direct_bytes;  // The rest goes through bounce buffers.
  size_t direct_chunks;
  std::vector<uint32_t> sums;  // Of each chunk.
  size_t started = 0;          // Chunks.
  size_t running = 0;
  std::exception_ptr error;  // The first; no more chunks are started.
  DiskPiece piece;           // Last, so that it stays with the caller where this throws.
};

struct UringEngine::Chunk {
  Requests::iterator request;
  size_t index = 0;
  size_t bounce = kNoBounce;
  std::byte* memory = nullptr;
  uint64_t offset = 0;  // In the file.
  TransferProgress progress{TransferDirection::kRead, 0};
  std::unique_ptr<TransferPlan> plan;
  bool is_delayed = false;
};

UringEngine::UringEngine(const BlockFile& file, DiskPieceOwner& owner, size_t queue_length_max)
    : file_(file), owner_(owner), queue_(queue_length_max) {
  std::promise<void> ready;
  std::future<void> is_ready = ready.get_future();
  thread_ = std::thread([this, promise = std::move(ready)]() mutable { serve(promise); });
  try {
    is_ready.get();
  } catch (...) {
    close();
    throw;
  }
}

UringEngine::~UringEngine() {
  close();
}

bool UringEngine::submit(DiskPiece&& piece) {
  if (!queue_.push(std::move(piece))) return false;
  if (is_sleeping_.exchange(false)) wake();
  return true;
}

void UringEngine::close() noexcept {
  if (!thread_.joinable()) return;
  queue_.close();
  wake();
  thread_.join();
}

void UringEngine::wake() noexcept {
  constexpr uint64_t kOne = 1;
  if (wakeup_.is_open()) static_cast<void>(write(wakeup_.number(), &kOne, sizeof kOne));
}

void UringEngine::serve(std::promise<void>& ready) noexcept {
  pthread_setname_np(pthread_self(), "spillover-uring");
  try {
    set_up();
  } catch (...) {
    ring_.reset();
    ready.set_exception(std::current_exception());
    return;
  }
  ready.set_value();
  run();
  ring_.reset();
}

void UringEngine::set_up() {
  wakeup_ = FileDescriptor(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wakeup_.is_open()) {
    throw StorageError(std::string("io_uring cannot be used: eventfd: ") + std::strerror(errno), "",
                       errno);
  }
  ring_ = std::make_unique<IoUring>(2 * kChunksMax);
  if (!ring_->register_file(file_.descriptor())) notes_ = "the file cannot be registered";
  chunks_.resize(kChunksMax);
  for (size_t i = kChunksMax; i-- > 0;) free_chunks_.push_back(i);
  bounces_ = allocate_blocks(kBouncesMax * kChunkBytes);
  for (size_t i = kBouncesMax; i-- > 0;) free_bounces_.push_back(i);
  register_bounces();
  ring_->add_poll(wakeup_.number(), kWakeupTag);
}

// As many as the limit on locked memory allows; the others work without.
void UringEngine::register_bounces() {
  const auto bounce = [&](size_t i) {
    return iovec{bounces_.get() + i * kChunkBytes, kChunkBytes};
  };
  has_table_ = ring_->make_buffer_table(kBouncesMax + kRegionsMax);
  if (has_table_) {
    while (registered_bounces_ < kBouncesMax &&
           ring_->set_buffer(static_cast<uint32_t>(registered_bounces_),
                             bounce(registered_bounces_)) == 0) {
      ++registered_bounces_;
    }
    for (size_t i = kRegionsMax; i-- > 0;) {
      free_regions_.push_back(static_cast<uint32_t>(kBouncesMax + i));
    }
  } else {
    for (size_t count = kBouncesMax; count > 0 && registered_bounces_ == 0; count /= 2) {
      std::vector<iovec> buffers;
      for (size_t i = 0; i < count; ++i) buffers.push_back(bounce(i));
      if (ring_->register_buffers(buffers) == 0) registered_bounces_ = count;
    }
  }
  if (registered_bounces_ == kBouncesMax) return;
  if (!notes_.empty()) notes_ += "; ";
  notes_ += "the limit on locked memory (ulimit -l) leaves " + std::to_string(registered_bounces_) +
            " of " + std::to_string(kBouncesMax) + " registered buffers";
}

size_t UringEngine::register_memory(std::byte* address, size_t size_bytes) {
  return command([=, this] { return add_regions(address, size_bytes); });
}

void UringEngine::unregister_memory(std::byte* address) noexcept {
  command([=, this] {
    remove_regions(address);
    return size_t{0};
  });
}

// Has the ring thread do it, and waits. Nothing is done, and 0 the answer, once that has ended.
size_t UringEngine::command(std::function<size_t()> what) {
  std::future<size_t> answer;
  {
    const std::lock_guard lock(commands_mutex_);
    if (!takes_commands_) return 0;
    commands_.emplace_back(std::move(what));
    answer = commands_.back().get_future();
  }
  wake();
  return answer.get();
}

void UringEngine::obey() noexcept {
  submit_batch();  // What is queued may name a buffer that a command takes back.
  for (;;) {
    Command command;
    {
      const std::lock_guard lock(commands_mutex_);
      if (commands_.empty()) return;
      command = std::move(commands_.front());
      commands_.pop_front();
    }
    command();
  }
}

// As much from the beginning as the limit on locked memory and the table allow.
size_t UringEngine::add_regions(std::byte* address, size_t size_bytes) {
  size_t done = 0;
  size_t step = kRegionBytesMax;
  while (done < size_bytes && step >= kChunkBytes && !free_regions_.empty()) {
    const size_t part_bytes = std::min(step, size_bytes - done);
    const uint32_t index = free_regions_.back();
    const int native_error = ring_->set_buffer(index, {address + done, part_bytes});
    if (native_error == ENOMEM) {
      step = part_bytes / 2;
      continue;
    }
    if (native_error != 0) break;
    free_regions_.pop_back();
    regions_[address + done] = {address, part_bytes, index};
    done += part_bytes;
  }
  return done;
}

void UringEngine::remove_regions(std::byte* owner) noexcept {
  for (auto region = regions_.lower_bound(owner);
       region != regions_.end() && region->second.owner == owner;) {
    // Where the kernel refuses, the table keeps the pages and the index is not used again.
    if (ring_->set_buffer(region->second.index, {}) == 0) {
      free_regions_.push_back(region->second.index);
    }
    region = regions_.erase(region);
  }
}

// Below zero where the memory is not registered, or not in one part.
int UringEngine::buffer_of(const std::byte* data, size_t size_bytes) const noexcept {
  auto region = regions_.upper_bound(const_cast<std::byte*>(data));
  if (region == regions_.begin()) return -1;
  --region;
  const auto into = static_cast<size_t>(data - region->first);
  if (into + size_bytes > region->second.size_bytes) return -1;
  return static_cast<int>(region->second.index);
}

void UringEngine::run() {
  while (broken_error_ == 0 && take_pieces()) {
    obey();
    start_chunks();
    sleep();
    handle_results();
    finish_requests();
  }
  {
    const std::lock_guard lock(commands_mutex_);
    takes_commands_ = false;
  }
  obey();
  // Without a ring every piece fails, until the engine is closed.
  while (auto piece = queue_.pop()) {
    begin(*piece);
    start_chunks();
    finish_requests();
  }
}

// False once there will be no more to do.
bool UringEngine::take_pieces() {
  while (requests_.size() < kRequestsMax) {
    std::optional<DiskPiece> piece = queue_.try_pop();
    if (!piece) break;
    begin(*piece);
  }
  return !requests_.empty() || !queue_.is_empty() || !queue_.is_closed();
}

void UringEngine::begin(DiskPiece& piece) {
  piece.notes.begun_ns = trace_now_ns();
  try {
    const bool is_write = piece.direction == TransferDirection::kWrite;
    const size_t size_bytes = piece.extent.size_bytes;
    annotate_host_access(is_write ? "disk write" : "disk read", piece.data, size_bytes,
                         is_write ? HostAccess::kRead : HostAccess::kWrite);
    requests_.emplace_back(std::move(piece), direct_bytes(piece.data, size_bytes));
  } catch (...) {
    owner_.finish(piece, std::current_exception());
  }
}

void UringEngine::start_chunks() {
  for (auto request = requests_.begin(); request != requests_.end(); ++request) {
    while (!request->error && request->started < request->sums.size()) {
      if (free_chunks_.empty()) return;
      if (!start_chunk(request)) break;
      // The device gets its first ones at once, and more in batches while it works on those.
      if (running_chunks() <= kBatch || ring_->queued() >= kBatch) submit_batch();
    }
  }
}

// False where no bounce buffer is free.
bool UringEngine::start_chunk(Requests::iterator place) {
  Request& request = *place;
  const bool is_direct = request.started < request.direct_chunks;
  if (!is_direct && free_bounces_.empty()) return false;
  Chunk& chunk = chunks_[free_chunks_.back()];
  free_chunks_.pop_back();
  chunk.request = place;
  chunk.index = request.started++;
  ++request.running;
  const size_t begin = request.begin_of(chunk.index);
  const size_t size_bytes = request.bytes_of(chunk.index);
  const size_t padded_bytes = round_up(size_bytes, kDiskBlockBytes);
  std::byte* const data = request.piece.data + begin;
  const TransferDirection direction = request.piece.direction;
  if (direction == TransferDirection::kWrite) {
    request.sums[chunk.index] = timed_crc32c(data, size_bytes, request.piece.notes);
  }
  chunk.bounce = kNoBounce;
  chunk.memory = data;
  if (!is_direct) {
    chunk.bounce = free_bounces_.back();
    free_bounces_.pop_back();
    chunk.memory = bounces_.get() + chunk.bounce * kChunkBytes;
    if (direction == TransferDirection::kWrite) {
      std::memcpy(chunk.memory, data, size_bytes);
      std::memset(chunk.memory + size_bytes, 0, padded_bytes - size_bytes);
    }
  }
  chunk.offset = request.piece.extent.offset + begin;
  chunk.progress = TransferProgress(direction, padded_bytes);
  issue(chunk);
  return true;
}

// Begins an attempt to transfer what is left of the chunk; a planned error is an attempt that ends
// at once.
void UringEngine::issue(Chunk& chunk) noexcept {
  ssize_t result = 0;
  do {
    const size_t done_bytes = chunk.progress.done_bytes();
    try {
      chunk.plan = file_operations().plan(file_.descriptor(), chunk.progress.direction(),
                                          chunk.memory + done_bytes, chunk.progress.left_bytes(),
                                          chunk.offset + done_bytes);
    } catch (...) {
      end_chunk(chunk, std::current_exception());
      return;
    }
    if (broken_error_ == 0 && chunk.plan != nullptr && chunk.plan->delay_us > 0) {
      chunk.is_delayed = true;
      ring_->add_timeout(chunk.plan->delay_us, static_cast<IoUring::Tag>(&chunk - chunks_.data()));
      return;
    }
    if (broken_error_ == 0 && (chunk.plan == nullptr || chunk.plan->native_error == 0)) {
      hand_over(chunk);
      return;
    }
    result = broken_error_ != 0 ? -broken_error_ : -chunk.plan->native_error;
  } while (advance(chunk, result));
}

void UringEngine::hand_over(Chunk& chunk) noexcept {
  const size_t done_bytes = chunk.progress.done_bytes();
  IoUring::Transfer transfer{
      chunk.progress.direction(), file_.descriptor(), chunk.memory + done_bytes,
      static_cast<uint32_t>(chunk.progress.left_bytes()), chunk.offset + done_bytes};
  if (chunk.bounce == kNoBounce) {
    transfer.buffer = buffer_of(transfer.data, transfer.size_bytes);
  } else if (chunk.bounce < registered_bounces_) {
    transfer.buffer = static_cast<int>(chunk.bounce);
  }
  if (chunk.plan != nullptr) {
    if (chunk.plan->data != transfer.data) transfer.buffer = -1;
    transfer.data = chunk.plan->data;
    transfer.size_bytes = static_cast<uint32_t>(chunk.plan->size_bytes);
  }
  ring_->add_transfer(transfer, static_cast<IoUring::Tag>(&chunk - chunks_.data()));
}

bool UringEngine::advance(Chunk& chunk, ssize_t result) noexcept {
  switch (chunk.progress.advance(result)) {
    case TransferProgress::Next::kRepeat:
      ++chunk.request->piece.notes.resubmits;
      return true;
    case TransferProgress::Next::kDone:
      end_chunk(chunk, nullptr);
      return false;
    case TransferProgress::Next::kFailed:
      break;
  }
  try {
    file_.throw_failure(chunk.progress, chunk.offset);
  } catch (...) {
    end_chunk(chunk, std::current_exception());
  }
  return false;
}

void UringEngine::end_chunk(Chunk& chunk, std::exception_ptr error) noexcept {
  const Requests::iterator request = chunk.request;
  if (!error && chunk.progress.direction() == TransferDirection::kRead) {
    const size_t size_bytes = request->bytes_of(chunk.index);
    std::byte* const data = request->piece.data + request->begin_of(chunk.index);
    if (chunk.bounce != kNoBounce) std::memcpy(data, chunk.memory, size_bytes);
    request->sums[chunk.index] = timed_crc32c(data, size_bytes, request->piece.notes);
  }
  if (error && !request->error) request->error = std::move(error);
  if (chunk.bounce != kNoBounce) free_bounces_.push_back(chunk.bounce);
  chunk.plan.reset();
  free_chunks_.push_back(static_cast<size_t>(&chunk - chunks_.data()));
  --request->running;
}

// Those that are over; apart from what ends a chunk, since that happens while requests are walked.
void UringEngine::finish_requests() noexcept {
  for (auto request = requests_.begin(); request != requests_.end();) {
    if (!request->is_over()) {
      ++request;
      continue;
    }
    finish(*request);
    request = requests_.erase(request);
  }
}

void UringEngine::finish(Request& request) noexcept {
  DiskPiece& piece = request.piece;
  if (!request.error) {
    uint32_t sum = 0;
    for (size_t i = 0; i < request.sums.size(); ++i) {
      sum = join_crc32c(sum, request.sums[i], request.bytes_of(i));
    }
    if (piece.direction == TransferDirection::kWrite) {
      piece.extent.crc32c = sum;
    } else {
      try {
        check_sum(file_, piece.extent, sum);
      } catch (...) {
        request.error = std::current_exception();
      }
    }
  }
  owner_.finish(piece, std::move(request.error));
}

// Until there is a result, or a piece that can be taken; see Note [One place to sleep].
void UringEngine::sleep() noexcept {
  const bool has_room = requests_.size() < kRequestsMax;
  is_sleeping_ = has_room;
  const bool has_next = has_room && !queue_.is_empty();
  const bool is_idle = requests_.empty() || running_chunks() > 0;
  const auto wait = is_idle && !has_next ? IoUring::Wait::kForOne : IoUring::Wait::kNot;
  for (int attempt = 0;; ++attempt) {
    const int native_error = ring_->submit(wait);
    if (native_error == 0 || native_error == EINTR) break;
    if (!is_transient(native_error) || attempt == kAttemptsMax) {
      give_up(native_error);
      break;
    }
    wait_a_millisecond();
  }
  is_sleeping_ = false;
}

// What fails here is tried again by sleep().
void UringEngine::submit_batch() noexcept {
  static_cast<void>(ring_->submit(IoUring::Wait::kNot));
}

// In between the device gets new chunks: a result takes the time of a checksum.
void UringEngine::handle_results() noexcept {
  size_t handled = 0;
  while (const auto result = ring_->next_result()) {
    handle(*result);
    if (++handled % kBatch == 0) start_chunks();
  }
}

void UringEngine::handle(const IoUring::Result& result) noexcept {
  if (result.tag == kWakeupTag) {
    uint64_t count = 0;
    static_cast<void>(read(wakeup_.number(), &count, sizeof count));
    if (result.value < 0 && broken_error_ == 0) give_up(-result.value);
    if (broken_error_ == 0) ring_->add_poll(wakeup_.number(), kWakeupTag);
    return;
  }
  Chunk& chunk = chunks_[result.tag];
  ssize_t value = result.value;
  if (std::exchange(chunk.is_delayed, false)) {
    const int native_error = broken_error_ != 0 ? broken_error_ : chunk.plan->native_error;
    if (native_error == 0) return hand_over(chunk);
    value = -native_error;
  } else if (chunk.plan != nullptr) {
    value = chunk.plan->finish(value);
  }
  if (advance(chunk, value)) issue(chunk);
}

// The ring does not work any more: every transfer fails from now on. What the kernel has it may
// still write to, so that must end first.
void UringEngine::give_up(int native_error) noexcept {
  broken_error_ = native_error;
  while (const auto tag = ring_->take_back()) {
    if (*tag != kWakeupTag) handle({*tag, -native_error});
  }
  for (int i = 0; i < kDrainMillisecondsMax && running_chunks() > 0; ++i) {
    handle_results();
    wait_a_millisecond();
  }
  SPILLOVER_CHECK(running_chunks() == 0, "io_uring failed with transfers of our memory under way");
}

}  // namespace spillover
