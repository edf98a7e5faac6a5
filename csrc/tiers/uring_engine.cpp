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
constexpr size_t kBounceBytes = UringBuffers::kBounceBytes;
constexpr IoUring::Tag kWakeupTag = UINT64_MAX;

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
             round_up(taken.extent.size_bytes - aligned_bytes, kBounceBytes) / kBounceBytes) {
    due.reserve(sums.size());
    piece = std::move(taken);
  }

  bool is_direct(size_t chunk) const { return chunk < direct_chunks; }
  size_t begin_of(size_t chunk) const {
    return is_direct(chunk) ? chunk * kChunkBytes
                            : direct_bytes + (chunk - direct_chunks) * kBounceBytes;
  }
  size_t bytes_of(size_t chunk) const {
    return is_direct(chunk) ? std::min(kChunkBytes, direct_bytes - begin_of(chunk))
                            : std::min(kBounceBytes, piece.extent.size_bytes - begin_of(chunk));
  }
  bool is_over() const { return running == 0 && due.empty() && (error || started == sums.size()); }

  size_t direct_bytes;  // The rest goes through bounce buffers.
  size_t direct_chunks;
  std::vector<uint32_t> sums;  // Of each chunk.
  std::vector<size_t> due;     // Chunks whose sums are still to be computed; has room for all.
  size_t started = 0;          // Chunks.
  size_t running = 0;
  std::exception_ptr error;  // The first; no more chunks are started.
  DiskPiece piece{};         // Stays with the caller where the constructor throws.
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
  buffers_ = std::make_unique<UringBuffers>(*ring_);
  const std::string missing = buffers_->notes();
  if (!notes_.empty() && !missing.empty()) notes_ += "; ";
  notes_ += missing;
  ring_->add_poll(wakeup_.number(), kWakeupTag);
}

size_t UringEngine::register_memory(std::byte* address, size_t size_bytes) {
  return command([=, this] { return buffers_->add(address, size_bytes); });
}

void UringEngine::unregister_memory(std::byte* address) noexcept {
  command([=, this] {
    buffers_->remove(address);
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
  for (;;) {
    Command command;
    {
      const std::lock_guard lock(commands_mutex_);
      if (commands_.empty()) return;
      command = std::move(commands_.front());
      commands_.pop_front();
    }
    submit_batch();  // What is queued may name a buffer that the command takes back.
    command();
  }
}

void UringEngine::run() {
  while (broken_error_ == 0 && take_pieces()) {
    obey();
    start_chunks();
    enter();
    // What has room again goes to the device before the next sum is computed.
    if (!handle_results()) compute_sum();
    finish_requests();
  }
  {
    const std::lock_guard lock(commands_mutex_);
    takes_commands_ = false;
  }
  obey();
  // Without a ring every piece fails, until the engine is closed.
  std::optional<DiskPiece> piece;
  do {
    if (piece) begin(*piece);
    start_chunks();
    while (due_bytes_ > 0) compute_sum();
    finish_requests();
    piece = queue_.pop();
  } while (piece);
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

void UringEngine::begin(DiskPiece& piece) noexcept {
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

void UringEngine::start_chunks() noexcept {
  for (auto request = requests_.begin(); request != requests_.end(); ++request) {
    while (!request->error && request->started < request->sums.size()) {
      if (free_chunks_.empty() || due_bytes_ >= kDueBytesMax) return;
      const bool is_read = request->piece.direction == TransferDirection::kRead;
      if (is_read && reading_bytes_ >= kReadingBytesMax) break;
      if (!start_chunk(request)) break;
    }
  }
}

// False where no bounce buffer is free.
bool UringEngine::start_chunk(Requests::iterator place) noexcept {
  Request& request = *place;
  std::optional<size_t> bounce;
  if (!request.is_direct(request.started)) {
    bounce = buffers_->take_bounce();
    if (!bounce) return false;
  }
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
    owe_sum(request, chunk.index);
  } else {
    reading_bytes_ += size_bytes;
  }
  chunk.bounce = bounce.value_or(kNoBounce);
  chunk.memory = bounce ? buffers_->bounce(*bounce) : data;
  if (bounce && direction == TransferDirection::kWrite) {
    std::memcpy(chunk.memory, data, size_bytes);
    std::memset(chunk.memory + size_bytes, 0, padded_bytes - size_bytes);
  }
  chunk.offset = request.piece.extent.offset + begin;
  chunk.progress = TransferProgress(direction, padded_bytes);
  issue(chunk);
  // The copy of the next one takes a time in which the device may have nothing else to do.
  if (bounce) submit_batch();
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
    transfer.buffer = buffers_->number_of(transfer.data, transfer.size_bytes);
  } else {
    transfer.buffer = buffers_->number_of_bounce(chunk.bounce);
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
  Request& request = *chunk.request;
  const size_t size_bytes = request.bytes_of(chunk.index);
  if (!error && chunk.progress.direction() == TransferDirection::kRead) {
    if (chunk.bounce != kNoBounce) {
      std::memcpy(request.piece.data + request.begin_of(chunk.index), chunk.memory, size_bytes);
    }
    owe_sum(request, chunk.index);
  }
  if (error && !request.error) request.error = std::move(error);
  if (chunk.bounce != kNoBounce) buffers_->give_back(chunk.bounce);
  chunk.plan.reset();
  free_chunks_.push_back(static_cast<size_t>(&chunk - chunks_.data()));
  if (chunk.progress.direction() == TransferDirection::kRead) reading_bytes_ -= size_bytes;
  --request.running;
}

void UringEngine::owe_sum(Request& request, size_t chunk) noexcept {
  request.due.push_back(chunk);
  due_bytes_ += request.bytes_of(chunk);
}

// One of the oldest request that has any, if there is one.
void UringEngine::compute_sum() noexcept {
  for (Request& request : requests_) {
    if (request.due.empty()) continue;
    const size_t chunk = request.due.front();
    const size_t size_bytes = request.bytes_of(chunk);
    request.due.erase(request.due.begin());  // Of a few.
    due_bytes_ -= size_bytes;
    if (request.error) continue;
    request.sums[chunk] =
        timed_crc32c(request.piece.data + request.begin_of(chunk), size_bytes, request.piece.notes);
    return;
  }
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

// Hands over what is queued and looks for results. Where there is nothing else to do it waits for
// one, or for a piece that can be taken; see Note [One place to sleep].
void UringEngine::enter() noexcept {
  const bool is_idle = due_bytes_ == 0 && (requests_.empty() || running_chunks() > 0);
  const bool has_room = requests_.size() < kRequestsMax;
  is_sleeping_ = is_idle && has_room;
  const bool has_next = has_room && !queue_.is_empty();
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

// What fails here is tried again by enter().
void UringEngine::submit_batch() noexcept {
  static_cast<void>(ring_->submit(IoUring::Wait::kNot));
}

// Whether there was any.
bool UringEngine::handle_results() noexcept {
  bool has_any = false;
  while (const auto result = ring_->next_result()) {
    has_any = true;
    const size_t free_bounces = buffers_->free_bounces();
    handle(*result);
    // A copy took its time, in which the device may have run out of work.
    if (buffers_->free_bounces() != free_bounces) start_chunks();
  }
  return has_any;
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
