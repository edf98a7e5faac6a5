// Python's view of the optimizer's kernels. What they touch is told to the emulated device's hazard
// checker and virtual clock here, so that the layer itself needs neither.
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "bindings/bindings.hpp"
#include "optim/conversions.hpp"
#include "optim/dispatch.hpp"
#include "optim/gradients.hpp"
#include "optim/memory_spans.hpp"
#include "optim/thread_pool.hpp"
#include "optim/update.hpp"
#include "tiers/host_annotation.hpp"
#include "tiers/work_annotation.hpp"

namespace py = pybind11;

namespace spillover {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);  // NOLINT(performance-no-int-to-ptr)
}

ElementType element_type(const std::string& name) {
  if (name == "float32") return ElementType::kFloat32;
  if (name == "bfloat16") return ElementType::kBFloat16;
  if (name == "float16") return ElementType::kFloat16;
  throw ConfigError("'" + name +
                    "' is no type of elements; it must be float32, bfloat16 or float16");
}

MomentFormat moment_format(const std::string& name) {
  if (name == "blockwise8") return MomentFormat::kBlockwise8;
  if (name == "float32") return MomentFormat::kFloat32;
  if (name == "bfloat16") return MomentFormat::kBFloat16;
  throw ConfigError("'" + name +
                    "' is no format of moments; it must be float32, bfloat16 or blockwise8");
}

// (address, format) or (address, "blockwise8", address of the scales).
Moment moment_of(const std::optional<py::tuple>& given) {
  if (!given) return {};
  if (given->size() != 2 && given->size() != 3) {
    throw ConfigError("a moment is (address, format) or (address, 'blockwise8', scales)");
  }
  Moment moment;
  moment.values = pointer<void>((*given)[0].cast<uintptr_t>());
  moment.format = moment_format((*given)[1].cast<std::string>());
  if ((moment.format == MomentFormat::kBlockwise8) != (given->size() == 3)) {
    throw ConfigError("a moment has scales if its format is blockwise8, and only then");
  }
  if (given->size() == 3) moment.scales = pointer<float>((*given)[2].cast<uintptr_t>());
  return moment;
}

UpdateRange make_range(size_t count, uintptr_t gradient, const std::string& gradient_type,
                       uintptr_t weight, uintptr_t low_weight, const std::string& low_weight_type,
                       uintptr_t remainder, const std::optional<py::tuple>& first,
                       const std::optional<py::tuple>& second,
                       const std::optional<py::tuple>& second_max, int64_t step,
                       uint64_t first_index) {
  UpdateRange range;
  range.count = count;
  range.first_index = first_index;
  range.step = step;
  range.gradient = pointer<void>(gradient);
  range.gradient_type = element_type(gradient_type);
  range.weight = pointer<float>(weight);
  range.low_weight = pointer<void>(low_weight);
  range.low_weight_type = element_type(low_weight_type);
  range.remainder = pointer<int16_t>(remainder);
  range.first = moment_of(first);
  range.second = moment_of(second);
  range.second_max = moment_of(second_max);
  return range;
}

// Tells the emulated device, while it lives, of work on these arrays by the calling thread and by
// those that help it. In a dry run, where they have no bytes, the work is not to be done.
class Announced {
 public:
  // Of what the spans move, cached_bytes are in the processor's caches.
  explicit Announced(const std::vector<MemorySpan>& spans, size_t cached_bytes = 0) {
    size_t moved_bytes = 0;
    std::vector<HostRange> ranges;
    for (const MemorySpan& span : spans) {
      moved_bytes += span.size_bytes * ((span.is_read ? 1 : 0) + (span.is_written ? 1 : 0));
      if (span.address == nullptr) continue;  // The kernel will say so.
      annotate_host_access(span.name, span.address, span.size_bytes,
                           span.is_written ? HostAccess::kWrite : HostAccess::kRead);
      const HostRange range{span.address, span.size_bytes, HostAccess::kRead};
      if (span.is_read) ranges.push_back(range);
      if (span.is_written) ranges.push_back({range.address, range.size_bytes, HostAccess::kWrite});
    }
    has_bytes_ = annotate_host_work(ranges);
    work_ = annotate_work_begin(kCpuOptimizer, moved_bytes - cached_bytes);
  }
  ~Announced() { annotate_work_end(work_); }
  Announced(const Announced&) = delete;
  Announced& operator=(const Announced&) = delete;

