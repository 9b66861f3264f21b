// What goes through (N, H, W, C) tensors channel by channel, and sums of every channel, which meet in
// double precision in a fixed order. A thread has V neighbouring channels of all pixels it is dealt.
#pragma once

#include "elements.cuh"

constexpr int THREADS = 256;
constexpr int JOINED = 4;  // channels whose sums a block joins

// What a thread is dealt: one of `lanes` groups of channels that its block has, and every step-th
// pixel or window from the first on. Blocks are numbered (slab of groups, part).
struct Share {
    int lanes, group, part;
    unsigned first, step;

    __device__ Share(int lanes, int parts)
        : lanes(lanes),
          group(blockIdx.x / parts * lanes + threadIdx.x % lanes),
          part(blockIdx.x % parts),
          first(part * (THREADS / lanes) + threadIdx.x / lanes),
          step(parts * (THREADS / lanes)) {}
};

// Adds up K values of each of V channels over the threads of a block that have the same channels, into
// partials[(part * K + k) * channels + c].
template <int K, int V, typename A>
__device__ inline void write_sums(const A (&own)[K][V], double* partials, int channels,
                                  const Share& share) {
    extern __shared__ double shared[];
    A* all = reinterpret_cast<A*>(shared);
#pragma unroll
    for (int i = 0; i < K * V; ++i) all[i * THREADS + threadIdx.x] = own[i / V][i % V];
    __syncthreads();
    for (int i = threadIdx.x; i < K * V * share.lanes; i += THREADS) {
        const int value = i / share.lanes, lane = i % share.lanes;
        double sum = 0;
        for (int t = lane; t < THREADS; t += share.lanes) sum += all[value * THREADS + t];
        const int slab = share.group / share.lanes;
        const int channel = (slab * share.lanes + lane) * V + value % V;
        partials[(share.part * K + value / V) * channels + channel] = sum;
    }
}

// Joins the parts of K sums of channel blockIdx.x * JOINED + t for each of the first JOINED threads t;
// false for all other threads.
template <int K>
__device__ inline bool join_parts(const double* partials, int parts, int channels,
                                  double (&sums)[K]) {
    extern __shared__ double shared[];
    const double* from = partials + blockIdx.x * JOINED + threadIdx.x % JOINED;
#pragma unroll
    for (int k = 0; k < K; ++k) sums[k] = 0;
#pragma unroll 8
    for (int part = threadIdx.x / JOINED; part < parts; part += THREADS / JOINED)
#pragma unroll
        for (int k = 0; k < K; ++k) sums[k] += from[(part * K + k) * channels];
    for (int apart = THREADS / 2; apart >= JOINED; apart /= 2) {
#pragma unroll
        for (int k = 0; k < K; ++k) shared[k * THREADS + threadIdx.x] = sums[k];
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < apart)
#pragma unroll
            for (int k = 0; k < K; ++k) sums[k] += shared[k * THREADS + threadIdx.x + apart];
        __syncthreads();
    }
    return threadIdx.x < JOINED;
}
