// max(0, 2 x 2 max-pooling of batch normalisation of a 1 x 1 convolution) of (N, H, W, CIN) images, and
// its gradients for the parameters. The convolution is computed anew wherever it is needed. What the
// normalisation needs of it follows from the images: with their mean m and covariance S, channel c of
// weights w has mean w.m and variance w.Sw, and the sum of normalised values times pixels is Sw, scaled.
#include "pooling.cuh"

constexpr int V = 8;

// Of the means, and of the covariances on and above the diagonal.
template <int CIN>
constexpr int MOMENTS = CIN + CIN * (CIN + 1) / 2;

// Adds up N doubles of all threads of a block, in a fixed order; all threads have the sums.
template <int N>
__device__ inline void sum_of_block(double (&values)[N]) {
    extern __shared__ double shared[];
#pragma unroll
    for (int v = 0; v < N; ++v) shared[v * THREADS + threadIdx.x] = values[v];
    for (int apart = THREADS / 2; apart > 0; apart /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < apart)
#pragma unroll
            for (int v = 0; v < N; ++v)
                shared[v * THREADS + threadIdx.x] += shared[v * THREADS + threadIdx.x + apart];
    }
    __syncthreads();
#pragma unroll
    for (int v = 0; v < N; ++v) values[v] = shared[v * THREADS];
}

// Sums of pixels less the first one, and of their products, in double: channels of images are so alike
// that most of the covariance cancels in differences of theirs.
template <typename T, int CIN>
__global__ void __launch_bounds__(THREADS)
    conv_norm_pool_moments(const T* images, double* partials, unsigned pixels, unsigned step) {
    double sums[MOMENTS<CIN>] = {}, pivot[CIN];
#pragma unroll
    for (int i = 0; i < CIN; ++i) pivot[i] = widen(images[i]);
#pragma unroll 4
    for (unsigned p = blockIdx.x * THREADS + threadIdx.x; p < pixels; p += step) {
        const T* pixel = images + static_cast<long long>(p) * CIN;
        double x[CIN];
#pragma unroll
        for (int i = 0; i < CIN; ++i) x[i] = widen(pixel[i]) - pivot[i];
        int product = CIN;
#pragma unroll
        for (int i = 0; i < CIN; ++i) {
            sums[i] += x[i];
#pragma unroll
            for (int j = i; j < CIN; ++j) sums[product++] += x[i] * x[j];
        }
    }
    sum_of_block(sums);
    if (threadIdx.x > 0) return;
#pragma unroll
    for (int k = 0; k < MOMENTS<CIN>; ++k) partials[blockIdx.x * MOMENTS<CIN> + k] = sums[k];
}

// A weight as the convolution takes it, rounded to the type of the images.
template <typename T, int CIN>
__device__ inline void read_weight(const float* weight, int channel, double (&w)[CIN]) {
#pragma unroll
    for (int i = 0; i < CIN; ++i) w[i] = widen(narrow<T>(weight[channel * CIN + i]));
}

template <int CIN>
__device__ inline double dot(const double* a, const double* b) {
    double sum = 0;
#pragma unroll
    for (int i = 0; i < CIN; ++i) sum += a[i] * b[i];
    return sum;
}

// One block. `moments` are a point that pixels are taken relative to, in float precision, and the
// covariance; both are zero if there are no parts, mean and variance being given. `table` has for every
// channel what pixels relative to that point are multiplied by, and what is added.
template <typename T, int CIN>
__global__ void __launch_bounds__(THREADS)
    conv_norm_pool_fold(const T* images, const double* partials, const float* weight,
                        const float* norm_weight, const float* norm_bias, float* mean,
                        float* variance, double* moments, float* table, double eps, double count,
                        int channels, int parts) {
    double sums[MOMENTS<CIN>] = {}, centre[CIN], about[CIN], covariance[CIN][CIN];
    for (int part = threadIdx.x; part < parts; part += THREADS)
#pragma unroll
        for (int k = 0; k < MOMENTS<CIN>; ++k) sums[k] += partials[part * MOMENTS<CIN> + k];
    sum_of_block(sums);
    int product = CIN;
#pragma unroll
    for (int i = 0; i < CIN; ++i) {
        centre[i] = parts == 0 ? 0 : widen(images[i]) + sums[i] / count;
        about[i] = static_cast<float>(centre[i]);
#pragma unroll
        for (int j = i; j < CIN; ++j)
            covariance[i][j] = covariance[j][i] =
                sums[product++] / count - sums[i] / count * (sums[j] / count);
    }
    for (int c = threadIdx.x; c < channels; c += THREADS) {
        double w[CIN], biased = 0;
        read_weight<T>(weight, c, w);
#pragma unroll
        for (int i = 0; i < CIN; ++i) biased += w[i] * dot<CIN>(covariance[i], w);
        if (parts > 0) {
            // Rounding may leave less than 0; a NaN is to stay one.
            variance[c] = biased < 0 ? 0 : biased;
            mean[c] = dot<CIN>(centre, w);
        }
        const double scale = norm_weight[c] / sqrt(variance[c] + eps);
        const double from = parts > 0 ? dot<CIN>(centre, w) : static_cast<double>(mean[c]);
#pragma unroll
        for (int i = 0; i < CIN; ++i) table[i * channels + c] = scale * w[i];
        table[CIN * channels + c] = norm_bias[c] + scale * (dot<CIN>(about, w) - from);
    }
    if (threadIdx.x > 0) return;
#pragma unroll
    for (int i = 0; i < CIN; ++i) {
        moments[i] = about[i];
#pragma unroll
        for (int j = 0; j < CIN; ++j) moments[(i + 1) * CIN + j] = covariance[i][j];
    }
}