  bool has_bytes() const { return has_bytes_; }

 private:
  WorkId work_ = 0;
  bool has_bytes_ = true;
};

// What stands for squares that a dry run does not have: gradients are taken to be finite there.
SquareSum unknown_squares() {
  SquareSum sum;
  sum.add(1.0);
  return sum;
}

void append(std::vector<MemorySpan>& all, const std::vector<MemorySpan>& more) {
  all.insert(all.end(), more.begin(), more.end());
}

Announced announce(const std::vector<UpdateRange>& ranges) {
  std::vector<MemorySpan> spans;
  for (const UpdateRange& range : ranges) append(spans, memory_spans(range));
  return Announced(spans);
}

Direction direction(bool maximize) {
  return maximize ? Direction::kMaximize : Direction::kMinimize;
}

// ---- gradients ----

using ArrayTuple = std::tuple<uintptr_t, std::string, size_t>;

ElementArray array_of(const ArrayTuple& given) {
  const auto& [address, type, count] = given;
  return {pointer<void>(address), element_type(type), count};
}

std::vector<ElementArray> arrays_of(const std::vector<ArrayTuple>& given) {
  std::vector<ElementArray> arrays;
  arrays.reserve(given.size());
  for (const ArrayTuple& each : given) arrays.push_back(array_of(each));
  return arrays;
}

Announced announce(const std::vector<ElementArray>& arrays, bool is_written) {
  std::vector<MemorySpan> spans;
  spans.reserve(arrays.size());
  for (const ElementArray& array : arrays) {
    spans.push_back(
        {"array", array.address, array.count * size_bytes_of(array.type), true, is_written});
  }
  return Announced(spans);
}

SquareSum accumulate_pieces(const std::vector<std::tuple<uintptr_t, ArrayTuple>>& given,
                            double scale, bool add, bool is_cached, int threads) {
  std::vector<Accumulation> pieces;
  std::vector<MemorySpan> spans;
  const AccumulateMode mode = add ? AccumulateMode::kAdd : AccumulateMode::kOverwrite;
  size_t cached_bytes = 0;
  for (const auto& [accumulator, gradient] : given) {
    pieces.push_back({pointer<float>(accumulator), array_of(gradient)});
    append(spans, memory_spans(pieces.back(), mode));
    const MemorySpan& written = spans.back();
    if (is_cached) cached_bytes += written.size_bytes * (written.is_read ? 2 : 1);
  }
  const GilRelease released;
  const Announced announced(spans, cached_bytes);
  if (!announced.has_bytes()) return unknown_squares();
  return accumulate(pieces, scale, mode, threads);
}

