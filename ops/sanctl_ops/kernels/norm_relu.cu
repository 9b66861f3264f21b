// max(0, batch normalisation) of (N, H, W, C) tensors. What ReLU lets through is computed anew in both
// passes of the gradient: that is cheaper than reading the output.
#include "channels.cuh"

// V channels of a few pixels, all read before any is used.
template <typename T, int V>
struct Pixels {
    static constexpr int COUNT = 4;
    Vector<T, V> at[COUNT];

    // `from` is the thread's first channel of pixel 0.
    __device__ Pixels(const T* from, unsigned first, unsigned pixels, int channels,
                      const Share& share) {
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
            const unsigned pixel = first + k * share.step;
            at[k] = {};
            if (pixel < pixels)
                at[k] = *reinterpret_cast<const Vector<T, V>*>(
                    from + static_cast<long long>(pixel) * channels);
        }
    }

    __device__ float value(int k, int v) const { return widen(at[k].at[v]); }
};

template <typename T, int V>
__global__ void __launch_bounds__(THREADS)
    norm_relu(const T* x, const float* table, T* out, unsigned pixels, int channels, int lanes,
              int parts) {
    constexpr int COUNT = Pixels<T, V>::COUNT;
    const Share share(lanes, parts);
    const int channel = share.group * V;
    float scale[V], shift[V];
    load<V>(table + channel, scale);
    load<V>(table + channels + channel, shift);
    for (unsigned first = share.first; first < pixels; first += COUNT * share.step) {
        const Pixels<T, V> read(x + channel, first, pixels, channels, share);
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
            const unsigned pixel = first + k * share.step;
            if (pixel >= pixels) break;
            float values[V];
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const float normalised = scale[v] * read.value(k, v) + shift[v];
                values[v] = passes(normalised) ? normalised : 0;
            }
            store<V>(out + static_cast<long long>(pixel) * channels + channel, values);
        }
    }
}

// Sums of the gradient that ReLU lets through: times x - mean, and alone.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS)
    norm_relu_sums(const T* grad, const T* x, const float* mean, const float* table,
                   double* partials, unsigned pixels, int channels, int lanes, int parts) {
    constexpr int COUNT = Pixels<T, V>::COUNT;
    const Share share(lanes, parts);
    const int channel = share.group * V;
    float scale[V], shift[V], centre[V], sums[2][V] = {};
    load<V>(table + channel, scale);
    load<V>(table + channels + channel, shift);
    load<V>(mean + channel, centre);
    for (unsigned first = share.first; first < pixels; first += COUNT * share.step) {
        const Pixels<T, V> read(x + channel, first, pixels, channels, share);
        const Pixels<T, V> gradients(grad + channel, first, pixels, channels, share);
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
            if (first + k * share.step >= pixels) break;
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const float value = read.value(k, v);
                const bool passed = passes(scale[v] * value + shift[v]);
                const float slope = passed ? gradients.value(k, v) : 0;
                sums[0][v] += slope * (value - centre[v]);
                sums[1][v] += slope;
            }
        }
    }
    write_sums(sums, partials, channels, share);
}

// Adds, if there is SKIP, what comes to x's gradient from elsewhere.
template <typename T, int V, bool SKIP>
__global__ void __launch_bounds__(THREADS)
    norm_relu_input_gradient(const T* grad, const T* skip, const T* x, const float* table,
                             const float* shares, T* grad_x, unsigned pixels, int channels,
                             int lanes, int parts) {
    constexpr int COUNT = Pixels<T, V>::COUNT;
    const Share share(lanes, parts);
    const int channel = share.group * V;
    float scale[V], shift[V], factor[V], summand[V];
    load<V>(table + channel, scale);
    load<V>(table + channels + channel, shift);
    load<V>(shares + channel, factor);
    load<V>(shares + channels + channel, summand);
    for (unsigned first = share.first; first < pixels; first += COUNT * share.step) {
        const Pixels<T, V> read(x + channel, first, pixels, channels, share);
        const Pixels<T, V> gradients(grad + channel, first, pixels, channels, share);
        const Pixels<T, V> skipped((SKIP ? skip : grad) + channel, first, pixels, channels, share);
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
            const unsigned pixel = first + k * share.step;
            if (pixel >= pixels) break;
            float values[V];
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const float value = read.value(k, v);
                const bool passed = passes(scale[v] * value + shift[v]);
                const float slope = passed ? scale[v] * gradients.value(k, v) : 0;
                values[v] = factor[v] * value + summand[v] + slope;
                if (SKIP) values[v] += skipped.value(k, v);
            }
            store<V>(grad_x + static_cast<long long>(pixel) * channels + channel, values);
        }
    }
}
