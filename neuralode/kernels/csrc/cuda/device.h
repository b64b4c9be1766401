// What the kernels need of the machine that they run on: a GPU, or the shim that plays one on the CPU.
#pragma once

#ifdef NEURALODE_SHIM
#include "shim.h"
#else

#define DEVICE __device__ __forceinline__
#define APART __device__ __noinline__
#define KERNEL extern "C" __global__
#define TABLE static __constant__ const
#define ANYWHERE __device__ __forceinline__
#define ANYWHERE_MEMBER __device__ __forceinline__
#define SHARED_MEMORY(name) extern __shared__ __align__(32) char name[];

#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

namespace neuralode {

DEVICE int thread() { return threadIdx.x; }
DEVICE int threads() { return blockDim.x; }
DEVICE int block() { return blockIdx.x; }
DEVICE int blocks() { return gridDim.x; }

// All threads of a block meet.
DEVICE void meet() { __syncthreads(); }
DEVICE bool meet_or(bool mine) { return __syncthreads_or(mine); }

// All threads of all blocks meet; the blocks have to run at the same time (a cooperative launch).
DEVICE void meet_all(unsigned* tickets) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        const unsigned ticket = atomicAdd(tickets, 1u), last = ticket / gridDim.x * gridDim.x + gridDim.x;
        while ((int)(*(volatile unsigned*)tickets - last) < 0) {
        }
        __threadfence();
    }
    __syncthreads();
}

// Whether this is the last block to come here, which then sees what the others wrote before.
DEVICE bool last_block(unsigned* tickets) {
    __threadfence();
    const bool last = __syncthreads_or(threadIdx.x == 0 && atomicAdd(tickets, 1u) % gridDim.x == gridDim.x - 1);
    __threadfence();
    return last;
}

DEVICE void raise(int* status, int value) { atomicMax(status, value); }

}  // namespace neuralode
#endif
