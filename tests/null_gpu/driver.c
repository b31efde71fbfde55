/* A CUDA driver, runtime and cuBLAS that do nothing, preloaded where there is no GPU.

   torch sees one card. Its memory is address space that is never filled, so the allocator's sizes
   and peaks are true; launches succeed and compute nothing, and whatever the host reads from the
   device is 0. What torch imports and this file lacks is added by null_gpu.py: it returns 0.

   Environment: NULL_GPU_CC       compute capability times ten (90)
                NULL_GPU_GB       memory in GB of 1e9 bytes (85)
                NULL_GPU_DRIVER   CUDA version of the driver (13020); below 13000: too old
                NULL_GPU_UNIFIED  set: an integrated device, whose free memory is the machine's */

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda.h>
#include <cuda_runtime_api.h>

#define DEVICE_NAME "NVIDIA H100 80GB HBM3"
#define NEWEST_DRIVER 13020
#define OLDEST_DRIVER 13000
#define NUM_MULTIPROCESSORS 132
#define SHARED_BYTES 49152
#define SHARED_BYTES_OPTIN 232448
#define SHARED_BYTES_MULTIPROCESSOR 233472
#define REGISTERS 65536
#define L2_BYTES (50 << 20)
#define MAX_SEGMENTS 65536

static char thing; /* what every handle points to */

static double setting(const char *name, double otherwise) {
    const char *value = getenv(name);
    return value ? atof(value) : otherwise;
}

static int capability(void) { return (int)setting("NULL_GPU_CC", 90); }

/* The architecture of torch's kernels that the device would run: the newest that is not newer. */
static int kernels_of(int capability) {
    static const int built[] = {120, 100, 90, 86, 80, 75};
    for (unsigned i = 0; i < sizeof built / sizeof *built; i++)
        if (built[i] <= capability) return built[i];
    return 0;
}

static int driver_version(void) { return (int)setting("NULL_GPU_DRIVER", NEWEST_DRIVER); }
static size_t total_bytes(void) { return (size_t)(setting("NULL_GPU_GB", 85) * 1e9); }
static int is_unified(void) { return getenv("NULL_GPU_UNIFIED") != NULL; }

static int attribute(int which) {
    switch (which) {
    case cudaDevAttrComputeCapabilityMajor: return capability() / 10;
    case cudaDevAttrComputeCapabilityMinor: return capability() % 10;
    case cudaDevAttrMultiProcessorCount: return NUM_MULTIPROCESSORS;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxSharedMemoryPerBlock: return SHARED_BYTES;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return SHARED_BYTES_OPTIN;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return SHARED_BYTES_MULTIPROCESSOR;
    case cudaDevAttrMaxRegistersPerBlock: return REGISTERS;
    case cudaDevAttrMaxRegistersPerMultiprocessor: return REGISTERS;
    case cudaDevAttrIntegrated: return is_unified();
    default: return 1;
    }
}

/* --- Memory --- */

static struct {
    char *start;
    size_t size;
} segments[MAX_SEGMENTS];
static size_t used_bytes;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

cudaError_t cudaMalloc(void **pointer, size_t size) {
    cudaError_t result = cudaErrorMemoryAllocation;
    *pointer = NULL;
    pthread_mutex_lock(&lock);
    if (used_bytes + size <= total_bytes()) {
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        char *start = mmap(NULL, size ? size : 1, PROT_READ | PROT_WRITE, flags, -1, 0);
        for (int i = 0; start != MAP_FAILED && i < MAX_SEGMENTS; i++) {
            if (!segments[i].start) {
                segments[i].start = start;
                segments[i].size = size;
                used_bytes += size;
                *pointer = start;
                result = cudaSuccess;
                break;
            }
        }
    }
    pthread_mutex_unlock(&lock);
    return result;
}

cudaError_t cudaFree(void *pointer) {
    pthread_mutex_lock(&lock);
    for (int i = 0; pointer && i < MAX_SEGMENTS; i++) {
        if (segments[i].start == pointer) {
            munmap(pointer, segments[i].size ? segments[i].size : 1);
            used_bytes -= segments[i].size;
            segments[i].start = NULL;
            break;
        }
    }
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

static int is_on_device(const void *pointer) {
    int found = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; !found && i < MAX_SEGMENTS; i++) {
        const char *start = segments[i].start;
        found = start && (const char *)pointer >= start &&
                (const char *)pointer < start + segments[i].size;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *total = total_bytes();
    *free_bytes = *total - used_bytes;
    if (is_unified()) *free_bytes /= 4; /* the rest: pages of files that Linux would give back */
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    memset(attributes, 0, sizeof *attributes);
    attributes->type = is_on_device(pointer) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    return cudaSuccess;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute which, CUdeviceptr pointer) {
    *(CUdeviceptr *)data = pointer;
    return CUDA_SUCCESS;
}

cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
    *pointer = calloc(1, size);
    return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaMallocHost(void **pointer, size_t size) { return cudaHostAlloc(pointer, size, 0); }

cudaError_t cudaFreeHost(void *pointer) {
    free(pointer);
    return cudaSuccess;
}

/* Nothing reaches the device, so its address space gets no real pages; what is read there is 0. */
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    if (kind == cudaMemcpyDefault) {
        if (is_on_device(to)) return cudaSuccess;
        kind = is_on_device(from) ? cudaMemcpyDeviceToHost : cudaMemcpyHostToHost;
    }
    if (kind == cudaMemcpyDeviceToHost) memset(to, 0, size);
    if (kind == cudaMemcpyHostToHost) memcpy(to, from, size);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
    return cudaMemcpy(to, from, size, kind);
}