void register_updates(py::module_& module) {
  py::class_<UpdateRange>(module, "UpdateRange", "A contiguous part of a parameter, for one step.")
      .def(py::init(&make_range), py::kw_only(), py::arg("count"), py::arg("gradient"),
           py::arg("gradient_type") = "float32", py::arg("weight") = 0, py::arg("low_weight") = 0,
           py::arg("low_weight_type") = "bfloat16", py::arg("remainder") = 0,
           py::arg("first") = py::none(), py::arg("second") = py::none(),
           py::arg("second_max") = py::none(), py::arg("step") = 1, py::arg("first_index") = 0)
      .def_readonly("count", &UpdateRange::count)
      .def_readwrite("step", &UpdateRange::step);
  module.def(
      "update_adam",
      [](const std::vector<UpdateRange>& ranges, double lr, double beta1, double beta2, double eps,
         double weight_decay, bool decoupled, bool amsgrad, bool maximize, double gradient_scale,
         int threads) {
        const Announced announced = announce(ranges);
        if (!announced.has_bytes()) return;
        update_adam(
            ranges,
            {lr, beta1, beta2, eps, weight_decay,
             decoupled ? WeightDecay::kDecoupled : WeightDecay::kL2, amsgrad, direction(maximize)},
            {gradient_scale, threads});
      },
      py::arg("ranges"), py::kw_only(), py::arg("lr"), py::arg("beta1"), py::arg("beta2"),
      py::arg("eps"), py::arg("weight_decay"), py::arg("decoupled"), py::arg("amsgrad"),
      py::arg("maximize"), py::arg("gradient_scale"), py::arg("threads"), ReleaseGil());
  module.def(
      "update_sgd",
      [](const std::vector<UpdateRange>& ranges, double lr, double momentum, double dampening,
         double weight_decay, bool nesterov, bool maximize, double gradient_scale, int threads) {
        const Announced announced = announce(ranges);
        if (!announced.has_bytes()) return;
        update_sgd(ranges, {lr, momentum, dampening, weight_decay, nesterov, direction(maximize)},
                   {gradient_scale, threads});
      },
      py::arg("ranges"), py::kw_only(), py::arg("lr"), py::arg("momentum"), py::arg("dampening"),
      py::arg("weight_decay"), py::arg("nesterov"), py::arg("maximize"), py::arg("gradient_scale"),
      py::arg("threads"), ReleaseGil());
  module.def(
      "update_lion",
      [](const std::vector<UpdateRange>& ranges, double lr, double beta1, double beta2,
         double weight_decay, bool maximize, double gradient_scale, int threads) {
        const Announced announced = announce(ranges);
        if (!announced.has_bytes()) return;
        update_lion(ranges, {lr, beta1, beta2, weight_decay, direction(maximize)},
                    {gradient_scale, threads});
      },
      py::arg("ranges"), py::kw_only(), py::arg("lr"), py::arg("beta1"), py::arg("beta2"),
      py::arg("weight_decay"), py::arg("maximize"), py::arg("gradient_scale"), py::arg("threads"),
      ReleaseGil());
  module.def(
      "update_adagrad",
      [](const std::vector<UpdateRange>& ranges, double lr, double lr_decay, double weight_decay,
         double eps, bool maximize, double gradient_scale, int threads) {
        const Announced announced = announce(ranges);
        if (!announced.has_bytes()) return;
        update_adagrad(ranges, {lr, lr_decay, weight_decay, eps, direction(maximize)},
                       {gradient_scale, threads});
      },
      py::arg("ranges"), py::kw_only(), py::arg("lr"), py::arg("lr_decay"), py::arg("weight_decay"),
      py::arg("eps"), py::arg("maximize"), py::arg("gradient_scale"), py::arg("threads"),
      ReleaseGil());
}

void register_gradients(py::module_& module) {
  py::class_<SquareSum>(module, "SquareSum", "An exact sum of squares.")
      .def(py::init<>())
      .def("add", py::overload_cast<const SquareSum&>(&SquareSum::add), py::arg("other"))
      .def_property_readonly("value", &SquareSum::value);
  module.def("accumulate", &accumulate_pieces, py::arg("pieces"), py::kw_only(), py::arg("scale"),
             py::arg("add"), py::arg("is_cached") = false, py::arg("threads"));
  module.def(
      "sum_of_squares",
      [](const std::vector<ArrayTuple>& given, int threads) {
        const auto arrays = arrays_of(given);
        const Announced announced = announce(arrays, false);
        return announced.has_bytes() ? sum_of_squares(arrays, threads) : unknown_squares();
      },
      py::arg("arrays"), py::kw_only(), py::arg("threads"), ReleaseGil());
  module.def(
      "scale_elements",
      [](const std::vector<ArrayTuple>& given, double factor, int threads) {
        const auto arrays = arrays_of(given);
        const Announced announced = announce(arrays, true);
        if (announced.has_bytes()) scale_elements(arrays, factor, threads);
      },
      py::arg("arrays"), py::kw_only(), py::arg("factor"), py::arg("threads"), ReleaseGil());
  module.def(
      "find_non_finite",
      [](const std::vector<ArrayTuple>& given, int threads) {
        const auto arrays = arrays_of(given);
        const Announced announced = announce(arrays, false);
        NonFinite found{};
        if (announced.has_bytes()) found = find_non_finite(arrays, threads);
        return std::tuple{found.count, found.array, found.index};
      },
      py::arg("arrays"), py::kw_only(), py::arg("threads"), ReleaseGil());
}

