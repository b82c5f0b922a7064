// The CUDA driver as Triton's launchers ask it; memory, devices and counts are runtime.cpp's.
#include <cuda.h>
#include <dlfcn.h>
#include <stdlib.h>

#include <string>
#undef cuPointerGetAttribute
#define EXPORT extern "C" __attribute__((visibility("default")))
#define SUCCEEDS(function, ...) \
  EXPORT CUresult function(__VA_ARGS__) { return CUDA_SUCCESS; }

template <typename Function>
static Function runtime(const char* name) {
  static void* library = dlopen("libcudart.so.13", RTLD_NOW | RTLD_GLOBAL);
  return Function(dlsym(library, name));
}
static int current() { return runtime<int (*)()>("fake_device")(); }
static void count(const char* what) { runtime<void (*)(const char*)>("fake_count")(what); }

EXPORT CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGet(CUdevice* device, int index) { return *device = index, CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGetCount(int* number) { return runtime<CUresult (*)(int*)>("cudaGetDeviceCount")(number); }
EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  return runtime<CUresult (*)(int*, int, int)>("cudaDeviceGetAttribute")(value, attribute, device);
}
EXPORT CUresult cuCtxGetCurrent(CUcontext* context) { return *context = CUcontext(1L + current()), CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetDevice(CUdevice* device) { return *device = current(), CUDA_SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) { return *context = CUcontext(1L + device), CUDA_SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) { return *flags = 0, *active = 1, CUDA_SUCCESS; }
EXPORT CUresult cuModuleLoad(CUmodule* module, const char*) { return *module = CUmodule(1), CUDA_SUCCESS; }
EXPORT CUresult cuModuleLoadData(CUmodule* module, const void*) { return *module = CUmodule(1), CUDA_SUCCESS; }
EXPORT CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  return *function = CUfunction(new std::string(name)), CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute attribute, int value) {
  bool too_large = attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && value > 232448;
  return too_large ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* launch, CUfunction function, void**, void**) {
  count(("kernel " + *reinterpret_cast<std::string*>(function)).c_str());
  return launch->gridDimY > 65535 || launch->gridDimZ > 65535 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
EXPORT CUresult cuPointerGetAttribute(void* found, CUpointer_attribute, CUdeviceptr pointer) {
  int owner = runtime<int (*)(const void*)>("fake_owner")(reinterpret_cast<const void*>(pointer));
  if (owner == -2) return CUDA_ERROR_INVALID_VALUE;
  if (owner != current()) count("pointer of another device");
  return *static_cast<CUdeviceptr*>(found) = pointer, CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxActiveClusters(int* number, CUfunction, const CUlaunchConfig*) { return *number = 66, CUDA_SUCCESS; }
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* number, CUfunction, int, size_t) { return *number = 4, CUDA_SUCCESS; }
EXPORT CUresult cuGetErrorString(CUresult, const char** text) { return *text = "an error of the driver that is not there", CUDA_SUCCESS; }
EXPORT CUresult cuGetProcAddress_v2(const char* name, void** function, int, cuuint64_t, CUdriverProcAddressQueryResult* found) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (found) *found = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return CUDA_SUCCESS;
}
SUCCEEDS(cuInit, unsigned)
SUCCEEDS(cuCtxSetCurrent, CUcontext)
SUCCEEDS(cuCtxSetLimit, CUlimit, size_t)
SUCCEEDS(cuCtxGetLimit, size_t*, CUlimit)
SUCCEEDS(cuModuleUnload, CUmodule)
SUCCEEDS(cuFuncSetCacheConfig, CUfunction, CUfunc_cache)
SUCCEEDS(cuLaunchKernel, CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void**, void**)
SUCCEEDS(cuTensorMapEncodeTiled, CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
         const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
         CUtensorMapFloatOOBfill)
