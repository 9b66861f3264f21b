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

// Adds what lies beyond the ends of a line of `count` pixels to those that it reflects, where these are
// ends of the plane. `pixels` is the first one, the others follow `stride` apart. One thread does it,
// since a pixel of a short line has two reflections.
template <int RADIUS, typename A>
__device__ inline void add_reflections(A* pixels, int stride, int count, bool at_first,
                                       bool at_last) {
    A* last = pixels + (count - 1) * stride;
    if (at_first)
#pragma unroll
        for (int k = 1; k <= RADIUS; ++k) pixels[k * stride] += pixels[-k * stride];
    if (at_last)
#pragma unroll
        for (int k = 1; k <= RADIUS; ++k) last[-k * stride] += last[k * stride];
}

// Adds up the ends of neighbouring threads' sums, for PLANES planes of `rows` rows each. Thread t of a
// row holds the sums of the padded columns t * V to t * V + V + K - 2. Afterwards sums[p][0..V) are
// those of the thread's own pixels, the reflected columns added. `lines` is shared memory for as many
// lines, joined_pitch numbers long, `row` and `column` the thread's place in them. Every thread of the
// block calls this; those that have no pixels are not `active`.
template <bool REFLECT, int K, int V, int PLANES, typename A>
__device__ inline void join_columns(A (&sums)[PLANES][V + K - 1], A* lines, int rows, int row,
                                    int column, int width, bool active) {
    constexpr int PHASES = (V + K - 1 + V - 1) / V;
    const int pitch = joined_pitch<K, V>(width);
    const bool last = column + V == width;
    A* own = lines + row * pitch + column;
#pragma unroll
    for (int phase = 0; phase < PHASES; ++phase) {
        if (active)
#pragma unroll
            for (int p = 0; p < PLANES; ++p) {
                A* to = own + p * rows * pitch + phase * V;
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
    if (REFLECT) {
        for (int i = threadIdx.x; i < PLANES * rows; i += blockDim.x)
            add_reflections<K / 2>(lines + i * pitch + K / 2, 1, width, true, true);
        __syncthreads();
    }
    if (!active) return;
#pragma unroll
    for (int p = 0; p < PLANES; ++p)
#pragma unroll
        for (int e = 0; e < V; ++e) sums[p][e] = own[p * rows * pitch + K / 2 + e];
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
    // All rows of a tile take the same row of taps at about the same time: what reflections and
    // neighbours read again, they find in the cache.
    const T* taps = grad + column;
#pragma unroll 1
    for (int ky = 0; ky < K && active; ++ky, taps += K * plane) {
        if (CENTRES)
            read_row<K, V>(taps + y * width, plane, [&](int, int e, A value) {
                centres[e] += value;
            });
#pragma unroll 1
        for (int which = 0; which < IMAGES<REFLECT>; ++which) {
            int position;
            if (!image<REFLECT>(y, height, K / 2, which, position)) continue;
            const int row = position + K / 2 - ky;
            if (row < 0 || row >= height) continue;
            read_row<K, V>(taps + row * width, plane, [&](int kx, int e, A value) {
                sums[0][kx + e] += value;
            });
        }
    }
    join_columns<REFLECT, K, V, 1>(sums, lines, rows, own_line, column, width, active);
    if (!active) return;
#pragma unroll
    for (int e = 0; e < V; ++e) sums[0][e] *= sign;
    store_row<V>(taps_out + y * taps_strides.h + column * taps_strides.w, taps_strides.w, sums[0]);
    if (CENTRES)
        store_row<V>(centres_out + y * centres_strides.h + column * centres_strides.w,
                     centres_strides.w, centres);
}
