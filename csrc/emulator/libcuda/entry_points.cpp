// cuGetProcAddress: every function of this driver by name.
//
// Names may be given as CUDA documents (cuMemAlloc), with a version (cuMemAlloc_v2), or with the
// suffix of the variants whose null stream is the per-thread default stream (_ptsz, _ptds). A
// function of cuda.h that is not here is not emulated: it is "not found", as in a driver that is
// older than the function.
#include <algorithm>
#include <cstring>
#include <string>
#include <string_view>

#include "emulator/core/fault_plan.hpp"
#include "emulator/libcuda/api_call.hpp"

namespace emulator = spillover::emulator;

extern "C" {
// Older versions, which cuda.h declares for its own implementation only.
#undef cuStreamGetCaptureInfo
CUresult cuStreamGetCaptureInfo(CUstream, CUstreamCaptureStatus*, cuuint64_t*);
CUresult cuStreamGetCaptureInfo_v2(CUstream, CUstreamCaptureStatus*, cuuint64_t*, CUgraph*,
                                   const CUgraphNode**, std::size_t*);
CUresult cuStreamGetCaptureInfo_v3(CUstream, CUstreamCaptureStatus*, cuuint64_t*, CUgraph*,
                                   const CUgraphNode**, const CUgraphEdgeData**, std::size_t*);
#undef cuStreamUpdateCaptureDependencies
CUresult cuStreamUpdateCaptureDependencies(CUstream, CUgraphNode*, std::size_t, unsigned int);
CUresult cuStreamUpdateCaptureDependencies_v2(CUstream, CUgraphNode*, const CUgraphEdgeData*,
                                              std::size_t, unsigned int);
#undef cuMemcpyBatchAsync
CUresult cuMemcpyBatchAsync(CUdeviceptr*, CUdeviceptr*, std::size_t*, std::size_t,
                            CUmemcpyAttributes*, std::size_t*, std::size_t, std::size_t*, CUstream);
CUresult cuMemcpyBatchAsync_v2(CUdeviceptr*, CUdeviceptr*, std::size_t*, std::size_t,
                               CUmemcpyAttributes*, std::size_t*, std::size_t, CUstream);
CUresult cuCtxCreate_v2(CUcontext*, unsigned int, CUdevice);
CUresult cuCtxCreate_v4(CUcontext*, CUctxCreateParams*, unsigned int, CUdevice);
#undef cuGetProcAddress
CUresult cuGetProcAddress(const char*, void**, int, cuuint64_t);
CUresult cuGetProcAddress_v2(const char*, void**, int, cuuint64_t, CUdriverProcAddressQueryResult*);
}

