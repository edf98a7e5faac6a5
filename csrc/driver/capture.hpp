// What the driver says of the graph that a stream records.
//
// Values; any thread may ask about any stream that is alive. Nothing here changes or ends a
// capture, and nothing throws: what cannot be known, as before CUDA 12.3, is not said.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <vector>

#include "driver/types.hpp"

namespace spillover {

// A CUgraphNode.
using GraphNode = void*;

// Where a stream is in the graph that it records.
struct CapturePosition {
  uint64_t capture = 0;  // Number of the capture; the driver never gives it again, nor 0.
  // What was recorded on the stream so far: these nodes and all that is before them.
  std::vector<GraphNode> nodes;
  // Those of them that the stream's next node waits for. Others it only begins after.
  std::vector<GraphNode> awaited;
};

// Nothing for a stream that records no graph. The device's context must be current.
std::optional<CapturePosition> capture_position(StreamHandle stream) noexcept;

// The nodes that the stream's next node waits for, directly or through others. O(the graph).
std::set<GraphNode> nodes_before(const CapturePosition& position);

}  // namespace spillover
