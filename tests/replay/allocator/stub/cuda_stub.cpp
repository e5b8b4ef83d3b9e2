// A stand-in for the CUDA runtime and driver: no GPU, only addresses and how much memory is left.
// With it PyTorch's own libc10_cuda.so runs on any Linux machine, and its decisions can be recorded.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

extern "C" {
uint64_t stub_total = 1ull << 34;     // what the GPU has
uint64_t stub_capacity = 1ull << 34;  // what of it is left to this process
int stub_capturing = 0;               // whether streams say that they are captured
}

namespace {

constexpr uint64_t kPage = 2ull << 20;
uint64_t used = 0, upward = 0x7f0000000000ull, downward = upward, next_range = 0x300000000000ull;
uint64_t clock_now = 1, next_handle = 1, noise = 88172645463325252ull;
std::map<void*, uint64_t> segments;
std::map<uint64_t, uint64_t> handles;
std::map<cudaStream_t, uint64_t> reached;  // up to which event each stream has come
cudaError_t last_error = cudaSuccess;
int current_device = 0;

// Drivers do not give increasing addresses: go up or down, by chance but always alike (xorshift64).
uint64_t new_address(uint64_t size) {
  const uint64_t span = (size + kPage - 1) / kPage * kPage;
  noise ^= noise << 13;
  noise ^= noise >> 7;
  noise ^= noise << 17;
  if (noise & 1) return downward -= span;
  upward += span;
  return upward - span;
}

struct Event {
  cudaStream_t stream;
  uint64_t when;
};

}  // namespace

extern "C" {

void stub_complete(cudaStream_t stream) { reached[stream] = clock_now++; }

cudaError_t cudaMalloc(void** address, size_t size) {
  if (used + size > stub_capacity) return last_error = cudaErrorMemoryAllocation;
  used += size;
  *address = reinterpret_cast<void*>(new_address(size));
  segments[*address] = size;
  return cudaSuccess;
}
cudaError_t cudaFree(void* address) {
  if (address) {
    used -= segments.at(address);
    segments.erase(address);
  }
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = stub_capacity - used;
  *total = stub_total;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  memset(properties, 0, sizeof *properties);
  properties->totalGlobalMem = stub_total;
  properties->major = 9;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) { return *count = 2, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return current_device = device, cudaSuccess; }
cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t) { return "error of the stub"; }
const char* cudaGetErrorName(cudaError_t) { return "stub"; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event{nullptr, 0});
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  *reinterpret_cast<Event*>(event) = {stream, clock_now++};
  reached.emplace(stream, 0);
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  auto* made = reinterpret_cast<Event*>(event);
  return reached[made->stream] >= made->when ? cudaSuccess : last_error = cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float*, cudaEvent_t, cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
static cudaStreamCaptureStatus status() {
  return stub_capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* state) { return *state = status(), cudaSuccess; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* state, unsigned long long*, cudaGraph_t*,
                                     const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  return *state = status(), cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* low, int* high) { return *low = 0, *high = -5, cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  static uint64_t made = 0x1000;
  *stream = reinterpret_cast<cudaStream_t>(made += 16);
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
}  // extern "C"

// The driver's functions, asked for by name.
namespace {

CUresult reserve(CUdeviceptr* address, size_t size, size_t, CUdeviceptr, unsigned long long) {
  *address = next_range;
  next_range += (size + (1ull << 30)) & ~(kPage - 1);
  return CUDA_SUCCESS;
}
CUresult create(CUmemGenericAllocationHandle* handle, size_t size, const CUmemAllocationProp*, unsigned long long) {
  if (used + size > stub_capacity) return CUDA_ERROR_OUT_OF_MEMORY;
  used += size;
  *handle = next_handle++;
  handles[*handle] = size;
  return CUDA_SUCCESS;
}
CUresult release(CUmemGenericAllocationHandle handle) {
  used -= handles.at(handle);
  handles.erase(handle);
  return CUDA_SUCCESS;
}
CUresult map(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long) { return CUDA_SUCCESS; }
CUresult on_range(CUdeviceptr, size_t) { return CUDA_SUCCESS; }
CUresult access(CUdeviceptr, size_t, const CUmemAccessDesc*, size_t) { return CUDA_SUCCESS; }
CUresult text(CUresult, const char** string) { return *string = "error of the stub", CUDA_SUCCESS; }
CUresult attribute(int* value, CUdevice_attribute, CUdevice) { return *value = 0, CUDA_SUCCESS; }
CUresult device(CUdevice* handle, int index) { return *handle = index, CUDA_SUCCESS; }
CUresult unsupported() { return CUDA_ERROR_NOT_SUPPORTED; }

}  // namespace

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                        cudaDriverEntryPointQueryResult* result) {
  static const std::map<std::string, void*> known = {
      {"cuMemAddressReserve", (void*)reserve}, {"cuMemAddressFree", (void*)on_range},
      {"cuMemCreate", (void*)create},          {"cuMemRelease", (void*)release},
      {"cuMemMap", (void*)map},                {"cuMemUnmap", (void*)on_range},
      {"cuMemSetAccess", (void*)access},       {"cuGetErrorString", (void*)text},
      {"cuDeviceGetAttribute", (void*)attribute}, {"cuDeviceGet", (void*)device}};
  auto found = known.find(name);
  *function = found == known.end() ? (void*)unsupported : found->second;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// What libc10_cuda.so links against and never calls here.
#define UNUSED(name)                       \
  extern "C" int name##_unused() asm(#name); \
  extern "C" int name##_unused() { return 801; }
UNUSED(cudaDeviceEnablePeerAccess) UNUSED(cudaDeviceGetDefaultMemPool) UNUSED(cudaFreeAsync)
UNUSED(cudaGraphNodeGetDependencies) UNUSED(cudaIpcCloseMemHandle) UNUSED(cudaIpcGetMemHandle)
UNUSED(cudaIpcOpenMemHandle) UNUSED(cudaMallocAsync) UNUSED(cudaMemPoolGetAttribute) UNUSED(cudaMemPoolSetAccess)
UNUSED(cudaMemPoolSetAttribute) UNUSED(cudaMemPoolTrimTo) UNUSED(cudaMemcpy) UNUSED(cudaMemcpyAsync)
UNUSED(cudaMemcpyPeerAsync)
