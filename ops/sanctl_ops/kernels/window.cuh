// K x K windows that slide over padded planes, as class Window of window.py describes them.
#pragma once

#include "elements.cuh"

// Laid out as WINDOW in arguments.py.
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

// Hands every tap of V neighbouring windows to visit(tap, values): values[e] is what the tap reads
// in window e. K > 0 promises windows of that size with stride 1 and padding K / 2, not dilated.
template <bool REFLECT, int K, int V, typename T, typename Visit>
__device__ inline void visit_taps(const T* plane, const Strides& strides, const Window& window,
                                  int row, int column, Visit visit) {
    using A = computed_t<T>;
    static_assert(K > 0 || V == 1, "windows of any kind are visited one by one");
    const int size = K > 0 ? K : window.kernel_size;
    constexpr int READ = K > 0 ? V + K - 1 : 1;
    int columns[READ];
#pragma unroll
    for (int e = 0; e < READ; ++e) columns[e] = source<REFLECT>(column + e - K / 2, window.width);
#pragma unroll 1
    for (int ky = 0; ky < size; ++ky) {
        const int top = K > 0 ? row - K / 2 : row * window.stride - window.padding;
        const int y = source<REFLECT>(top + ky * (K > 0 ? 1 : window.dilation), window.height);
        const T* line = plane + y * strides.h;
        if constexpr (K > 0) {
            A values[READ];
#pragma unroll
            for (int e = 0; e < READ; ++e) {
                const bool inside = REFLECT || (y >= 0 && columns[e] >= 0);
                values[e] = inside ? widen(line[columns[e] * strides.w]) : A(0);
            }
#pragma unroll
            for (int kx = 0; kx < K; ++kx) visit(ky * K + kx, values + kx);
        } else {
            const int left = column * window.stride - window.padding;
            for (int kx = 0; kx < size; ++kx) {
                const int x = source<REFLECT>(left + kx * window.dilation, window.width);
                const bool inside = REFLECT || (y >= 0 && x >= 0);
                const A value = inside ? widen(line[x * strides.w]) : A(0);
                visit(ky * size + kx, &value);
            }
        }
    }
}
