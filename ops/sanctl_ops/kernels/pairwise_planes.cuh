// What pairwise attention computes of planes: the statistics of the first normalisation, the folded
// planes, and the gradients of query, key and position. See pairwise.cuh.
//
// A thread walks down columns of one channel. The last image stands for the positions, of which there is
// only one; its channels come last. Blocks go over (image, part of the columns), from the last image to
// the first: few threads have to do with the positions, but each as long as any other one, and after all
// others they would have the GPU to themselves.
#pragma once

#include "pairwise.cuh"

constexpr int THREADS = 256;

// Query, key and position; channels are those of query and key, without the two of the positions.
template <typename T>
struct Sources {
    const T* planes[3];
    Strides strides[3];
};

// What a block has to do with: an image, or the positions.
template <typename T>
struct Image {
    const T* plane[2];  // of query and key
    Strides strides[2];
    bool positions;
    int number, part;
    int channels, channel;  // of the image; the thread's own one
    int first, step;        // columns, or parts of them, that the thread takes

    __device__ Image(const Sources<T>& sources, int images, int relation, int parts) {
        number = images - static_cast<int>(blockIdx.x) / parts;
        part = blockIdx.x % parts;
        positions = number == images;
        channels = positions ? 2 : relation;
        channel = threadIdx.x % channels;
        const int at_once = THREADS / channels;
        const bool idle = static_cast<int>(threadIdx.x) >= at_once * channels;
        first = idle ? 1 << 30 : part * at_once + static_cast<int>(threadIdx.x) / channels;
        step = parts * at_once;
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            strides[s] = positions ? sources.strides[2] : sources.strides[s];
            plane[s] = positions ? sources.planes[2] : sources.planes[s] + number * strides[s].n;
            plane[s] += channel * strides[s].c;
        }
    }

    // Where a row of the plane of queries or keys begins.
    __device__ const T* row(int which, int y) const { return plane[which] + y * strides[which].h; }

    // How far into a row a column is.
    __device__ int column(int which, int x) const {
        return x * static_cast<int>(strides[which].w);
    }

    // Where values of this image's channels begin, when all channels of all images have one.
    __device__ int before(int relation) const { return number * relation; }
};

// How many windows read pixel x of a line; those at its ends do so by reflection, too.
template <int K>
__device__ inline int readers(int x, int length) {
    constexpr int R = K / 2;
    const int back = length - 1 - x;
    return min(back, R) + min(x, R) + 1 + (x > 0 ? max(R + 1 - x, 0) : 0) +
           (back > 0 ? max(R + 1 - back, 0) : 0);
}

// Adds up a double of every thread that has the same channel, in a fixed order.
template <int N>
__device__ inline void sum_of_channel(double (&values)[N], double* shared, int channels) {
#pragma unroll
    for (int v = 0; v < N; ++v) shared[threadIdx.x * N + v] = values[v];
    __syncthreads();
    if (static_cast<int>(threadIdx.x) >= channels) return;
    for (int t = threadIdx.x + channels; t < THREADS / channels * channels; t += channels)
#pragma unroll
        for (int v = 0; v < N; ++v) values[v] += shared[t * N + v];
}

// Adds up N doubles of all threads of a block, in a fixed order; thread 0 has the sums.
template <int N>
__device__ inline void sum_of_block(double (&values)[N], double* shared) {
#pragma unroll
    for (int v = 0; v < N; ++v) shared[threadIdx.x * N + v] = values[v];
    for (int apart = THREADS / 2; apart > 0; apart /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < apart)
#pragma unroll
            for (int v = 0; v < N; ++v)
                shared[threadIdx.x * N + v] += shared[(threadIdx.x + apart) * N + v];
    }
#pragma unroll
    for (int v = 0; v < N; ++v) values[v] = shared[v];
}
