// out[n, c, i] = x1[n, c, centre(i)]; out[n, C + c * K*K + j, i] = x2[n, c, nbr(i, j)]; and the
// gradient of x2 or of x1.
#include "window_gradient.cuh"

// One thread copies every tap of V neighbouring windows; `vectors` is planes * windows / V.
template <typename T, bool REFLECT, int K, int V>
__global__ void concatenation(const T* x1, Strides s1, const T* x2, Strides s2, T* out,
                              Window window, int channels, unsigned vectors) {
    using A = computed_t<T>;
    const unsigned vector = blockIdx.x * blockDim.x + threadIdx.x;
    if (vector >= vectors) return;
    const int windows = window.windows(), taps = window.taps();
    const long long plane = vector / (windows / V);
    const int i = vector % (windows / V) * V;
    const long long n = plane / channels, c = plane % channels;
    const int row = i / window.out_width, column = i % window.out_width;
    const int to_centre = (window.kernel_size - 1) / 2 * window.dilation - window.padding;
    const int y = source<REFLECT>(row * window.stride + to_centre, window.height);
    A centre[V];
#pragma unroll
    for (int e = 0; e < V; ++e) {
        const int x = source<REFLECT>((column + e) * window.stride + to_centre, window.width);
        const bool inside = REFLECT || (y >= 0 && x >= 0);
        centre[e] = inside ? widen(x1[n * s1.n + c * s1.c + y * s1.h + x * s1.w]) : A(0);
    }
    T* image = out + n * channels * (taps + 1) * windows + i;
    store<V>(image + c * windows, centre);
    T* to = image + (channels + c * taps) * windows;
    visit_taps<REFLECT, K, V>(x2 + n * s2.n + c * s2.c, s2, window, row, column,
                              [&](int tap, const A* values) {
                                  store<V>(to + static_cast<long long>(tap) * windows, values);
                              });
}
