// out[n, c, i] = x1[n, c, centre(i)]; out[n, C + c * K*K + j, i] = x2[n, c, nbr(i, j)]; and its
// two gradients.
#include "window_gradient.cuh"

// Windows of stride 1 and padding K / 2: a thread copies one row of taps of V neighbouring windows,
// and of the first row their centres. `vectors` counts planes * K * windows / V.
template <typename T, bool REFLECT, int K, int V>
__global__ void concatenation_same(const T* x1, Strides s1, const T* x2, Strides s2, T* out,
                                   Window window, unsigned vectors, Divisor per_row,
                                   Divisor rows, Divisor channels) {
    using A = computed_t<T>;
    unsigned rest = blockIdx.x * blockDim.x + threadIdx.x;
    if (rest >= vectors) return;
    const int column = per_row.divide(rest) * V, row = rows.divide(rest), ky = rest % K;
    const unsigned windows = window.windows(), i = row * window.width + column;
    rest /= K;
    const long long c = channels.divide(rest), n = rest;
    T* image = out + n * channels.divisor * (K * K + 1) * windows + i;
    if (ky == 0) {
        A centres[V];
        read_own<V>(x1 + n * s1.n + c * s1.c, s1, row, column, centres);
        store<V>(image + c * windows, centres);
    }
    A values[V + K - 1];
    read_taps<REFLECT, K, V>(x2 + n * s2.n + c * s2.c, s2, window, row, column, ky, values);
    T* to = image + (channels.divisor + (c * K + ky) * K) * windows;
#pragma unroll
    for (int kx = 0; kx < K; ++kx)
        store<V>(to + static_cast<long long>(kx) * windows, values + kx);
}

// Any windows; a thread for every one.
template <typename T, bool REFLECT>
__global__ void concatenation(const T* x1, Strides s1, const T* x2, Strides s2, T* out,
                              Window window, int channels, int chunks) {
    using A = computed_t<T>;
    const long long plane = blockIdx.x / chunks, n = plane / channels, c = plane % channels;
    const int i = blockIdx.x % chunks * blockDim.x + threadIdx.x, taps = window.taps();
    const long long windows = window.windows();
    if (i >= windows) return;
    const int row = i / window.out_width, column = i % window.out_width;
    T* image = out + n * channels * (taps + 1) * windows + i;
    const A centre = read_centre<REFLECT>(x1 + n * s1.n + c * s1.c, s1, window, row, column);
    image[c * windows] = narrow<T>(centre);
    T* to = image + (channels + c * taps) * windows;
    visit_taps<REFLECT>(x2 + n * s2.n + c * s2.c, s2, window, row, column,
                        [&](int tap, A value) { to[tap * windows] = narrow<T>(value); });
}

// The gradient of x2 for windows with stride 1 and padding K / 2; blocks run over planes * tiles.
// The gradient of x1 is the first part of `grad` as it stands.
template <typename T, bool REFLECT, int K, int V>
__global__ void concatenation_backward_same(const T* grad, T* grad2, Strides s2, Window window,
                                            int channels, int tiles, int rows) {
    extern __shared__ double shared[];
    const long long plane = blockIdx.x / tiles, n = plane / channels, c = plane % channels;
    const long long before = n * channels * (K * K + 1) + channels + c * K * K;
    T* to = grad2 + n * s2.n + c * s2.c;
    sum_taps<REFLECT, K, V, false>(grad + before * window.windows(), window,
                                   blockIdx.x % tiles * rows, rows, computed_t<T>(1), to, s2, to, s2,
                                   reinterpret_cast<computed_t<T>*>(shared));
}

// Both gradients of any windows; a thread for every pixel.
template <typename T, bool REFLECT>
__global__ void concatenation_backward(const T* grad, Strides sg, T* grad1, Strides s1, T* grad2,
                                       Strides s2, Window window, int channels, int chunks) {
    using A = computed_t<T>;
    const long long plane = blockIdx.x / chunks, n = plane / channels, c = plane % channels;
    const int i = blockIdx.x % chunks * blockDim.x + threadIdx.x;
    if (i >= window.height * window.width) return;
    const int y = i / window.width, x = i % window.width;
    const int centre_tap = (window.kernel_size - 1) / 2 * (window.kernel_size + 1);
    const T* centres = grad + n * sg.n + c * sg.c;
    const T* taps = grad + n * sg.n + (channels + c * window.taps()) * sg.c;
    A sum1 = 0, sum2 = 0;
    visit_windows_on<REFLECT>(y, x, window, [&](int tap, int at) {
        sum2 += widen(taps[tap * sg.c + at * sg.w]);
        if (tap == centre_tap) sum1 += widen(centres[at * sg.w]);
    });
    grad1[n * s1.n + c * s1.c + y * s1.h + x * s1.w] = narrow<T>(sum1);
    grad2[n * s2.n + c * s2.c + y * s2.h + x * s2.w] = narrow<T>(sum2);
}
