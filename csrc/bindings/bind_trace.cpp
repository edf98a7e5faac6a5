// Python's view of the trace: on and off, spans, counters, and what was recorded.
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "bindings/bindings.hpp"
#include "trace/chrome_trace.hpp"
#include "trace/labels.hpp"
#include "trace/recorder.hpp"
#include "trace/span.hpp"

namespace py = pybind11;

namespace spillover {
namespace {

// What a span or a counter of Python's is called. Made once a name, since finding it takes a lock.
struct PythonLabel {
  const TraceLabel* label;
};

// The calling thread's where there is no track.
void record_span(const PythonLabel& label, int64_t begin_ns, int64_t end_ns, uint64_t size_bytes,
                 std::optional<TraceTrack> track, uint32_t flow_id) {
  TraceEvent event;
  event.label = label.label;
  event.track = track ? *track : thread_track();
  event.begin_ns = begin_ns;
  event.end_ns = end_ns;
  event.size_bytes = size_bytes;
  event.flow_id = flow_id;
  if (flow_id != 0) event.flow = TraceEvent::Flow::kBegins;
  trace_record(event);
}

py::tuple export_trace(int64_t from_ns, int64_t until_ns, std::string process_name) {
  ChromeTrace trace;
  {
    const GilRelease released;
    trace = chrome_trace({from_ns, until_ns, std::move(process_name)});
  }
  return py::make_tuple(py::bytes(trace.json), trace.event_count, trace.dropped_count);
}

// For benchmarks: nanoseconds of one span in a loop that does nothing else.
double time_spans(size_t count) {
  static constexpr TraceLabel kLabel{"benchmark", "user"};
  const int64_t begin_ns = trace_now_ns();
  for (size_t i = 0; i < count; ++i) {
    const TraceSpan span(kLabel, i);
  }
  return static_cast<double>(trace_now_ns() - begin_ns) / static_cast<double>(count);
}

}  // namespace

void register_trace(py::module_& module) {
  py::class_<PythonLabel>(module, "TraceLabel", "What a span or a counter is called.")
      .def(py::init([](const std::string& name, const std::string& category) {
             return PythonLabel{&intern_label(name, category)};
           }),
           py::arg("name"), py::arg("category"));
  module.def("trace_is_on", &trace_is_on, "Whether events are recorded.");
  module.def("trace_start", &start_trace, py::arg("events_max"), ReleaseGil(),
             "Record from now on, the latest events_max events.");
  module.def("trace_stop", &stop_trace, ReleaseGil(), "Record no more.");
  module.def("trace_span", &record_span, py::arg("label"), py::arg("begin_ns"), py::arg("end_ns"),
             py::arg("size_bytes") = 0, py::arg("track") = py::none(), py::arg("flow_id") = 0,
             "Record a span on a track, or on this thread's.");
  module.def(
      "trace_counter",
      [](const PythonLabel& label, TraceTrack track, uint64_t value) {
        trace_counter(*label.label, track, value);
      },
      py::arg("label"), py::arg("track"), py::arg("value"), "Record the value of a counter.");
  module.def(
      "trace_lanes", [](const std::string& name) { return trace_track(TrackKind::kLanes, name); },
      py::arg("name"), ReleaseGil(), "The track of that name, for spans that may overlap.");
  module.def(
      "trace_counter_track",
      [](const std::string& name) { return trace_track(TrackKind::kCounter, name); },
      py::arg("name"), ReleaseGil(), "The counter of that name.");
  module.def("next_trace_flow", &next_trace_flow, "A number for an arrow between two spans.");
  module.def("set_trace_flow", &set_trace_flow, py::arg("flow_id"),
             "Where the arrow to what this thread starts next comes from; 0 for none.");
  module.def(
      "trace_export", &export_trace, py::kw_only(), py::arg("from_ns") = INT64_MIN,
      py::arg("until_ns") = INT64_MAX, py::arg("process_name"),
      "What was recorded, as Chrome's JSON; how many events that are, and how many are gone.");
  module.def("_time_trace_spans", &time_spans, py::arg("count"), ReleaseGil());
}

}  // namespace spillover
