// K x K windows that slide over padded planes, as class Window of window.py describes them.
#pragma once

#include "elements.cuh"

// Laid out as _WINDOW in geometry.py.
struct Window {
    int kernel_size, stride, padding, dilation;
    int height, width;
    int out_height, out_width;

    __device__ int taps() const { return kernel_size * kernel_size; }
    __device__ int windows() const { return out_height * out_width; }
};

// Elements between neighbours of an (N, C, H, W) or (N, C, K*K, P) tensor along each dimension.
struct Strides {
    long long n, c, h, w;
};

// A divisor known before the kernel starts, which makes dividing by it take a few instructions;
// laid out as _DIVISOR in geometry.py. Right for all 32-bit numbers (Granlund and Montgomery, 1994).
struct Divisor {
    unsigned divisor, multiplier, shift;

    __device__ unsigned quotient(unsigned n) const {
        const unsigned high = __umulhi(n, multiplier);
        return divisor == 1 ? n : (high + ((n - high) >> 1)) >> shift;
    }

    // Divides n in place, and returns the remainder.
    __device__ unsigned divide(unsigned& n) const {
        const unsigned dividend = n;
        n = quotient(dividend);
        return dividend - n * divisor;
    }
};

// The pixel that stands at `position`, which may lie in the padding; -1 where there is a zero.
template <bool REFLECT>
__device__ inline int source(int position, int side) {
    if (REFLECT) return min(abs(position), 2 * (side - 1) - abs(position));
    return position >= 0 && position < side ? position : -1;
}

// Number of positions in the padded side that may show one pixel.
template <bool REFLECT>
constexpr int IMAGES = REFLECT ? 3 : 1;

// Position number `which` (of IMAGES) that shows `pixel`; false where there is no such one.
template <bool REFLECT>
__device__ inline bool image(int pixel, int side, int padding, int which, int& position) {
    if (which == 0) position = pixel;
    if (which == 1) position = -pixel;
    if (which == 2) position = 2 * (side - 1) - pixel;
    const bool distinct = which == 0 || (which == 1 ? pixel > 0 : pixel < side - 1);
    return distinct && position >= -padding && position < side + padding;
}

// The output row or column whose tap number `tap` lies at `position`; false where there is none.
__device__ inline bool window_of(int position, int tap, const Window& window, int out_side,
                                 int& out) {
    const int start = position + window.padding - tap * window.dilation;
    out = start / window.stride;
    return start >= 0 && out * window.stride == start && out < out_side;
}

// Hands every tap of one window to visit(tap, value).
template <bool REFLECT, typename T, typename Visit>
__device__ inline void visit_taps(const T* plane, const Strides& strides, const Window& window,
                                  int row, int column, Visit visit) {
    const int top = row * window.stride - window.padding;
    const int left = column * window.stride - window.padding;
    for (int ky = 0; ky < window.kernel_size; ++ky) {
        const int y = source<REFLECT>(top + ky * window.dilation, window.height);
        for (int kx = 0; kx < window.kernel_size; ++kx) {
            const int x = source<REFLECT>(left + kx * window.dilation, window.width);
            const bool inside = REFLECT || (y >= 0 && x >= 0);
            visit(ky * window.kernel_size + kx,
                  inside ? widen(plane[y * strides.h + x * strides.w]) : computed_t<T>(0));
        }
    }
}

// Reads what the taps of row ky read in V neighbouring windows of stride 1 and padding K / 2, V being a
// divisor of the width and of `column`: tap kx of window e gives values[kx + e].
template <bool REFLECT, int K, int V, typename T>
__device__ inline void read_taps(const T* plane, const Strides& strides, const Window& window,
                                 int row, int column, int ky,
                                 computed_t<T> (&values)[V + K - 1]) {
    constexpr int R = K / 2, COUNT = V + K - 1;
    const int y = source<REFLECT>(row + ky - R, window.height);
    const T* from = plane + y * strides.h + (column - R) * strides.w;
    forget_origin(from);
#pragma unroll
    for (int e = 0; e < COUNT; ++e, from += strides.w) {
        const bool inside = static_cast<unsigned>(column - R + e) < window.width;
        const bool exists = inside && (REFLECT || y >= 0);
        values[e] = exists ? widen(*from) : computed_t<T>(0);
    }
    if (!REFLECT) return;
    // What lies outside is a value that this thread has read, too.
    const int right = window.width - V - column;
#pragma unroll
    for (int apart = 0; apart < R; apart += V) {
        if (column == apart)
#pragma unroll
            for (int e = 0; e < R - apart; ++e) values[e] = values[2 * (R - apart) - e];
        if (right == apart)
#pragma unroll
            for (int e = V + R + apart; e < COUNT; ++e)
                values[e] = values[2 * (V - 1 + R + apart) - e];
    }
}

// The pixels that are the centres of V neighbouring windows of stride 1 and padding K / 2.
template <int V, typename T>
__device__ inline void read_own(const T* plane, const Strides& strides, int row, int column,
                                computed_t<T> (&values)[V]) {
    const T* from = plane + row * strides.h + column * strides.w;
    forget_origin(from);
#pragma unroll
    for (int e = 0; e < V; ++e, from += strides.w) values[e] = widen(*from);
}

// What a window has at its centre, tap (K - 1) / 2 in both directions.
template <bool REFLECT, typename T>
__device__ inline computed_t<T> read_centre(const T* plane, const Strides& strides,
                                            const Window& window, int row, int column) {
    const int to_centre = (window.kernel_size - 1) / 2 * window.dilation - window.padding;
    const int y = source<REFLECT>(row * window.stride + to_centre, window.height);
    const int x = source<REFLECT>(column * window.stride + to_centre, window.width);
    const bool inside = REFLECT || (y >= 0 && x >= 0);
    return inside ? widen(plane[y * strides.h + x * strides.w]) : computed_t<T>(0);
}
