// Batch normalisation of (N, H, W, C) tensors, as far as it is per channel: the statistics and what they
// make of every x, and what is left to do once the gradient is summed up.
#include "channels.cuh"

// Sums of x and of its squares, x being taken relative to the channel's first element. In a thread it is
// taken relative to the thread's own first one, which keeps float precision wherever the mean is.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 4)
    norm_moments(const T* x, double* partials, unsigned pixels, int channels, int lanes, int parts) {
    const Share share(lanes, parts);
    const T* from = x + share.group * V;
    float first[V] = {}, deviations[V] = {}, squares[V] = {};
    if (share.first < pixels) load<V>(from + static_cast<long long>(share.first) * channels, first);
    int count = 0;
#pragma unroll 4
    for (unsigned p = share.first; p < pixels; p += share.step) {
        float values[V];
        load<V>(from + static_cast<long long>(p) * channels, values);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const float deviation = values[v] - first[v];
            deviations[v] += deviation;
            squares[v] += deviation * deviation;
        }
        ++count;
    }
    double sums[2][V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
        const double apart = static_cast<double>(first[v]) - widen(from[v]), sum = deviations[v];
        sums[0][v] = sum + count * apart;
        sums[1][v] = squares[v] + apart * (2 * sum + count * apart);
    }
    write_sums(sums, partials, channels, share);
}

// Factor and summand of every channel, JOINED channels by a block. Without parts, mean and variance are
// given.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    norm_fold(const T* x, const double* partials, const float* weight, const float* bias, float* mean,
              float* variance, float* table, double eps, double count, int channels, int parts) {
    double sums[2];
    if (!join_parts(partials, parts, channels, sums)) return;
    const int c = blockIdx.x * JOINED + threadIdx.x;
    double centre = mean[c];
    if (parts > 0) {
        const double apart = sums[0] / count, biased = sums[1] / count - apart * apart;
        centre = widen(x[c]) + apart;
        mean[c] = centre;
        // Rounding may leave less than 0; a NaN is to stay one.
        variance[c] = biased < 0 ? 0 : biased;
    }
    const double scale = weight[c] / sqrt(variance[c] + eps);
    table[c] = scale;
    table[channels + c] = bias[c] - scale * centre;
}

// The gradients of weight and bias, JOINED channels by a block, and what the statistics add to that of
// every x: a factor of x and a summand. `count` is 0 where the statistics are not of x.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    norm_close(const double* partials, const T* mean, const T* variance, const T* weight,
               T* grad_weight, T* grad_bias, T* shares, double eps, double count, int channels,
               int parts) {
    double sums[2];
    if (!join_parts(partials, parts, channels, sums)) return;
    const int c = blockIdx.x * JOINED + threadIdx.x;
    const double deviation = 1 / sqrt(variance[c] + eps), products = sums[0] * deviation;
    grad_weight[c] = products;
    grad_bias[c] = sums[1];
    const double each = -weight[c] * deviation / count, factor = each * products * deviation;
    shares[c] = count == 0 ? 0 : factor;
    shares[channels + c] = count == 0 ? 0 : each * sums[1] - factor * mean[c];
}
