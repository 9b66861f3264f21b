// max(0, 2 x 2 max-pooling of batch normalisation) of (N, H, W, C) tensors. What has the largest value in
// a window is found anew in both passes of the gradient: that is cheaper than storing it.
#include "pooling.cuh"

// V channels of a window, and which of its pixels each of them takes.
template <typename T, int V>
struct Pooled {
    Vector<T, V> pixels[4];

    __device__ float x(int k, int v) const { return widen(pixels[k].at[v]); }

    // Reads pixel k, which lies k % 2 to the right of the first one and k / 2 below it.
    __device__ void read(int k, const T* first, int channels, int width) {
        const long long apart = static_cast<long long>(k / 2 * width + k % 2) * channels;
        pixels[k] = *reinterpret_cast<const Vector<T, V>*>(first + apart);
    }

    // The largest normalised value, its pixel, and what was normalised there.
    __device__ int find(int v, float scale, float shift, float& most, float& chosen) const {
        int place = 0;
        chosen = x(0, v);
        most = scale * chosen + shift;
#pragma unroll
        for (int k = 1; k < 4; ++k) {
            const float value = scale * x(k, v) + shift;
            const bool taken = surpasses(value, most);
            most = taken ? value : most;
            chosen = taken ? x(k, v) : chosen;
            place = taken ? k : place;
        }
        return place;
    }
};

template <typename T, int V>
__global__ void __launch_bounds__(THREADS)
    norm_pool(const T* x, const float* table, T* out, Pool pool, int channels, int lanes,
              int parts) {
    const Share share(lanes, parts);
    const int channel = share.group * V;
    float scale[V], shift[V];
    load<V>(table + channel, scale);
    load<V>(table + channels + channel, shift);
    for (unsigned window = share.first; window < pool.windows; window += share.step) {
        const T* first = x + static_cast<long long>(pool.corner(window)) * channels + channel;
        Pooled<T, V> pooled;
#pragma unroll
        for (int k = 0; k < 4; ++k) pooled.read(k, first, channels, pool.width);
        float most[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
            most[v] = 0;
#pragma unroll
            for (int k = 0; k < 4; ++k)
                most[v] = larger_or_nan(most[v], scale[v] * pooled.x(k, v) + shift[v]);
        }
        store<V>(out + static_cast<long long>(window) * channels + channel, most);
    }
}

// Sums of the gradient that ReLU and pooling let through: times x - mean where it goes to, and alone.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS)
    norm_pool_sums(const T* grad, const T* x, const float* mean, const float* table,
                   double* partials, Pool pool, int channels, int lanes, int parts) {
    const Share share(lanes, parts);
    const int channel = share.group * V;
    float scale[V], shift[V], centre[V], sums[2][V] = {};
    load<V>(table + channel, scale);
    load<V>(table + channels + channel, shift);
    load<V>(mean + channel, centre);
    for (unsigned window = share.first; window < pool.windows; window += share.step) {
        const T* first = x + static_cast<long long>(pool.corner(window)) * channels + channel;
        Pooled<T, V> pooled;
        float gradients[V];
        load<V>(grad + static_cast<long long>(window) * channels + channel, gradients);
#pragma unroll
        for (int k = 0; k < 4; ++k) pooled.read(k, first, channels, pool.width);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            float most, chosen;
            pooled.find(v, scale[v], shift[v], most, chosen);
            const float slope = passes(most) ? gradients[v] : 0;
            sums[0][v] += slope * (chosen - centre[v]);
            sums[1][v] += slope;
        }
    }
    write_sums(sums, partials, channels, share);
}

// `pool` has windows that reach beyond odd sides, too: their pixels are in none of the output's.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS)
    norm_pool_input_gradient(const T* grad, const T* x, const float* table, const float* shares,
                             T* grad_x, Pool pool, int channels, int lanes, int parts) {
    const Share share(lanes, parts);
    const int channel = share.group * V;
    float scale[V], shift[V], factor[V], summand[V];
    load<V>(table + channel, scale);
    load<V>(table + channels + channel, shift);
    load<V>(shares + channel, factor);
    load<V>(shares + channels + channel, summand);
    for (unsigned window = share.first; window < pool.windows; window += share.step) {
        unsigned n;
        int row, column;
        const unsigned corner = pool.corner(window, n, row, column);
        const long long at = static_cast<long long>(corner) * channels + channel;
        const bool right = 2 * column + 1 < pool.width, below = 2 * row + 1 < pool.height;
        const bool exists[4] = {true, right, below, right && below};
        Pooled<T, V> pooled = {};
        float gradients[V] = {};
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if (exists[k]) pooled.read(k, x + at, channels, pool.width);
        if (exists[3]) {
            const unsigned of_grad = (n * (pool.height / 2) + row) * (pool.width / 2) + column;
            load<V>(grad + static_cast<long long>(of_grad) * channels + channel, gradients);
        }
        float values[4][V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
            float most, chosen;
            const int place = pooled.find(v, scale[v], shift[v], most, chosen);
            const float slope = passes(most) ? scale[v] * gradients[v] : 0;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float shared_by_all = factor[v] * pooled.x(k, v) + summand[v];
                values[k][v] = place == k ? shared_by_all + slope : shared_by_all;
            }
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const long long apart = static_cast<long long>(k / 2 * pool.width + k % 2) * channels;
            if (exists[k]) store<V>(grad_x + at + apart, values[k]);
        }
    }
}
