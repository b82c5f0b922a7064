// A CUDA runtime without a GPU: device memory is the host's, kernels are counted and not run. build.py adds the functions of libcudart
// that PyTorch links and that have nothing to answer.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <map>
#include <mutex>
#include <string>
#undef cudaGetDeviceProperties
#define EXPORT extern "C" __attribute__((visibility("default")))

static std::mutex guard;

// --- what is counted

static std::map<std::string, long> counts;

EXPORT void fake_count(const char* what) {
  std::lock_guard<std::mutex> lock(guard);
  counts[what]++;
}
EXPORT void fake_reset() {
  std::lock_guard<std::mutex> lock(guard);
  counts.clear();
}
EXPORT const char* fake_counts() {
  static std::string text;
  std::lock_guard<std::mutex> lock(guard);
  text.clear();
  for (auto& [what, count] : counts) text += what + "\t" + std::to_string(count) + "\n";
  return text.c_str();
}

static bool capturing = false;
static cudaStream_t captured;

static cudaError_t waits() {
  fake_count("wait");
  if (capturing) fake_count("wait in a capture");
  return cudaSuccess;
}

// --- devices

static thread_local int current = 0;

static int devices() {
  const char* number = getenv("FAKE_DEVICES");
  return number ? atoi(number) : 1;
}
EXPORT int fake_device() { return current; }
EXPORT cudaError_t cudaGetDeviceCount(int* number) { return *number = devices(), *number ? cudaSuccess : cudaErrorNoDevice; }
EXPORT cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
EXPORT cudaError_t cudaSetDevice(int device) {
  if (device >= devices()) return cudaErrorInvalidDevice;
  return current = device, cudaSuccess;
}
static const size_t MEMORY = size_t(79) << 30;

EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  static const std::map<int, int> h100 = {
      {cudaDevAttrMaxThreadsPerBlock, 1024},        {cudaDevAttrMaxBlockDimX, 1024},
      {cudaDevAttrMaxBlockDimY, 1024},              {cudaDevAttrMaxBlockDimZ, 64},
      {cudaDevAttrMaxGridDimX, 2147483647},         {cudaDevAttrMaxGridDimY, 65535},
      {cudaDevAttrMaxGridDimZ, 65535},              {cudaDevAttrMaxSharedMemoryPerBlock, 49152},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448}, {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 233472},
      {cudaDevAttrReservedSharedMemoryPerBlock, 1024}, {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMaxRegistersPerBlock, 65536},     {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
      {cudaDevAttrMultiProcessorCount, 132},        {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
      {cudaDevAttrMaxBlocksPerMultiprocessor, 32},  {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrClockRate, 1980000},              {cudaDevAttrMemoryClockRate, 2619000},
      {cudaDevAttrGlobalMemoryBusWidth, 5120},      {cudaDevAttrL2CacheSize, 50 << 20},
      {cudaDevAttrUnifiedAddressing, 1},            {cudaDevAttrCooperativeLaunch, 1},
      {cudaDevAttrMemoryPoolsSupported, 1},         {cudaDevAttrConcurrentKernels, 1},
  };
  auto found = h100.find(attribute);
  return *value = found == h100.end() ? 0 : found->second, cudaSuccess;
}
EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, "H100 that is not there");
  properties->totalGlobalMem = MEMORY;
  properties->major = 9;
  properties->multiProcessorCount = 132;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->sharedMemPerBlock = 49152;
  properties->sharedMemPerBlockOptin = 232448;
  properties->sharedMemPerMultiprocessor = 233472;
  properties->l2CacheSize = 50 << 20;
  properties->maxGridSize[0] = 2147483647;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->textureAlignment = 512;
  properties->memPitch = 2147483647;
  properties->unifiedAddressing = properties->concurrentKernels = 1;
  properties->pciDeviceID = device;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
EXPORT cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, cudaSuccess; }

// --- memory: {first byte: (bytes, device, or -1 on the host)}

static std::map<uintptr_t, std::pair<size_t, int>> blocks;

