// 2 x 2 max-pooling with stride 2 of (N, H, W, C) tensors, and sums of every channel, which meet in
// double precision in a fixed order. A thread has V neighbouring channels of all pixels it is dealt.
#pragma once

#include "window.cuh"

constexpr int THREADS = 256;
constexpr int JOINED = 8;  // channels whose sums a block joins

// Windows of all images, numbered row by row; laid out as POOL in pooling.py.
struct Pool {
    Divisor across, down;  // windows in a row, rows of windows
    int height, width;     // of the images
    unsigned windows;

    // The number of a window's first pixel; its image, row and column too.
    __device__ unsigned corner(unsigned window, unsigned& n, int& row, int& column) const {
        n = window;
        column = across.divide(n);
        row = down.divide(n);
        return (n * height + 2 * row) * width + 2 * column;
    }

    __device__ unsigned corner(unsigned window) const {
        unsigned n;
        int row, column;
        return corner(window, n, row, column);
    }
};

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

// Whether a later value of a window is taken, as torch's max_pool2d does: if it is larger, or NaN.
__device__ inline bool surpasses(float value, float most) { return value > most || value != value; }

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
#pragma unroll 4
    for (int part = threadIdx.x / JOINED; part < parts; part += THREADS / JOINED)
#pragma unroll
        for (int k = 0; k < K; ++k) sums[k] += from[(part * K + k) * channels];
#pragma unroll
    for (int k = 0; k < K; ++k) shared[k * THREADS + threadIdx.x] = sums[k];
    __syncthreads();
    if (threadIdx.x >= JOINED) return false;
    for (int t = threadIdx.x + JOINED; t < THREADS; t += JOINED)
#pragma unroll
        for (int k = 0; k < K; ++k) sums[k] += shared[k * THREADS + t];
    return true;
}
