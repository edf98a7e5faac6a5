#include "trace/labels.hpp"

#include <map>
#include <mutex>
#include <utility>

namespace spillover {
namespace {

using Key = std::pair<std::string, std::string>;

struct Labels {
  std::mutex mutex;
  std::map<Key, TraceLabel> all;  // Guarded by mutex. Neither keys nor labels move.
};

constexpr TraceLabel kOthers{"(a name beyond the first 65536)", "user"};

}  // namespace

const TraceLabel& intern_label(const std::string& name, const std::string& category) {
  // Leaked on purpose: what was recorded points to it.
  static auto& labels = *new Labels;
  const std::lock_guard lock(labels.mutex);
  const auto found = labels.all.find({name, category});
  if (found != labels.all.end()) return found->second;
  if (labels.all.size() == kLabelsMax) return kOthers;
  const auto added = labels.all.emplace(Key(name, category), TraceLabel{}).first;
  added->second = {added->first.first.c_str(), added->first.second.c_str()};
  return added->second;
}

}  // namespace spillover
