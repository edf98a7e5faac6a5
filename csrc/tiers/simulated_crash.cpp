// What a loss of power leaves of a history: see Note [Simulated disk].
#include <algorithm>
#include <random>

#include "tiers/simulated_disk.hpp"

namespace spillover {
namespace {

using Kind = DiskEvent::Kind;
using Random = std::mt19937_64;

enum class Fate { kNothing, kAll, kWhole, kCut, kSectors, kNoise };
constexpr uint64_t kFates = 6;

class Crash {
 public:
  Crash(const DiskImage& start, const std::vector<DiskEvent>& events, const DiskHistory::Cut& cut)
      : image_(start),
        events_(events.begin(),
                events.begin() + static_cast<ptrdiff_t>(std::min(cut.event_count, events.size()))),
        random_(cut.seed) {
    fate_ = static_cast<Fate>(random_() % kFates);
    sector_bytes_ = random_() % 2 == 0 ? 512 : 4096;
    is_noisy_ = random_() % 2 == 0;
    for (const DiskEvent& event : events_) {
      size_t count = event.node + 1;
      if (event.kind == Kind::kLink) count = std::max(count, event.of + 1);
      if (count > image_.nodes.size()) image_.nodes.resize(count);
      if (event.kind == Kind::kLink) image_.nodes[event.of].is_folder = event.offset == 1;
    }
    find_covered(cut);
  }

  DiskImage take() {
    for (size_t i = 0; i < events_.size(); ++i) {
      if (is_covered_[i]) apply(events_[i]);
    }
    // Sizes before the writes that need them.
    std::vector<const DiskEvent*> writes;
    for (size_t i = 0; i < events_.size(); ++i) {
      if (is_covered_[i]) continue;
      if (events_[i].kind == Kind::kWrite) {
        writes.push_back(&events_[i]);
      } else if (fate_ == Fate::kAll || (fate_ != Fate::kNothing && coin())) {
        apply(events_[i]);
      }
    }
    if (fate_ != Fate::kAll) std::shuffle(writes.begin(), writes.end(), random_);
    for (const DiskEvent* write : writes) apply_pending(*write);
    return std::move(image_);
  }

 private:
  bool coin() { return random_() % 2 == 0; }

  void find_covered(const DiskHistory::Cut& cut) {
    using Ignored = DiskHistory::Cut::Ignored;
    std::vector<size_t> synced_before(image_.nodes.size(), 0);
    std::vector<size_t> completed(events_.size(), SIZE_MAX);
    for (size_t i = 0; i < events_.size(); ++i) {
      const DiskEvent& event = events_[i];
      const bool is_ignored =
          cut.ignored == Ignored::kAll || (cut.ignored == Ignored::kOne && cut.ignored_event == i);
      if (event.kind == Kind::kSynced) {
        if (is_ignored) continue;
        synced_before[event.node] = std::max(synced_before[event.node], event.of);
      } else if (event.kind == Kind::kWritten) {
        completed[event.of] = i;
      } else if (event.kind != Kind::kWrite) {
        completed[i] = i;
      }
    }
    is_covered_.resize(events_.size());
    for (size_t i = 0; i < events_.size(); ++i) {
      is_covered_[i] = completed[i] < synced_before[events_[i].node];
    }
  }

  void apply(const DiskEvent& event) {
    DiskImage::Node& node = image_.nodes[event.node];
    switch (event.kind) {
      case Kind::kWrite:
        put(node, event.offset, event.data.data(), event.data.size());
        break;
      case Kind::kResize:
        resize(node, event.offset);
        break;
      case Kind::kLink:
        node.names[event.name] = event.of;
        break;
      case Kind::kUnlink:
        node.names.erase(event.name);
        break;
      case Kind::kRename:
        if (node.names.erase(event.name) > 0) node.names[event.new_name] = event.of;
        break;
      case Kind::kWritten:
      case Kind::kSync:
      case Kind::kSynced:
        break;
    }
  }

  void resize(DiskImage::Node& node, uint64_t size_bytes) {
    const size_t before = node.contents.size();
    node.contents.resize(size_bytes);
    if (is_noisy_ && size_bytes > before) {
      noise(node.contents.data() + before, size_bytes - before);
    }
  }

  void noise(std::byte* data, size_t size_bytes) {
    uint64_t state = random_() | 1;
    for (size_t i = 0; i < size_bytes; ++i) {
      if (i % 8 == 0) state ^= state << 13, state ^= state >> 7, state ^= state << 17;
      data[i] = static_cast<std::byte>(state >> (8 * (i % 8)));
    }
  }

  // No further than the file's end: a size that is lost takes what is behind it along.
  void put(DiskImage::Node& node, uint64_t offset, const std::byte* data, size_t size_bytes) {
    if (offset >= node.contents.size()) return;
    size_bytes = std::min<size_t>(size_bytes, node.contents.size() - offset);
    std::copy(data, data + size_bytes, node.contents.begin() + static_cast<ptrdiff_t>(offset));
  }

  void apply_pending(const DiskEvent& write) {
    DiskImage::Node& node = image_.nodes[write.node];
    const size_t size_bytes = write.data.size();
    const size_t sectors = (size_bytes + sector_bytes_ - 1) / sector_bytes_;
    size_t first = 0;
    size_t last = sectors;
    if (fate_ == Fate::kNothing || (fate_ == Fate::kWhole && coin())) return;
    if (fate_ == Fate::kCut) (coin() ? first : last) = random_() % (sectors + 1);
    std::vector<std::byte> noisy;
    for (size_t sector = first; sector < last; ++sector) {
      const size_t begin = sector * sector_bytes_;
      const size_t count = std::min(sector_bytes_, size_bytes - begin);
      const std::byte* from = write.data.data() + begin;
      if (fate_ == Fate::kSectors && coin()) continue;
      if (fate_ == Fate::kNoise) {
        const uint64_t choice = random_() % 3;
        if (choice == 0) continue;
        if (choice == 1) {
          noisy.resize(count);
          noise(noisy.data(), count);
          from = noisy.data();
        }
      }
      put(node, write.offset + begin, from, count);
    }
  }

  DiskImage image_;
  const std::vector<DiskEvent> events_;
  Random random_;
  Fate fate_ = Fate::kNothing;
  size_t sector_bytes_ = 512;
  bool is_noisy_ = false;
  std::vector<bool> is_covered_;
};

}  // namespace

DiskImage DiskHistory::image(const Cut& cut) const {
  return Crash(start_, events_, cut).take();
}

std::string DiskHistory::describe(size_t event) const {
  const DiskEvent& of = events_.at(event);
  const std::string file = " node " + std::to_string(of.node);
  switch (of.kind) {
    case Kind::kWrite:
      return "write of " + std::to_string(of.data.size()) + " bytes at " +
             std::to_string(of.offset) + " of" + file;
    case Kind::kWritten:
      return "completion of event " + std::to_string(of.of) + " of" + file;
    case Kind::kResize:
      return "resize to " + std::to_string(of.offset) + " of" + file;
    case Kind::kLink:
      return "new name " + of.name + " in" + file;
    case Kind::kUnlink:
      return "removal of " + of.name + " from" + file;
    case Kind::kRename:
      return "rename of " + of.name + " to " + of.new_name + " in" + file;
    case Kind::kSync:
      return "sync of" + file;
    case Kind::kSynced:
      return "return of sync " + std::to_string(of.of) + " of" + file;
  }
  return "";
}

}  // namespace spillover