namespace {

struct EntryPoint {
  std::string_view name;    // without a suffix
  std::string_view symbol;  // with the suffix where versions differ
  void* function;
  void* per_thread_function;  // for streams: the same, with the other default stream
  int since_version = 0;      // where versions differ; ascending
};

// A function with the per-thread default stream in place of the legacy one.
template <auto kFunction>
struct PerThread;

template <typename... Arguments, CUresult (*kFunction)(Arguments...)>
struct PerThread<kFunction> {
  static CUresult call(Arguments... arguments) {
    const emulator::PerThreadDefaultScope scope;
    return kFunction(arguments...);
  }
};

// clang-format off
#define FUNCTION(name) {#name, #name, reinterpret_cast<void*>(&name), nullptr}
#define STREAM_FUNCTION(name) \
  {#name, #name, reinterpret_cast<void*>(&name), reinterpret_cast<void*>(&PerThread<&name>::call)}
#define VERSION(name, function, since) \
  {#name, #function, reinterpret_cast<void*>(&function), nullptr, since}
#define STREAM_VERSION(name, function, since) \
  {#name, #function, reinterpret_cast<void*>(&function), \
   reinterpret_cast<void*>(&PerThread<&function>::call), since}

// cuda.h marks some as deprecated; programs ask for them all the same.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
const EntryPoint kEntryPoints[] = {
    FUNCTION(cuDeviceComputeCapability),
    // Errors, versions, devices.
    FUNCTION(cuInit), FUNCTION(cuDriverGetVersion), FUNCTION(cuGetErrorName),
    FUNCTION(cuGetErrorString), FUNCTION(cuDeviceGet), FUNCTION(cuDeviceGetCount),
    FUNCTION(cuDeviceGetName), FUNCTION(cuDeviceGetUuid), FUNCTION(cuDeviceTotalMem),
    FUNCTION(cuDeviceGetAttribute),
    FUNCTION(cuDeviceGetPCIBusId), FUNCTION(cuDeviceGetByPCIBusId),
    FUNCTION(cuDeviceCanAccessPeer), FUNCTION(cuDeviceGetP2PAttribute),
    VERSION(cuGetProcAddress, cuGetProcAddress, 11030),
    VERSION(cuGetProcAddress, cuGetProcAddress_v2, 12000),
    // Contexts.
    FUNCTION(cuDevicePrimaryCtxRetain), FUNCTION(cuDevicePrimaryCtxRelease),
    FUNCTION(cuDevicePrimaryCtxReset), FUNCTION(cuDevicePrimaryCtxSetFlags),
    FUNCTION(cuDevicePrimaryCtxGetState), VERSION(cuCtxCreate, cuCtxCreate_v2, 3020),
    VERSION(cuCtxCreate, cuCtxCreate_v4, 12050), FUNCTION(cuCtxDestroy),
    FUNCTION(cuCtxSetCurrent), FUNCTION(cuCtxGetCurrent), FUNCTION(cuCtxPushCurrent),
    FUNCTION(cuCtxPopCurrent), VERSION(cuCtxGetDevice, cuCtxGetDevice, 2000),
    VERSION(cuCtxGetDevice, cuCtxGetDevice_v2, 13000), FUNCTION(cuCtxGetFlags),
    FUNCTION(cuCtxGetId), FUNCTION(cuCtxGetApiVersion),
    VERSION(cuCtxSynchronize, cuCtxSynchronize, 2000),
    VERSION(cuCtxSynchronize, cuCtxSynchronize_v2, 13000),
    FUNCTION(cuCtxGetStreamPriorityRange), FUNCTION(cuCtxGetLimit), FUNCTION(cuCtxSetLimit),
    FUNCTION(cuCtxGetCacheConfig), FUNCTION(cuCtxSetCacheConfig),
    FUNCTION(cuCtxEnablePeerAccess), FUNCTION(cuCtxDisablePeerAccess),
    // Memory.
    FUNCTION(cuMemGetInfo), FUNCTION(cuMemAlloc), FUNCTION(cuMemAllocPitch), FUNCTION(cuMemFree),
    FUNCTION(cuMemAllocManaged), FUNCTION(cuMemAllocHost), FUNCTION(cuMemHostAlloc),
    FUNCTION(cuMemFreeHost), FUNCTION(cuMemHostRegister), FUNCTION(cuMemHostUnregister),
    FUNCTION(cuMemHostGetDevicePointer), FUNCTION(cuMemHostGetFlags),
    FUNCTION(cuMemGetAddressRange), FUNCTION(cuPointerGetAttribute),
    FUNCTION(cuPointerGetAttributes), FUNCTION(cuPointerSetAttribute),
    // Virtual memory.
    FUNCTION(cuMemGetAllocationGranularity), FUNCTION(cuMemAddressReserve),
    FUNCTION(cuMemAddressFree), FUNCTION(cuMemCreate), FUNCTION(cuMemRelease), FUNCTION(cuMemMap),
    FUNCTION(cuMemUnmap), FUNCTION(cuMemSetAccess), FUNCTION(cuMemGetAccess),
    FUNCTION(cuMemExportToShareableHandle), FUNCTION(cuMemImportFromShareableHandle),
    FUNCTION(cuMemRetainAllocationHandle), FUNCTION(cuMemGetAllocationPropertiesFromHandle),
    // Stream-ordered memory.
    STREAM_FUNCTION(cuMemAllocAsync), STREAM_FUNCTION(cuMemAllocFromPoolAsync),
    STREAM_FUNCTION(cuMemFreeAsync), FUNCTION(cuDeviceGetDefaultMemPool),
    FUNCTION(cuDeviceGetMemPool), FUNCTION(cuDeviceSetMemPool), FUNCTION(cuMemPoolCreate),
    FUNCTION(cuMemPoolDestroy), FUNCTION(cuMemPoolTrimTo), FUNCTION(cuMemPoolSetAttribute),
    FUNCTION(cuMemPoolGetAttribute), FUNCTION(cuMemPoolSetAccess), FUNCTION(cuMemPoolGetAccess),
    // Copies.
    STREAM_FUNCTION(cuMemcpy), STREAM_FUNCTION(cuMemcpyAsync), STREAM_FUNCTION(cuMemcpyHtoD),
    STREAM_FUNCTION(cuMemcpyHtoDAsync), STREAM_FUNCTION(cuMemcpyDtoH),
    STREAM_FUNCTION(cuMemcpyDtoHAsync), STREAM_FUNCTION(cuMemcpyDtoD),
    STREAM_FUNCTION(cuMemcpyDtoDAsync), STREAM_FUNCTION(cuMemcpyPeer),
    STREAM_FUNCTION(cuMemcpyPeerAsync), STREAM_FUNCTION(cuMemcpy2D),
    STREAM_FUNCTION(cuMemcpy2DUnaligned), STREAM_FUNCTION(cuMemcpy2DAsync),
    STREAM_VERSION(cuMemcpyBatchAsync, cuMemcpyBatchAsync, 12080),
    STREAM_VERSION(cuMemcpyBatchAsync, cuMemcpyBatchAsync_v2, 13000),
    STREAM_FUNCTION(cuMemsetD8), STREAM_FUNCTION(cuMemsetD16), STREAM_FUNCTION(cuMemsetD32),
    STREAM_FUNCTION(cuMemsetD8Async), STREAM_FUNCTION(cuMemsetD16Async),
    STREAM_FUNCTION(cuMemsetD32Async), STREAM_FUNCTION(cuMemsetD2D8),
    STREAM_FUNCTION(cuMemsetD2D16), STREAM_FUNCTION(cuMemsetD2D32),
    STREAM_FUNCTION(cuMemsetD2D8Async), STREAM_FUNCTION(cuMemsetD2D16Async),
    STREAM_FUNCTION(cuMemsetD2D32Async),
    // Streams and events.
    FUNCTION(cuStreamCreate), FUNCTION(cuStreamCreateWithPriority), FUNCTION(cuStreamDestroy),
    STREAM_FUNCTION(cuStreamSynchronize), STREAM_FUNCTION(cuStreamQuery),
    STREAM_FUNCTION(cuStreamWaitEvent), STREAM_FUNCTION(cuStreamGetFlags),
    STREAM_FUNCTION(cuStreamGetPriority), STREAM_FUNCTION(cuStreamGetId),
    STREAM_FUNCTION(cuStreamGetCtx), STREAM_FUNCTION(cuStreamGetDevice),
    STREAM_FUNCTION(cuLaunchHostFunc), STREAM_FUNCTION(cuStreamAddCallback),
    STREAM_FUNCTION(cuStreamWriteValue32), STREAM_FUNCTION(cuStreamWriteValue64),
    STREAM_FUNCTION(cuStreamWaitValue32), STREAM_FUNCTION(cuStreamWaitValue64),
    STREAM_FUNCTION(cuStreamIsCapturing),
    STREAM_VERSION(cuStreamGetCaptureInfo, cuStreamGetCaptureInfo, 10010),
    STREAM_VERSION(cuStreamGetCaptureInfo, cuStreamGetCaptureInfo_v2, 11030),
    STREAM_VERSION(cuStreamGetCaptureInfo, cuStreamGetCaptureInfo_v3, 12030),
    FUNCTION(cuThreadExchangeStreamCaptureMode), STREAM_FUNCTION(cuStreamBeginCapture),
    STREAM_FUNCTION(cuStreamBeginCaptureToGraph), STREAM_FUNCTION(cuStreamEndCapture),
    STREAM_VERSION(cuStreamUpdateCaptureDependencies, cuStreamUpdateCaptureDependencies, 11030),
    STREAM_VERSION(cuStreamUpdateCaptureDependencies, cuStreamUpdateCaptureDependencies_v2, 12030),
    // Graphs.
    FUNCTION(cuGraphCreate), FUNCTION(cuGraphDestroy), FUNCTION(cuGraphClone),
    FUNCTION(cuGraphNodeFindInClone), FUNCTION(cuGraphDestroyNode), FUNCTION(cuGraphNodeGetType),
    FUNCTION(cuGraphGetNodes), FUNCTION(cuGraphGetRootNodes), FUNCTION(cuGraphGetEdges),
    FUNCTION(cuGraphNodeGetDependencies), FUNCTION(cuGraphNodeGetDependentNodes),
    FUNCTION(cuGraphAddDependencies), FUNCTION(cuGraphRemoveDependencies),
    FUNCTION(cuGraphAddKernelNode), FUNCTION(cuGraphKernelNodeSetParams),
    FUNCTION(cuGraphAddMemcpyNode), FUNCTION(cuGraphMemcpyNodeSetParams),
    FUNCTION(cuGraphAddMemsetNode), FUNCTION(cuGraphMemsetNodeSetParams),
    FUNCTION(cuGraphMemsetNodeGetParams), FUNCTION(cuGraphAddHostNode),
    FUNCTION(cuGraphHostNodeSetParams), FUNCTION(cuGraphHostNodeGetParams),
    FUNCTION(cuGraphAddNode), FUNCTION(cuGraphNodeSetParams), FUNCTION(cuGraphAddEmptyNode),
    FUNCTION(cuGraphAddChildGraphNode), FUNCTION(cuGraphChildGraphNodeGetGraph),
    FUNCTION(cuGraphAddEventRecordNode), FUNCTION(cuGraphAddEventWaitNode),
    FUNCTION(cuGraphEventRecordNodeGetEvent), FUNCTION(cuGraphEventWaitNodeGetEvent),
    FUNCTION(cuGraphInstantiateWithFlags), STREAM_FUNCTION(cuGraphInstantiateWithParams),
    FUNCTION(cuGraphExecGetFlags), STREAM_FUNCTION(cuGraphUpload), STREAM_FUNCTION(cuGraphLaunch),
    FUNCTION(cuGraphExecDestroy), FUNCTION(cuGraphExecUpdate), FUNCTION(cuGraphExecNodeSetParams),
    FUNCTION(cuGraphNodeSetEnabled), FUNCTION(cuGraphNodeGetEnabled),
    FUNCTION(cuGraphDebugDotPrint), FUNCTION(cuUserObjectCreate), FUNCTION(cuUserObjectRetain),
    FUNCTION(cuUserObjectRelease), FUNCTION(cuGraphRetainUserObject),
    FUNCTION(cuGraphReleaseUserObject), FUNCTION(cuDeviceGraphMemTrim),
    FUNCTION(cuDeviceGetGraphMemAttribute), FUNCTION(cuDeviceSetGraphMemAttribute),
    FUNCTION(cuEventCreate),
    FUNCTION(cuEventDestroy), STREAM_FUNCTION(cuEventRecord),
    STREAM_FUNCTION(cuEventRecordWithFlags), FUNCTION(cuEventQuery),
    FUNCTION(cuEventSynchronize), FUNCTION(cuEventElapsedTime),
    // Between processes.
    FUNCTION(cuIpcGetMemHandle), FUNCTION(cuIpcOpenMemHandle), FUNCTION(cuIpcCloseMemHandle),
    FUNCTION(cuIpcGetEventHandle), FUNCTION(cuIpcOpenEventHandle),
    // Modules and kernels.
    FUNCTION(cuModuleLoadData), FUNCTION(cuModuleLoadDataEx), FUNCTION(cuModuleLoadFatBinary),
    FUNCTION(cuModuleUnload), FUNCTION(cuModuleGetFunction), FUNCTION(cuModuleGetLoadingMode),
    FUNCTION(cuLibraryLoadData), FUNCTION(cuLibraryUnload), FUNCTION(cuLibraryGetKernel),
    FUNCTION(cuKernelGetFunction), FUNCTION(cuFuncGetName), FUNCTION(cuFuncGetAttribute),
    FUNCTION(cuFuncSetAttribute), FUNCTION(cuFuncSetCacheConfig), FUNCTION(cuModuleLoad),
    FUNCTION(cuOccupancyMaxActiveBlocksPerMultiprocessor), STREAM_FUNCTION(cuLaunchKernel),
    STREAM_FUNCTION(cuLaunchKernelEx), STREAM_FUNCTION(cuLaunchCooperativeKernel),
};
#pragma GCC diagnostic pop
// clang-format on

// A name taken apart.
struct Request {
  std::string_view symbol;  // with the version
  std::string_view name;    // without it
  bool is_per_thread = false;
};

Request parse(std::string_view text) {
  Request request;
  request.is_per_thread = text.ends_with("_ptsz") || text.ends_with("_ptds");
  if (request.is_per_thread) text.remove_suffix(5);
  request.symbol = text;
  request.name = emulator::documented_name(text);
  return request;
}

// The version that a name has in it or, without one, the newest that a program compiled for
// cuda_version knows.
const EntryPoint* find(const Request& request, int cuda_version, bool* is_known) {
  const EntryPoint* best = nullptr;
  const bool has_version = request.symbol != request.name;
  for (const EntryPoint& entry : kEntryPoints) {
    if (entry.name != request.name) continue;
    *is_known = true;
    if (has_version && entry.symbol == request.symbol) return &entry;
    if (has_version || entry.since_version <= cuda_version) best = &entry;
  }
  return best;
}

CUresult look_up(const char* text, void** function, int cuda_version, cuuint64_t flags,
                 CUdriverProcAddressQueryResult* status) {
  if (text == nullptr || function == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *function = nullptr;
  Request request = parse(text);
  if ((flags & CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM) != 0) request.is_per_thread = true;
  bool is_known = false;
  const EntryPoint* entry = find(request, cuda_version, &is_known);
  if (entry != nullptr) {
    const bool is_per_thread = request.is_per_thread && entry->per_thread_function != nullptr;
    *function = is_per_thread ? entry->per_thread_function : entry->function;
  }
  if (status != nullptr) {
    *status = entry != nullptr ? CU_GET_PROC_ADDRESS_SUCCESS
              : is_known       ? CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT
                               : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  }
  return entry != nullptr ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

}  // namespace

extern "C" {

// A function that is not there is an answer and no error, unlike in the version before.
CUresult cuGetProcAddress_v2(const char* name, void** function, int cuda_version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult* status) {
  return emulator::plain(__func__, [=] {
    const CUresult found = look_up(name, function, cuda_version, flags, status);
    return found == CUDA_ERROR_NOT_FOUND ? CUDA_SUCCESS : found;
  });
}

CUresult cuGetProcAddress(const char* name, void** function, int cuda_version, cuuint64_t flags) {
  return emulator::plain(__func__,
                         [=] { return look_up(name, function, cuda_version, flags, nullptr); });
}

size_t spillover_emulator_function_names(char* out, size_t capacity) {
  std::string text;
  for (const EntryPoint& entry : kEntryPoints) {
    if (&entry != kEntryPoints && (&entry)[-1].name == entry.name) continue;
    text += std::string(entry.name) + "\n";
  }
  if (out != nullptr && capacity > 0) out[text.copy(out, capacity - 1)] = '\0';
  return text.size();
}

}  // extern "C"
