#include "emulator/libcudart/runtime.hpp"

namespace runtime = spillover::emulator::runtime;
using runtime::with_context;

namespace {

static_assert(static_cast<int>(cudaEventBlockingSync) == static_cast<int>(CU_EVENT_BLOCKING_SYNC));
static_assert(static_cast<int>(cudaEventDisableTiming) ==
              static_cast<int>(CU_EVENT_DISABLE_TIMING));
static_assert(static_cast<int>(cudaEventInterprocess) == static_cast<int>(CU_EVENT_INTERPROCESS));

}  // namespace

extern "C" {

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return with_context(__func__, [=] { return cuEventCreate(event, CU_EVENT_DEFAULT); });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned int flags) {
  return with_context(__func__, [=] { return cuEventCreate(event, flags); });
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return with_context(__func__, [=] { return cuEventDestroy(event); });
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return with_context(__func__, [=] { return cuEventRecord(event, stream); });
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned int flags) {
  return with_context(__func__, [=] { return cuEventRecordWithFlags(event, stream, flags); });
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return with_context(__func__, [=] { return cuEventSynchronize(event); });
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  return with_context(__func__, [=] { return cuEventQuery(event); });
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  return with_context(__func__, [=] { return cuEventElapsedTime(milliseconds, start, end); });
}

}  // extern "C"
