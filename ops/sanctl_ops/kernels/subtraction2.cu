// out[n, c, j, i] = x1[n, c, centre(i)] - x2[n, c, nbr(i, j)] and its two gradients.
#include "window_gradient.cuh"

// Windows of stride 1 and padding K / 2: a thread computes one row of taps of V neighbouring windows.
// `vectors` counts planes * K * windows / V; they follow each other as their results do in memory:
// `per_row` in a row, `rows` of them for a row of taps, K of those for each of the `channels`.
template <typename T, bool REFLECT, int K, int V>
__global__ void subtraction2_same(const T* x1, Strides s1, const T* x2, Strides s2, T* out,
                                  Window window, unsigned vectors, Divisor per_row, Divisor rows,
                                  Divisor channels) {
    using A = computed_t<T>;
    unsigned rest = blockIdx.x * blockDim.x + threadIdx.x;
    if (rest >= vectors) return;
    const int column = per_row.divide(rest) * V, row = rows.divide(rest), ky = rest % K;
    const unsigned windows = window.windows(), i = row * window.width + column;
    rest /= K;
    const long long plane = rest, c = channels.divide(rest), n = rest;
    A centres[V], values[V + K - 1];
    read_own<V>(x1 + n * s1.n + c * s1.c, s1, row, column, centres);
    read_taps<REFLECT, K, V>(x2 + n * s2.n + c * s2.c, s2, window, row, column, ky, values);
    T* to = out + (plane * K + ky) * K * windows + i;
#pragma unroll
    for (int kx = 0; kx < K; ++kx) {
        A difference[V];
#pragma unroll
        for (int e = 0; e < V; ++e) difference[e] = centres[e] - values[kx + e];
        store<V>(to + static_cast<long long>(kx) * windows, difference);
    }
}

// Any windows; a thread for every one.
template <typename T, bool REFLECT>
__global__ void subtraction2(const T* x1, Strides s1, const T* x2, Strides s2, T* out,
                             Window window, int channels, int chunks) {
    using A = computed_t<T>;
    const long long plane = blockIdx.x / chunks, n = plane / channels, c = plane % channels;
    const int i = blockIdx.x % chunks * blockDim.x + threadIdx.x;
    const long long windows = window.windows();
    if (i >= windows) return;
    const int row = i / window.out_width, column = i % window.out_width;
    const A centre = read_centre<REFLECT>(x1 + n * s1.n + c * s1.c, s1, window, row, column);
    T* to = out + plane * window.taps() * windows + i;
    visit_taps<REFLECT>(x2 + n * s2.n + c * s2.c, s2, window, row, column,
                        [&](int tap, A value) { to[tap * windows] = narrow<T>(centre - value); });
}

// Both gradients of windows with stride 1 and padding K / 2; blocks run over planes * tiles.
template <typename T, bool REFLECT, int K, int V>
__global__ void subtraction2_backward_same(const T* grad, T* grad1, Strides s1, T* grad2,
                                           Strides s2, Window window, int channels, int tiles,
                                           int rows) {
    extern __shared__ double shared[];
    const long long plane = blockIdx.x / tiles, n = plane / channels, c = plane % channels;
    sum_taps<REFLECT, K, V, true>(grad + plane * K * K * window.windows(), window,
                                  blockIdx.x % tiles * rows, rows, computed_t<T>(-1),
                                  grad2 + n * s2.n + c * s2.c, s2, grad1 + n * s1.n + c * s1.c, s1,
                                  reinterpret_cast<computed_t<T>*>(shared));
}

// Both gradients of any windows; a thread for every pixel.
template <typename T, bool REFLECT>
__global__ void subtraction2_backward(const T* grad, Strides sg, T* grad1, Strides s1, T* grad2,
                                      Strides s2, Window window, int channels, int chunks) {
    using A = computed_t<T>;
    const long long plane = blockIdx.x / chunks, n = plane / channels, c = plane % channels;
    const int i = blockIdx.x % chunks * blockDim.x + threadIdx.x;
    if (i >= window.height * window.width) return;
    const int y = i / window.width, x = i % window.width;
    const int centre_tap = (window.kernel_size - 1) / 2 * (window.kernel_size + 1);
    const T* from = grad + n * sg.n + c * sg.c;
    A centres = 0, taps = 0;
    visit_windows_on<REFLECT>(y, x, window, [&](int tap, int at) {
        taps += widen(from[tap * sg.h + at * sg.w]);
        if (tap != centre_tap) return;
        for (int j = 0; j < window.taps(); ++j) centres += widen(from[j * sg.h + at * sg.w]);
    });
    grad1[n * s1.n + c * s1.c + y * s1.h + x * s1.w] = narrow<T>(centres);
    grad2[n * s2.n + c * s2.c + y * s2.h + x * s2.w] = narrow<T>(-taps);
}
