// What patchwise attention does to planes of hidden values: their moments, and their normalisation in both
// directions. Sums are kept in double and joined in a fixed order.
#include "patchwise.cuh"

constexpr int THREADS = 256;
constexpr int JOINING = 1024;  // threads that join the blocks' sums

// Joins `rows` x `columns` values by join(column, a, b): column t is thread t's.
template <typename Join>
__device__ inline double join_rows(const double* values, int rows, int columns, Join join) {
    extern __shared__ double shared[];
    const int lanes = blockDim.x / columns, row = threadIdx.x / columns;
    const int column = threadIdx.x % columns;
    double own = 0;
    if (row < lanes)
#pragma unroll 8
        for (int r = row; r < rows; r += lanes) own = join(column, own, values[r * columns + column]);
    shared[threadIdx.x] = own;
    __syncthreads();
    double joined = 0;
    if (threadIdx.x < columns)
        for (int lane = 0; lane < lanes; ++lane)
            joined = join(column, joined, shared[lane * columns + column]);
    __syncthreads();
    return joined;
}

__device__ inline double added(int, double a, double b) { return a + b; }

// What a block's threads hold for N columns of their channel, as the block's row of `partials`: all
// channels of the first column, then of the second. Thread i of the grid has channel i % channels.
template <int N, typename Join>
__device__ inline void write_row(const double (&own)[N], double* partials, int channels, Join join) {
    extern __shared__ double shared[];
    const int begin = blockIdx.x * blockDim.x % channels;
    for (int k = 0; k < N; ++k) {
        __syncthreads();
        shared[threadIdx.x] = own[k];
        __syncthreads();
        const int channel = threadIdx.x;
        if (channel >= channels) continue;
        double sum = 0;
        for (int t = (channel - begin + channels) % channels; t < blockDim.x; t += channels)
            sum = join(k, sum, shared[t]);
        partials[(blockIdx.x * N + k) * channels + channel] = sum;
    }
}

// Sums and summed squares of the hidden values that a block takes; `step` threads in all, a multiple of
// the channels.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    patchwise_moments(const T* hidden, double* partials, int channels, unsigned count,
                      unsigned step) {
    constexpr int BATCH = 8;  // that are loaded before any of them is needed
    double own[2] = {};
    for (unsigned begin = blockIdx.x * blockDim.x + threadIdx.x; begin < count;
         begin += BATCH * step) {
        T values[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; ++b)
            values[b] = begin + b * step < count ? hidden[begin + b * step] : 0;
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            const double x = values[b];
            own[0] += x;
            own[1] += x * x;
        }
    }
    write_row(own, partials, channels, added);
}

// One block joins them to means and biased variances.
template <typename T>
__global__ void __launch_bounds__(JOINING)
    patchwise_join_moments(const double* partials, T* mean, T* variance, int channels, int rows,
                           double count) {
    extern __shared__ double shared[];
    const double sum = join_rows(partials, rows, 2 * channels, added);
    const int channel = threadIdx.x;
    __syncthreads();
    if (channel < 2 * channels) shared[channel] = sum / count;
    __syncthreads();
    if (channel >= channels) return;
    const double own = shared[channel], squares = shared[channels + channel];
    mean[channel] = own;
    variance[channel] = max(squares - own * own, 0.0);
}

// The second normalisation of one channel: scale * (x - mean) + bias.
struct Line {
    float mean, deviation, scale, bias;

    template <typename T>
    __device__ Line(const T* means, const T* variances, const T* weights, const T* biases, double eps,
                    int channel)
        : mean(means[channel]),
          deviation(static_cast<float>(1 / sqrt(variances[channel] + eps))),
          scale(weights[channel] * deviation),
          bias(biases[channel]) {}
};

// Normalised and rectified hidden values as halves, `width` channels, two by a thread; zeros beyond
// `channels`. A thread stays with its channels; `step` threads in all.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    patchwise_rectify(const T* hidden, const T* mean, const T* variance, const T* weight,
                      const T* bias, double eps, Half* rectified, int channels, int width,
                      unsigned pairs, unsigned step) {
    constexpr int BATCH = 4;  // that are loaded before any of them is stored
    const unsigned first = blockIdx.x * blockDim.x + threadIdx.x;
    const int channel = first % (width / 2) * 2;
    const Line lines[2] = {
        Line(mean, variance, weight, bias, eps, min(channel, channels - 1)),
        Line(mean, variance, weight, bias, eps, min(channel + 1, channels - 1))};
    for (unsigned begin = first; begin < pairs; begin += BATCH * step) {
        float values[BATCH][2];
#pragma unroll
        for (int k = 0; k < 2 * BATCH; ++k) {
            const unsigned i = begin + k / 2 * step;
            const long long pixel = i / (width / 2);
            values[k / 2][k % 2] = i < pairs && channel + k % 2 < channels
                                       ? hidden[pixel * channels + channel + k % 2]
                                       : 0;
        }
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            if (begin + b * step >= pairs) break;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float& x = values[b][e];
                x = (x - lines[e].mean) * lines[e].scale + lines[e].bias;
                // A NaN stays one.
                x = x < 0 || channel + e >= channels ? 0 : x;
            }
            reinterpret_cast<unsigned*>(rectified)[begin + b * step] =
                pack_finite(values[b][0], values[b][1]);
        }
    }
}

