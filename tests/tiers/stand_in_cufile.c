/* cuFile over pread, pwrite and the driver's copies, by NVIDIA's own header. STAND_IN_FAIL names a
 * call that fails, with STAND_IN_CODE; STAND_IN_VERSION, STAND_IN_SHORT (transfers move a third),
 * STAND_IN_LOSES (a transfer reports success and moves nothing) and STAND_IN_OPEN (the driver was
 * open before, so that settings stay) do what they say. WITHOUT_PARAMETERS leaves out what early
 * libraries do not have. */
#define _GNU_SOURCE
#include <cufile.h>
#include <dlfcn.h>
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static bool modes[16] = {[CUFILE_PARAM_PROPERTIES_ALLOW_COMPAT_MODE] = true};
int stand_in_open;    /* Of each, minus those closed. */
int stand_in_files;
int stand_in_buffers;

static int number(const char* name, int otherwise) {
  const char* value = getenv(name);
  return value == NULL ? otherwise : atoi(value);
}

static bool fails(const char* call) {
  const char* which = getenv("STAND_IN_FAIL");
  return which != NULL && strcmp(which, call) == 0;
}

static CUfileError_t answer(const char* call) {
  CUfileError_t status = {CU_FILE_SUCCESS, CUDA_SUCCESS};
  if (fails(call)) {
    status.err = (CUfileOpError)number("STAND_IN_CODE", CU_FILE_INTERNAL_ERROR);
    status.cu_err = CUDA_ERROR_UNKNOWN;
  }
  return status;
}

CUfileError_t cuFileGetVersion(int* version) {
  *version = number("STAND_IN_VERSION", 1150);
  return answer("cuFileGetVersion");
}

#ifndef WITHOUT_PARAMETERS
CUfileError_t cuFileSetParameterBool(CUFileBoolConfigParameter_t parameter, bool value) {
  CUfileError_t status = answer("cuFileSetParameterBool");
  if (getenv("STAND_IN_OPEN") != NULL) status.err = CU_FILE_DRIVER_ALREADY_OPEN;
  if (status.err == CU_FILE_SUCCESS) modes[parameter] = value;
  return status;
}

CUfileError_t cuFileGetParameterBool(CUFileBoolConfigParameter_t parameter, bool* value) {
  *value = modes[parameter];
  return answer("cuFileGetParameterBool");
}
#endif

CUfileError_t cuFileDriverOpen(void) {
  CUfileError_t status = answer("cuFileDriverOpen");
  if (status.err == CU_FILE_SUCCESS) ++stand_in_open;
  return status;
}

CUfileError_t cuFileDriverClose_v2(void) {
  --stand_in_open;
  modes[CUFILE_PARAM_PROPERTIES_ALLOW_COMPAT_MODE] = true;
  return answer("cuFileDriverClose");
}

CUfileError_t cuFileHandleRegister(CUfileHandle_t* handle, CUfileDescr_t* descriptor) {
  CUfileError_t status = answer("cuFileHandleRegister");
  if (status.err != CU_FILE_SUCCESS) return status;
  if (descriptor->type != CU_FILE_HANDLE_TYPE_OPAQUE_FD || descriptor->fs_ops != NULL) {
    status.err = CU_FILE_INVALID_VALUE;
    return status;
  }
  *handle = (void*)(intptr_t)(descriptor->handle.fd + 1);
  ++stand_in_files;
  return status;
}

void cuFileHandleDeregister(CUfileHandle_t handle) {
  (void)handle;
  --stand_in_files;
}

CUfileError_t cuFileBufRegister(const void* base, size_t size, int flags) {
  (void)base, (void)size, (void)flags;
  CUfileError_t status = answer("cuFileBufRegister");
  if (status.err == CU_FILE_SUCCESS) ++stand_in_buffers;
  return status;
}

CUfileError_t cuFileBufDeregister(const void* base) {
  (void)base;
  --stand_in_buffers;
  return answer("cuFileBufDeregister");
}

static void* driver(const char* name) {
  return dlsym(dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD), name);
}

static ssize_t transfer(const char* call, CUfileHandle_t handle, char* device, size_t size,
                        off_t at, bool writes) {
  const int file = (int)(intptr_t)handle - 1;
  if (fails(call)) {
    const int code = number("STAND_IN_CODE", CU_FILE_INTERNAL_ERROR);
    errno = code;
    return code < CUFILEOP_BASE_ERR ? -1 : -code;
  }
  if (getenv("STAND_IN_LOSES") != NULL) return (ssize_t)size;
  if (getenv("STAND_IN_SHORT") != NULL && size > 8192) size = size / 3 / 4096 * 4096;
  void* host = aligned_alloc(4096, size);
  ssize_t moved;
  if (writes) {
    CUresult (*copy)(void*, CUdeviceptr, size_t) = driver("cuMemcpyDtoH_v2");
    if (copy(host, (CUdeviceptr)device, size) != CUDA_SUCCESS) abort();
    moved = pwrite(file, host, size, at);
  } else {
    CUresult (*copy)(CUdeviceptr, const void*, size_t) = driver("cuMemcpyHtoD_v2");
    moved = pread(file, host, size, at);
    if (moved > 0 && copy((CUdeviceptr)device, host, (size_t)moved) != CUDA_SUCCESS) abort();
  }
  free(host);
  return moved;
}

ssize_t cuFileRead(CUfileHandle_t handle, void* base, size_t size, off_t at, off_t into) {
  return transfer("cuFileRead", handle, (char*)base + into, size, at, false);
}

ssize_t cuFileWrite(CUfileHandle_t handle, const void* base, size_t size, off_t at, off_t into) {
  return transfer("cuFileWrite", handle, (char*)base + into, size, at, true);
}
