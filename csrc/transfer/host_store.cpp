#include "transfer/host_store.hpp"

#include <optional>

#include "driver/copy.hpp"
#include "driver/event.hpp"
#include "trace/span.hpp"
#include "transfer/copy_streams.hpp"

namespace spillover {
namespace {

constexpr TraceLabel kWaitForSave{"wait for a copy out (sleep)", "stall"};
constexpr TraceLabel kWaitForLoads{"wait for copies in (wake)", "stall"};

class HostContents : public SavedContents {
 public:
  HostContents(int device, const std::vector<ContentPiece>& pieces, std::shared_ptr<HostPool> pool)
      : streams_(CopyStreams::of(device)), pool_(std::move(pool)) {
    for (const ContentPiece& piece : pieces) pieces_.push_back({piece, {}, {}});
  }

  void start_save(size_t index) override {
    Piece& piece = pieces_[index];
    piece.buffer = pool_->allocate(piece.what.size_bytes);
    for (const ContentPart& part : piece.what.parts) {
      copy_to_host(piece.buffer.address() + part.offset_bytes, part.address, part.size_bytes,
                   streams_.out());
    }
    streams_.count(CopyDirection::kOut, piece.what.size_bytes);
    piece.is_saved.emplace(streams_.out().device());
    piece.is_saved->record(streams_.out().handle());
  }

  void finish_save(size_t index) override {
    const TraceSpan span(kWaitForSave, pieces_[index].what.size_bytes);
    pieces_[index].is_saved->synchronize();
    pieces_[index].is_saved.reset();
  }

  void start_load(size_t index, const std::vector<ContentPart>& parts) override {
    const Piece& piece = pieces_[index];
    size_t size_bytes = 0;
    for (const ContentPart& part : parts) {
      size_bytes += part.size_bytes;
      copy_to_device(part.address, piece.buffer.address() + part.offset_bytes, part.size_bytes,
                     streams_.in());
    }
    streams_.count(CopyDirection::kIn, size_bytes);
  }

  void finish_loads() override {
    const TraceSpan span(kWaitForLoads);
    streams_.in().synchronize();
  }

  void drop(size_t index) noexcept override { pieces_[index].buffer = HostBuffer(); }

  void settle() noexcept override {
    streams_.out().settle();
    streams_.in().settle();
  }

 private:
  struct Piece {
    ContentPiece what;
    HostBuffer buffer;
    std::optional<Event> is_saved;
  };

  CopyStreams& streams_;
  const std::shared_ptr<HostPool> pool_;
  std::vector<Piece> pieces_;
};

}  // namespace

std::unique_ptr<SavedContents> HostStore::begin(int device,
                                                const std::vector<ContentPiece>& pieces) {
  return std::make_unique<HostContents>(device, pieces, pool_);
}

}  // namespace spillover
