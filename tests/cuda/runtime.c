// As much of the CUDA runtime as torch calls before anything is launched, for a process that has no device: one H100.
// Nothing is executed. Loaded before torch's libraries; the driver's functions that they link to are in driver.c.

#include <driver_types.h>
#include <string.h>

enum { MAJOR = 9, MINOR = 0, PROCESSORS = 132 };

int cudaGetDeviceCount(int* count) { *count = 1; return 0; }
int cudaGetDevice(int* device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaDriverGetVersion(int* version) { *version = 13000; return 0; }
int cudaDeviceSynchronize(void) { return 0; }
int cudaDeviceCanAccessPeer(int* can, int device, int peer) { *can = 0; return 0; }

int cudaGetDeviceProperties(struct cudaDeviceProp* p, int device) {
    memset(p, 0, sizeof(*p));
    strcpy(p->name, "NVIDIA H100 80GB HBM3");
    p->major = MAJOR;
    p->minor = MINOR;
    p->multiProcessorCount = PROCESSORS;
    p->warpSize = 32;
    p->totalGlobalMem = 80ul << 30;
    p->l2CacheSize = 50 << 20;
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerBlockOptin = 227 << 10;
    p->sharedMemPerMultiprocessor = 228 << 10;
    p->regsPerBlock = p->regsPerMultiprocessor = 1 << 16;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    for (int i = 0; i < 3; ++i) {
        p->maxGridSize[i] = i == 0 ? 0x7fffffff : 0xffff;
        p->maxThreadsDim[i] = i == 2 ? 64 : 1024;
    }
    return 0;
}

int cudaDeviceGetAttribute(int* value, int attribute, int device) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? MAJOR
             : attribute == cudaDevAttrComputeCapabilityMinor ? MINOR
             : attribute == cudaDevAttrMultiProcessorCount ? PROCESSORS : 0;
    return 0;
}

// streams and events: any address will do
static long handles = 16;
int cudaStreamCreateWithPriority(void** stream, unsigned flags, int priority) { *stream = (void*)(handles += 16); return 0; }
int cudaEventCreateWithFlags(void** event, unsigned flags) { *event = (void*)(handles += 16); return 0; }
int cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return 0;
}
int cudaStreamIsCapturing(void* stream, int* status) { *status = 0; return 0; }
int cudaStreamGetCaptureInfo(void* stream, int* status, void* a, void* b, void* c, void* d) {
    if (status) *status = 0;
    return 0;
}
int cudaThreadExchangeStreamCaptureMode(int* mode) { return 0; }
int cudaStreamQuery(void* stream) { return 0; }
int cudaStreamSynchronize(void* stream) { return 0; }
int cudaStreamWaitEvent(void* stream, void* event, unsigned flags) { return 0; }
int cudaEventRecord(void* event, void* stream) { return 0; }
int cudaEventQuery(void* event) { return 0; }
int cudaEventSynchronize(void* event) { return 0; }
int cudaEventDestroy(void* event) { return 0; }