/* --- Device --- */

cudaError_t cudaGetDeviceCount(int *count) {
    *count = driver_version() >= OLDEST_DRIVER;
    return *count ? cudaSuccess : cudaErrorInsufficientDriver;
}

cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}

#undef cudaGetDeviceProperties
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    memset(properties, 0, sizeof *properties);
    strcpy(properties->name, DEVICE_NAME);
    properties->major = capability() / 10;
    properties->minor = capability() % 10;
    properties->totalGlobalMem = total_bytes();
    properties->multiProcessorCount = NUM_MULTIPROCESSORS;
    properties->integrated = is_unified();
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = 1024;
    properties->maxThreadsPerMultiProcessor = 2048;
    properties->sharedMemPerBlock = SHARED_BYTES;
    properties->sharedMemPerBlockOptin = SHARED_BYTES_OPTIN;
    properties->sharedMemPerMultiprocessor = SHARED_BYTES_MULTIPROCESSOR;
    properties->regsPerBlock = REGISTERS;
    properties->regsPerMultiprocessor = REGISTERS;
    properties->l2CacheSize = L2_BYTES;
    properties->maxThreadsDim[0] = 1024;
    properties->maxThreadsDim[1] = 1024;
    properties->maxThreadsDim[2] = 64;
    properties->maxGridSize[0] = 2147483647;
    properties->maxGridSize[1] = 65535;
    properties->maxGridSize[2] = 65535;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties_v2(struct cudaDeviceProp *properties, int device) {
    return cudaGetDeviceProperties(properties, device);
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
    *value = attribute(which);
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = driver_version();
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = NEWEST_DRIVER;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
    strncpy(id, "0000:00:00.0", length);
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : "error of the null GPU";
}

const char *cudaGetErrorName(cudaError_t error) { return "cudaErrorOfTheNullGPU"; }

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = "error of the null GPU";
    return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
    *version = driver_version();
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
    *count = 1;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = 0;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
    *value = attribute(which); /* the numbers are the runtime's */
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    strncpy(name, DEVICE_NAME, length);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device) {
    memset(uuid, 0, sizeof *uuid);
    return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem(size_t *size, CUdevice device) {
    *size = total_bytes();
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 0;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = (CUcontext)&thing;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) {
    *device = 0;
    return CUDA_SUCCESS;
}

/* --- Streams and events: all work is done as soon as it is queued --- */

cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    *stream = (cudaStream_t)&thing;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    return cudaStreamCreate(stream);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    return cudaStreamCreate(stream);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) {
    *event = (cudaEvent_t)&thing;
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    return cudaEventCreate(event);
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    *milliseconds = 1;
    return cudaSuccess;
}

/* --- Kernels --- */

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    static long loaded; /* every module is another one */
    *module = (CUmodule)++loaded;
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count,
                            CUjit_option *options, void **values) {
    return cuModuleLoadData(module, image);
}

CUresult cuModuleLoad(CUmodule *module, const char *path) { return cuModuleLoadData(module, path); }

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)module;
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
    *value = 0;
    if (which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK) *value = 1024;
    if (which == CU_FUNC_ATTRIBUTE_NUM_REGS) *value = 64;
    return CUDA_SUCCESS;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->ptxVersion = kernels_of(capability());
    attributes->binaryVersion = kernels_of(capability());
    attributes->maxDynamicSharedSizeBytes = SHARED_BYTES_OPTIN;
    return cudaSuccess;
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, CUfunction function, int block_size,
                                                     size_t shared_bytes) {
    *count = 2;
    return CUDA_SUCCESS;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count, const void *function,
                                                          int block_size, size_t shared_bytes) {
    *count = 2;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *function,
                                                                   int block_size,
                                                                   size_t shared_bytes,
                                                                   unsigned flags) {
    *count = 2;
    return cudaSuccess;
}

/* --- Entry points by name: there are none but those that are linked --- */

#undef cuGetProcAddress
CUresult cuGetProcAddress(const char *symbol, void **function, int version, cuuint64_t flags,
                          CUdriverProcAddressQueryResult *status) {
    *function = NULL;
    return CUDA_ERROR_NOT_FOUND;
}

CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *status) {
    *function = NULL;
    if (status) *status = CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return CUDA_ERROR_NOT_FOUND;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *status) {
    *function = NULL;
    return cudaErrorNotSupported;
}

/* --- cuBLAS --- */

cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) {
    *handle = (cublasHandle_t)&thing;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetVersion_v2(cublasHandle_t handle, int *version) {
    *version = CUBLAS_VERSION;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
    *handle = (cublasLtHandle_t)&thing;
    return CUBLAS_STATUS_SUCCESS;
}

size_t cublasLtGetVersion(void) { return CUBLAS_VERSION; }
size_t cublasLtGetCudartVersion(void) { return NEWEST_DRIVER; }

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, cublasLtMatrixLayout_t a,
    cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
    cublasLtMatmulPreference_t preference, int wanted, cublasLtMatmulHeuristicResult_t results[],
    int *found) {
    memset(results, 0, sizeof *results);
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}