static cudaError_t allocate(void** pointer, size_t bytes, int device) {
  bytes = (bytes + 511) / 512 * 512 + 512 * !bytes;
  void* block = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (block == MAP_FAILED || bytes > MEMORY) return cudaErrorMemoryAllocation;
  std::lock_guard<std::mutex> lock(guard);
  blocks[uintptr_t(block)] = {bytes, device};
  return *pointer = block, cudaSuccess;
}
static cudaError_t release(void* pointer) {
  std::lock_guard<std::mutex> lock(guard);
  auto found = blocks.find(uintptr_t(pointer));
  if (found == blocks.end()) return pointer ? cudaErrorInvalidValue : cudaSuccess;
  munmap(pointer, found->second.first);
  blocks.erase(found);
  return cudaSuccess;
}
// The device, -1 for the host's pinned memory, -2 for memory that CUDA has not given.
EXPORT int fake_owner(const void* pointer) {
  std::lock_guard<std::mutex> lock(guard);
  auto found = blocks.upper_bound(uintptr_t(pointer));
  if (found == blocks.begin()) return -2;
  --found;
  return uintptr_t(pointer) < found->first + found->second.first ? found->second.second : -2;
}
EXPORT cudaError_t cudaMalloc(void** pointer, size_t bytes) { return allocate(pointer, bytes, current); }
EXPORT cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) { return allocate(pointer, bytes, -1); }
EXPORT cudaError_t cudaFree(void* pointer) { return release(pointer); }
EXPORT cudaError_t cudaFreeHost(void* pointer) { return release(pointer); }
EXPORT cudaError_t cudaMemGetInfo(size_t* free, size_t* total) { return *free = *total = MEMORY, cudaSuccess; }
EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* pointer) {
  int owner = fake_owner(pointer);
  memset(found, 0, sizeof *found);
  found->type = owner >= 0 ? cudaMemoryTypeDevice : owner == -1 ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  found->device = owner >= 0 ? owner : 0;
  found->devicePointer = found->hostPointer = const_cast<void*>(pointer);
  return cudaSuccess;
}
// Between devices large ones are left out: what is in them is of no interest.
static cudaError_t copy(void* to, const void* from, size_t bytes) {
  bool on_device = fake_owner(to) >= 0 && fake_owner(from) >= 0;
  if (!on_device || bytes <= (size_t(64) << 20)) memmove(to, from, bytes);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) { return waits(), copy(to, from, bytes); }
EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  if (fake_owner(to) == -2 || fake_owner(from) == -2) waits();  // pageable
  return copy(to, from, bytes);
}
EXPORT cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t) {
  return fake_count("copy between devices"), copy(to, from, bytes);
}
EXPORT cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (bytes <= (size_t(64) << 20)) memset(to, value, bytes);
  return cudaSuccess;
}

// --- kernels

EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
EXPORT char __cudaInitModule(void**) { return 1; }
struct Launch {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
static thread_local Launch pushed;
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  return pushed = {grid, block, shared, stream}, 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *static_cast<void**>(stream) = pushed.stream;
  return cudaSuccess;
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) { return *kernel = cudaKernel_t(function), cudaSuccess; }
static cudaError_t launched(dim3 grid) {
  fake_count("launch");
  return grid.y > 65535 || grid.z > 65535 ? cudaErrorInvalidConfiguration : cudaSuccess;
}
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3 grid, dim3, void**, size_t, cudaStream_t) { return launched(grid); }
EXPORT cudaError_t cudaLaunchKernel(const void*, dim3 grid, dim3, void**, size_t, cudaStream_t) { return launched(grid); }
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* launch, const void*, void**) { return launched(launch->gridDim); }
EXPORT cudaError_t cudaLaunchCooperativeKernel(const void*, dim3 grid, dim3, void**, size_t, cudaStream_t) { return launched(grid); }
EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  memset(found, 0, sizeof *found);
  found->ptxVersion = found->binaryVersion = 90, found->maxThreadsPerBlock = 1024, found->numRegs = 32;
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  return *blocks = 4, cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) { return *blocks = 4, cudaSuccess; }
EXPORT cudaError_t cudaGetSymbolAddress(void** pointer, const void*) {
  static char symbol[1 << 16];
  return *pointer = symbol, cudaSuccess;
}

// --- streams, events, graphs

static uintptr_t next = 16;
EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return *stream = cudaStream_t(next++), cudaSuccess; }
EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return *event = cudaEvent_t(next++), cudaSuccess; }
EXPORT cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) { return *milliseconds = 1, cudaSuccess; }
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t) { return waits(); }
EXPORT cudaError_t cudaDeviceSynchronize() { return waits(); }
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t) { return waits(); }
static cudaStreamCaptureStatus status(cudaStream_t stream) {
  return capturing && stream == captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* found) { return *found = status(stream), cudaSuccess; }
EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  return capturing = true, captured = stream, cudaSuccess;
}
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) { return capturing = false, *graph = cudaGraph_t(1), cudaSuccess; }
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* found, unsigned long long* id, cudaGraph_t* graph,
                                            const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges, size_t* number) {
  *found = status(stream);
  if (id) *id = 7;
  if (graph) *graph = cudaGraph_t(1);
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (number) *number = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t, unsigned long long) {
  return *made = cudaGraphExec_t(1), cudaSuccess;
}
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* number) { return *number = 1, cudaSuccess; }

// --- errors, and the driver below

EXPORT const char* cudaGetErrorString(cudaError_t) { return "an error of the GPU that is not there"; }
EXPORT const char* cudaGetErrorName(cudaError_t) { return "cudaErrorFake"; }
static int unsupported() { return 801; }  // CUDA_ERROR_NOT_SUPPORTED
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* found) {
  static void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  void* symbol = driver ? dlsym(driver, name) : nullptr;
  *function = symbol ? symbol : reinterpret_cast<void*>(unsupported);
  if (found) *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