// Normalised convolutions of V channels at the four pixels of a window.
template <typename T, int CIN>
struct Convolution {
    float factors[CIN][V], summands[V], about[CIN];

    __device__ Convolution(const double* moments, const float* table, int channels, int channel) {
#pragma unroll
        for (int i = 0; i < CIN; ++i) {
            about[i] = moments[i];
            load<V>(table + i * channels + channel, factors[i]);
        }
        load<V>(table + CIN * channels + channel, summands);
    }

    // Reads a window; its pixels are relative to `about`.
    __device__ void read(const T* images, unsigned corner, int width, float (&x)[4][CIN]) const {
        const T* top = images + static_cast<long long>(corner) * CIN;
        const T* bottom = top + static_cast<long long>(width) * CIN;
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int i = 0; i < CIN; ++i)
                x[k][i] = widen((k < 2 ? top : bottom)[k % 2 * CIN + i]) - about[i];
    }

    __device__ float at(const float (&x)[CIN], int v) const {
        float sum = summands[v];
#pragma unroll
        for (int i = 0; i < CIN; ++i) sum += factors[i][v] * x[i];
        return sum;
    }
};

template <typename T, int CIN>
__global__ void __launch_bounds__(THREADS)
    conv_norm_pool(const T* images, const double* moments, const float* table, T* out, Pool pool,
                   int channels, int lanes, int parts) {
    const Share share(lanes, parts);
    const Convolution<T, CIN> convolution(moments, table, channels, share.group * V);
    for (unsigned window = share.first; window < pool.windows; window += share.step) {
        float x[4][CIN], most[V];
        convolution.read(images, pool.corner(window), pool.width, x);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            most[v] = 0;
#pragma unroll
            for (int k = 0; k < 4; ++k) most[v] = larger_or_nan(most[v], convolution.at(x[k], v));
        }
        store<V>(out + static_cast<long long>(window) * channels + share.group * V, most);
    }
}

// Sums of the gradient that ReLU and pooling let through: times each channel of the pixel it goes to,
// and alone.
template <typename T, int CIN>
__global__ void __launch_bounds__(THREADS)
    conv_norm_pool_sums(const T* grad, const T* images, const double* moments, const float* table,
                        double* partials, Pool pool, int channels, int lanes, int parts) {
    const Share share(lanes, parts);
    const Convolution<T, CIN> convolution(moments, table, channels, share.group * V);
    float sums[CIN + 1][V] = {};
    for (unsigned window = share.first; window < pool.windows; window += share.step) {
        float x[4][CIN], gradients[V];
        load<V>(grad + static_cast<long long>(window) * channels + share.group * V, gradients);
        convolution.read(images, pool.corner(window), pool.width, x);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            float most = convolution.at(x[0], v), chosen[CIN];
#pragma unroll
            for (int i = 0; i < CIN; ++i) chosen[i] = x[0][i];
#pragma unroll
            for (int k = 1; k < 4; ++k) {
                const float value = convolution.at(x[k], v);
                const bool taken = !(value <= most);
                most = larger_or_nan(most, value);
#pragma unroll
                for (int i = 0; i < CIN; ++i) chosen[i] = taken ? x[k][i] : chosen[i];
            }
            const float slope = passes(most) ? gradients[v] : 0;
#pragma unroll
            for (int i = 0; i < CIN; ++i) sums[i][v] += slope * chosen[i];
            sums[CIN][v] += slope;
            // The pixel of a NaN need not be the one chosen, but the sums show it.
            sums[0][v] += 0 * most;
        }
    }
    write_sums(sums, partials, channels, share);
}

// The gradients of the parameters, JOINED channels by a block.
template <typename T, int CIN>
__global__ void __launch_bounds__(THREADS)
    conv_norm_pool_close(const double* partials, const float* weight, const float* norm_weight,
                         const float* mean, const float* variance, const double* moments,
                         float* grad_weight, float* grad_norm, float* grad_bias, double eps,
                         int channels, int parts) {
    double sums[CIN + 1], w[CIN];
    if (!join_parts(partials, parts, channels, sums)) return;
    const int c = blockIdx.x * JOINED + threadIdx.x;
    read_weight<T>(weight, c, w);
    const double deviation = 1 / sqrt(variance[c] + eps);
    const double from = mean[c] - dot<CIN>(moments, w);
    const double products = deviation * (dot<CIN>(sums, w) - from * sums[CIN]);
    grad_norm[c] = products;
    grad_bias[c] = sums[CIN];
#pragma unroll
    for (int i = 0; i < CIN; ++i) {
        const double shared_by_all = products * deviation * dot<CIN>(moments + (i + 1) * CIN, w);
        grad_weight[c * CIN + i] = norm_weight[c] * deviation * (sums[i] - shared_by_all);
    }
}