// Arrays are the addresses of `count` elements each.
void register_conversions(py::module_& module) {
  const auto signs = [](bool is_signed) { return is_signed ? Signs::kSigned : Signs::kUnsigned; };
  module.def(
      "decode_blockwise",
      [signs](uintptr_t codes, uintptr_t scales, uintptr_t to, size_t count, bool is_signed,
              int threads) {
        const Announced announced({{"codes", pointer<void>(codes), count, true, false},
                                   {"to", pointer<void>(to), count * sizeof(float), false, true}});
        if (!announced.has_bytes()) return;
        decode_blockwise(pointer<uint8_t>(codes), pointer<float>(scales), signs(is_signed), count,
                         pointer<float>(to), threads);
      },
      py::arg("codes"), py::arg("scales"), py::arg("to"), py::kw_only(), py::arg("count"),
      py::arg("is_signed"), py::arg("threads"), ReleaseGil());
  module.def(
      "encode_blockwise",
      [signs](uintptr_t from, uintptr_t codes, uintptr_t scales, size_t count, bool is_signed,
              int threads) {
        const Announced announced(
            {{"origin", pointer<void>(from), count * sizeof(float), true, false},
             {"codes", pointer<void>(codes), count, false, true}});
        if (!announced.has_bytes()) return;
        encode_blockwise(pointer<float>(from), signs(is_signed), count, pointer<uint8_t>(codes),
                         pointer<float>(scales), threads);
      },
      py::arg("origin"), py::arg("codes"), py::arg("scales"), py::kw_only(), py::arg("count"),
      py::arg("is_signed"), py::arg("threads"), ReleaseGil());
  module.def(
      "join_weights",
      [](uintptr_t low, uintptr_t remainder, uintptr_t to, size_t count, int threads) {
        const Announced announced(
            {{"low_weight", pointer<void>(low), count * sizeof(uint16_t), true, false},
             {"remainder", pointer<void>(remainder), count * sizeof(int16_t), true, false},
             {"to", pointer<void>(to), count * sizeof(float), false, true}});
        if (!announced.has_bytes()) return;
        join_weights(pointer<uint16_t>(low), pointer<int16_t>(remainder), count, pointer<float>(to),
                     threads);
      },
      py::arg("low_weight"), py::arg("remainder"), py::arg("to"), py::kw_only(), py::arg("count"),
      py::arg("threads"), ReleaseGil());
  module.def(
      "split_weights",
      [](uintptr_t from, uintptr_t low, uintptr_t remainder, size_t count, int threads) {
        const Announced announced(
            {{"origin", pointer<void>(from), count * sizeof(float), true, false},
             {"low_weight", pointer<void>(low), count * sizeof(uint16_t), false, true},
             {"remainder", pointer<void>(remainder), count * sizeof(int16_t), false, true}});
        if (!announced.has_bytes()) return;
        split_weights(pointer<float>(from), count, pointer<uint16_t>(low),
                      pointer<int16_t>(remainder), threads);
      },
      py::arg("origin"), py::arg("low_weight"), py::arg("remainder"), py::kw_only(),
      py::arg("count"), py::arg("threads"), ReleaseGil());
}

}  // namespace

void register_optim(py::module_& module) {
  register_updates(module);
  register_gradients(module);
  register_conversions(module);
  module.attr("BLOCK_ELEMENTS") = kBlockElements;
  module.def("optimizer_threads", &optimizer_threads, ReleaseGil());
  module.def("set_optimizer_threads", &set_optimizer_threads, py::arg("threads"));
  module.def(
      "touch_pages",
      [](uintptr_t address, size_t size_bytes, int threads) {
        touch_pages(pointer<void>(address), size_bytes, threads);
      },
      py::arg("address"), py::arg("size_bytes"), py::kw_only(), py::arg("threads") = 0,
      ReleaseGil());
  module.def("_processors_by_node", &processors_by_node, py::arg("root") = "");
  module.def("_instruction_set", &instruction_set);
  module.def("_instruction_sets", &instruction_sets);
  module.def("_set_instruction_set", &set_instruction_set, py::arg("name"));
}

}  // namespace spillover