// Adds up the PARTS gradients of rectified values, keeps what lies where these were above zero, in the
// first part, and joins four columns: its sums, those of its products with normalised values, and the
// largest of either.
template <typename T, int PARTS>
__global__ void __launch_bounds__(THREADS)
    patchwise_slopes_of_hidden(T* gradients, const T* hidden, const Half* rectified, const T* mean,
                               const T* variance, double eps, double* partials, int channels,
                               int width, unsigned count, unsigned step) {
    constexpr int BATCH = PARTS == 1 ? 8 : 4;  // that are loaded before any of them is stored
    const unsigned first = blockIdx.x * blockDim.x + threadIdx.x;
    const int channel = first % channels;
    const float deviation = static_cast<float>(1 / sqrt(variance[channel] + eps));
    double sums[2] = {};
    float most[2] = {};
    for (unsigned begin = first; begin < count; begin += BATCH * step) {
        float parts[BATCH][PARTS], x[BATCH];
        Half kept[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            const unsigned i = min(begin + b * step, count - 1);
            x[b] = hidden[i];
            kept[b] = rectified[static_cast<long long>(i / channels) * width + channel];
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
                parts[b][part] = gradients[static_cast<long long>(part) * count + i];
        }
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            if (begin + b * step >= count) break;
            float gradient = 0;
#pragma unroll
            for (int part = 0; part < PARTS; ++part) gradient += parts[b][part];
            gradient = kept[b].bits == 0 ? 0 : gradient;
            gradients[begin + b * step] = gradient;
            const float normalised = (x[b] - mean[channel]) * deviation;
            sums[0] += gradient;
            sums[1] += static_cast<double>(gradient) * normalised;
            most[0] = fmaxf(most[0], fabsf(gradient));
            most[1] = fmaxf(most[1], fabsf(normalised));
        }
    }
    const double own[4] = {sums[0], sums[1], most[0], most[1]};
    write_row(own, partials, channels,
              [](int k, double a, double b) { return k < 2 ? a + b : max(a, b); });
}

// One block joins them to the gradients of weight and bias, to factors[0..2] of every channel, for
// which factor 0 * slope + factor 1 + factor 2 * (x - mean) is the gradient of a hidden value x, and to
// a power of two by which these fit halves, with its inverse. `count` is 0 for running statistics.
template <typename T>
__global__ void __launch_bounds__(JOINING)
    patchwise_join_slopes(const double* partials, const T* mean, const T* variance, const T* weight,
                          double eps, T* grad_weight, T* grad_bias, T* factors, T* scales,
                          int channels, int rows, double count) {
    extern __shared__ double shared[];
    // A row holds all channels of the first column, then of the second, and so on.
    const double joined =
        join_rows(partials, rows, 4 * channels, [channels](int column, double a, double b) {
            return column < 2 * channels ? a + b : max(a, b);
        });
    const int thread = threadIdx.x;
    if (thread < 4 * channels) shared[thread] = joined;
    __syncthreads();
    double bound = 0;
    if (thread < channels) {
        const double deviation = 1 / sqrt(variance[thread] + eps), scale = weight[thread] * deviation;
        const double slope = shared[thread], product = shared[channels + thread];
        const double shift = count == 0 ? 0 : -slope / count;
        const double tilt = count == 0 ? 0 : -product / count;
        grad_bias[thread] = slope;
        grad_weight[thread] = product;
        factors[thread] = scale;
        factors[channels + thread] = scale * shift;
        factors[2 * channels + thread] = scale * tilt * deviation;
        bound = fabs(scale) * (shared[2 * channels + thread] + fabs(shift) +
                               fabs(tilt) * shared[3 * channels + thread]);
    }
    __syncthreads();
    shared[thread] = bound;
    __syncthreads();
    if (thread > 0) return;
    for (int c = 1; c < channels; ++c) bound = max(bound, shared[c]);
    float scale, inverse;
    // Four of them are added up as halves (see patchwise_folded.cuh).
    scale_of<13>(bound, scale, inverse);
    scales[0] = scale;
    scales[1] = inverse;
}

// The gradient of hidden values, scaled, as halves like those of patchwise_rectify.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    patchwise_gradient_of_hidden(const T* slopes, const T* hidden, const T* mean, const T* factors,
                                 const T* scales, Half* gradient, int channels, int width,
                                 unsigned pairs) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= pairs) return;
    const long long before = static_cast<long long>(i / (width / 2)) * channels;
    float values[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int c = i % (width / 2) * 2 + e;
        values[e] = c < channels ? factors[c] * slopes[before + c] + factors[channels + c] +
                                       factors[2 * channels + c] * (hidden[before + c] - mean[c])
                                 : 0;
    }
    reinterpret_cast<unsigned*>(gradient)[i] =
        pack_finite(values[0] * scales[0], values[1] * scales[0]);
}
