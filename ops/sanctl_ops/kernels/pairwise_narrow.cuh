// What kernels of pairwise attention share that serve few channels and 3 x 3 taps: nothing is staged or
// multiplied as matrices, which would be mostly zeros. A thread has a pixel with all of its channels, in
// float, and reads its neighbours', most of which the first-level cache holds for the pixels beside it.
#pragma once

#include "pairwise.cuh"

constexpr int K = 3, RADIUS = 1, TAPS = K * K;
constexpr int SLOTS = 2;  // weight channels
constexpr int SIDE = 16;  // of a block's square of pixels
constexpr int THREADS = SIDE * SIDE;

// How planes are cut into squares; laid out as SQUARES in pairwise_narrow.py.
struct Squares {
    Divisor across, down;
    int height, width;
};

// A thread's pixel of a square.
struct Own {
    int n, y, x;
    int pixel, plane;  // its number in the plane, and pixels of that
    bool exists;

    __device__ Own(unsigned square, const Squares& squares) {
        x = squares.across.divide(square) * SIDE + threadIdx.x % SIDE;
        y = squares.down.divide(square) * SIDE + threadIdx.x / SIDE;
        n = square;
        pixel = y * squares.width + x;
        plane = squares.height * squares.width;
        exists = y < squares.height && x < squares.width;
    }

    // Where the thread's image begins, if an image has `elements`.
    template <typename T>
    __device__ T* image(T* images, int elements) const {
        return images + static_cast<long long>(n) * elements;
    }
};

// Hands every tap of a pixel to visit(tap, the number of the pixel that it reads).
template <typename Visit>
__device__ inline void visit_neighbours(const Own& own, const Squares& squares, Visit visit) {
#pragma unroll
    for (int i = 0; i < K; ++i) {
        const int y = source<true>(own.y + i - RADIUS, squares.height);
#pragma unroll
        for (int j = 0; j < K; ++j)
            visit(i * K + j, y * squares.width + source<true>(own.x + j - RADIUS, squares.width));
    }
}
