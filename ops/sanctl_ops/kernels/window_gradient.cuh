// The gradient of what windows have read: every pixel sums the gradients of the taps that lie on it.
//
// Nothing is scattered, so there are no atomics and two runs give the same bits.
#pragma once

#include "window.cuh"

// Visits each (tap, window) whose tap lies on pixel (y, x), reflections included.
template <bool REFLECT, typename Visit>
__device__ inline void visit_windows_on(int y, int x, const Window& window, Visit visit) {
    for (int v = 0; v < IMAGES<REFLECT>; ++v) {
        int py, px, row, column;
        if (!image<REFLECT>(y, window.height, window.padding, v, py)) continue;
        for (int h = 0; h < IMAGES<REFLECT>; ++h) {
            if (!image<REFLECT>(x, window.width, window.padding, h, px)) continue;
            for (int ky = 0; ky < window.kernel_size; ++ky) {
                if (!window_of(py, ky, window, window.out_height, row)) continue;
                for (int kx = 0; kx < window.kernel_size; ++kx) {
                    if (!window_of(px, kx, window, window.out_width, column)) continue;
                    visit(ky * window.kernel_size + kx, row * window.out_width + column);
                }
            }
        }
    }
}

// A line that joins the sums of a row of pixels: of padded columns, V at a time.
template <int K, int V>
__device__ inline int joined_pitch(int width) {
    return width + (K - 1 + V - 1) / V * V;
}

// Adds up the ends of neighbouring threads' sums, for PLANES planes at a time. Thread t of a row holds
// the sums of the padded columns t * V to t * V + V + K - 2. Afterwards sums[p][0..V) are those of the
// thread's own pixels, the reflected columns added. `line` is the thread's row in shared memory,
// joined_pitch numbers long, and that of the next plane `plane` numbers further on. Every thread of
// the block calls this; those that have no pixels are not `active`.
template <bool REFLECT, int K, int V, int PLANES, typename A>
__device__ inline void join_columns(A (&sums)[PLANES][V + K - 1], A* line, int plane, int column,
                                    int width, bool active) {
    constexpr int PHASES = (V + K - 1 + V - 1) / V;
    const bool last = column + V == width;
#pragma unroll
    for (int phase = 0; phase < PHASES; ++phase) {
        if (active)
#pragma unroll
            for (int p = 0; p < PLANES; ++p) {
                A* to = line + p * plane + column + phase * V;
                A values[V] = {};
                // What nobody has written yet: all of phase 0, and behind the last thread's own.
                if (phase > 0 && !last) load<V>(to, values);
#pragma unroll
                for (int e = 0; e < V; ++e)
                    if (phase * V + e < V + K - 1) values[e] += sums[p][phase * V + e];
                store<V>(to, values);
            }
        __syncthreads();
    }
    if (!active) return;
    const bool reflected = REFLECT && (column <= K / 2 || column + V >= width - K / 2);
#pragma unroll
    for (int p = 0; p < PLANES; ++p) {
        const A* from = line + p * plane + K / 2;
#pragma unroll
        for (int e = 0; e < V; ++e) {
            A sum = from[column + e];
            if (reflected)
#pragma unroll
                for (int which = 1; which < IMAGES<REFLECT>; ++which) {
                    int position;
                    if (image<REFLECT>(column + e, width, K / 2, which, position))
                        sum += from[position];
                }
            sums[p][e] = sum;
        }
    }
}

// Reads a row of K taps of V neighbouring windows, all K vectors at once: visit(kx, window, value).
template <int K, int V, typename T, typename Visit>
__device__ inline void read_row(const T* taps, int plane, Visit visit) {
    computed_t<T> values[K][V];
#pragma unroll
    for (int kx = 0; kx < K; ++kx) load<V>(taps + static_cast<long long>(kx) * plane, values[kx]);
#pragma unroll
    for (int kx = 0; kx < K; ++kx)
#pragma unroll
        for (int e = 0; e < V; ++e) visit(kx, e, values[kx][e]);
}

// One block sums the gradient of `rows` rows of a plane, from row `top` on, over the K * K taps of
// every window, for windows of stride 1 and padding K / 2. Threads own V neighbouring pixels of a
// row and take the rows of windows in turn, V elements at a time.
//
// taps_out gets sign * (sum over the taps that lie on the pixel); with CENTRES, centres_out gets
// the sum over the taps of the pixel's own window, whose elements other threads of the block read at
// about the same time, so that the second read comes out of the cache. `lines` is shared memory for
// rows * joined_pitch numbers.
template <bool REFLECT, int K, int V, bool CENTRES, typename T>
__device__ inline void sum_taps(const T* grad, const Window& window, int top, int rows,
                                computed_t<T> sign, T* taps_out, const Strides& taps_strides,
                                T* centres_out, const Strides& centres_strides,
                                computed_t<T>* lines) {
    using A = computed_t<T>;
    const int height = window.height, width = window.width, plane = height * width;
    const int vectors = width / V;
    const int own_line = threadIdx.x / vectors, column = threadIdx.x % vectors * V;
    const int y = top + own_line;
    const bool active = own_line < rows && y < height;
    A sums[1][V + K - 1] = {}, centres[V] = {};
    // Most rows are shown once; those near a border stand behind a branch that is seldom taken.
#pragma unroll 1
    for (int which = 0; which < IMAGES<REFLECT>; ++which) {
        int position;
        if (!active || !image<REFLECT>(y, height, K / 2, which, position)) continue;
        const T* taps = grad + column;
#pragma unroll 1
        for (int ky = 0; ky < K; ++ky, taps += K * plane) {
            const int row = position + K / 2 - ky;
            if (row >= 0 && row < height)
                read_row<K, V>(taps + row * width, plane, [&](int kx, int e, A value) {
                    sums[0][kx + e] += value;
                });
            if (CENTRES && which == 0)
                read_row<K, V>(taps + y * width, plane, [&](int, int e, A value) {
                    centres[e] += value;
                });
        }
    }
    join_columns<REFLECT, K, V, 1>(sums, lines + own_line * joined_pitch<K, V>(width), 0, column,
                                   width, active);
    if (!active) return;
#pragma unroll
    for (int e = 0; e < V; ++e) sums[0][e] *= sign;
    store_row<V>(taps_out + y * taps_strides.h + column * taps_strides.w, taps_strides.w, sums[0]);
    if (CENTRES)
        store_row<V>(centres_out + y * centres_strides.h + column * centres_strides.w,
                     centres_strides.w, centres);
}
