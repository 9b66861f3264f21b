// Parameters of patchwise attention as its kernels take them, and their gradients from the kernels' sums.
//
// Relation channels are counted as (tap, channel), tap K * K being the query, and filled up to whole
// tiles of 16. A fragment's words are numbered (..., lane, register).
#include "patchwise.cuh"

constexpr int THREADS = 256;

// Values of 16 bits less their pivot are exact as halves in most cases: where the mean is small, there is
// no pivot, and else it has few digits. It has enough of them to lie within `size` of the mean.
__device__ inline double pivot_of(double mean, double size) {
    if (!(fabs(mean) > 2 * size)) return mean - mean;  // 0, or NaN
    const double step = exp2(min(floor(log2(fabs(mean))) - 8, floor(log2(size))));
    return rint(mean / step) * step;
}

// The largest half that is not above x.
__device__ inline Half half_below(double x) {
    const float near = within_halves(static_cast<float>(x));
    Half half = to_half(near);
    if (!(to_float(half) > x)) return half;
    if (half.bits == 0) half.bits = 0x8001;
    else if (half.bits < 0x8000) half.bits -= 1;
    else half.bits += 1;
    return half;
}

// Where a channel of the relation is zero, how large a unit is, and its factors in units.
struct Factors {
    int number;  // among the normalisation's channels
    double mean, deviation, pivot, unit, scale, shift;

    // `deviation` is an inverse one; a unit is a power of two, so that it changes no digits.
    __device__ Factors(const float* means, const float* variances, const float* weights,
                       const float* biases, double eps, int tap, int channel, int taps,
                       int relation) {
        const bool query = tap == taps;
        number = query ? channel : relation + channel * taps + tap;
        const int centre = query ? channel : relation + channel * taps + taps / 2;
        mean = means[number];
        deviation = 1 / sqrt(variances[number] + eps);
        const double size = sqrt(variances[centre] + eps);
        pivot = pivot_of(means[centre], size);
        unit = size > 0 && size < 1e30 ? exp2(-rint(log2(size))) : 1;
        scale = weights[number] * deviation / unit;
        shift = biases[number] - (mean - pivot) * unit * scale;
    }

    // What replaces them where only the sign of the sum matters, and rounding shall not change it: for
    // a half x, sign * x - threshold.
    __device__ void sharpen(Half& sign, Half& threshold) const {
        sign = to_half(scale > 0 ? 1 : scale < 0 ? -1 : 0);
        if (scale == 0) threshold = to_half(shift > 0 ? 1 : 0);
        else {
            threshold = half_below(-shift / fabs(scale));
            threshold.bits ^= 0x8000;
        }
    }
};

// The relation's factors, four words for lane l % 4: of channels 2 * (l % 4) and the next one, scale and
// shift, and of those 8 further on (SHARP: sign and threshold); and the pivots and units of key and query.
template <typename T, bool SHARP>
__global__ void __launch_bounds__(THREADS)
    patchwise_fold_relation(const T* mean, const T* variance, const T* weight, const T* bias,
                            double eps, Half* affine, T* units, int relation, int tiles, int taps) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, width = tiles * PIXELS;
    const int tap = i / width, channel = i % width;
    if (tap > taps) return;
    const int word = ((tap * tiles + channel / 16) * 4 + channel % 8 / 2) * 4 + channel % 16 / 8 * 2;
    Half* to = affine + word * 2 + channel % 2;
    T* table = units + (tap == taps ? 2 * width : 0) + channel;
    to[0] = to[2] = to_half(0);
    if (tap >= taps - 1) table[0] = table[width] = 0;
    if (channel >= relation) return;
    const Factors factors(mean, variance, weight, bias, eps, tap, channel, taps, relation);
    if (SHARP) factors.sharpen(to[0], to[2]);
    else {
        to[0] = to_half(within_halves(static_cast<float>(factors.scale)));
        to[2] = to_half(within_halves(static_cast<float>(factors.shift)));
    }
    if (tap < taps - 1) return;
    table[0] = static_cast<float>(factors.pivot);
    table[width] = static_cast<float>(factors.unit);
}

// The first convolution as second operands: of 16 channels and 8 hidden ones, (tap, tile, hidden tile).
template <typename T>
__global__ void __launch_bounds__(THREADS)
    patchwise_fold_first(const T* weight, Half* fragments, int relation, int tiles, int taps,
                         int hidden, int hidden_tiles, int words) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= words) return;
    const int lane = i / 2 % 32, w = i / 64 % hidden_tiles, tile = i / 64 / hidden_tiles % tiles;
    const int tap = i / 64 / hidden_tiles / tiles, row = w * CHANNELS + lane / 4;
    float values[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int c = tile * PIXELS + lane % 4 * 2 + i % 2 * 8 + e;
        const int number = tap == taps ? c : relation + c * taps + tap;
        values[e] = c < relation && row < hidden ? weight[row * relation * (taps + 1) + number] : 0;
    }
    reinterpret_cast<unsigned*>(fragments)[i] = pack_finite(values[0], values[1]);
}

// The same times the relation's scale, of 8 relation channels and all hidden ones, (tap, half a tile).
template <typename T>
__global__ void __launch_bounds__(THREADS)
    patchwise_fold_first_turned(const T* weight, const T* mean, const T* variance, const T* norm,
                                const T* bias, double eps, Half* fragments, int relation, int tiles,
                                int taps, int hidden, int hidden_tiles, int words) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= words) return;
    const int lane = i / hidden_tiles % 32, eighth = i / hidden_tiles / 32 % (2 * tiles);
    const int tap = i / hidden_tiles / 32 / (2 * tiles), channel = eighth * 8 + lane / 4;
    float values[2] = {};
    if (channel < relation) {
        const Factors factors(mean, variance, norm, bias, eps, tap, channel, taps, relation);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int row = i % hidden_tiles * 8 + lane % 4 * 2 + e;
            if (row < hidden)
                values[e] = static_cast<float>(
                    factors.scale * weight[row * relation * (taps + 1) + factors.number]);
        }
    }
    reinterpret_cast<unsigned*>(fragments)[i] = pack_finite(values[0], values[1]);
}

// The second convolution as second operands, (8 weight channels, tap): of all hidden channels and these,
// or (TURNED) of these and 8 hidden ones a word; and its bias in the same order.
template <typename T, bool TURNED>
__global__ void __launch_bounds__(THREADS)
    patchwise_fold_second(const T* weight, const T* bias, Half* fragments, T* biases, int taps,
                          int hidden, int hidden_tiles, int words) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= words) return;
    const int lane = i / hidden_tiles % 32, tile = i % hidden_tiles;
    const int tap = i / hidden_tiles / 32 % taps, part = i / hidden_tiles / 32 / taps * CHANNELS;
    float values[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int out = part + (TURNED ? lane % 4 * 2 + e : lane / 4);
        const int in = tile * 8 + (TURNED ? lane / 4 : lane % 4 * 2 + e);
        values[e] = out < hidden && in < hidden ? weight[(out * taps + tap) * hidden + in] : 0;
    }
    reinterpret_cast<unsigned*>(fragments)[i] = pack_finite(values[0], values[1]);
    if (!TURNED && tile == 0 && lane < CHANNELS)
        biases[i / hidden_tiles / 32 * CHANNELS + lane] =
            part + lane < hidden ? bias[(part + lane) * taps + tap] : 0;
}

// Sums `rows` x `columns` partial sums over the rows, 32 columns a block, in a fixed order.
template <typename T>
__global__ void __launch_bounds__(1024)
    patchwise_join(const T* partials, double* sums, int rows, unsigned columns) {
    extern __shared__ double shared[];
    const unsigned column = blockIdx.x * 32 + threadIdx.x % 32;
    double own = 0;
    if (column < columns) {
#pragma unroll 8
        for (int row = threadIdx.x / 32; row < rows; row += blockDim.x / 32)
            own += partials[static_cast<long long>(row) * columns + column];
    }
    shared[threadIdx.x] = own;
    __syncthreads();
    if (threadIdx.x >= 32 || column >= columns) return;
    for (int lane = 1; lane < blockDim.x / 32; ++lane) own += shared[lane * 32 + threadIdx.x];
    sums[column] = own;
}

// The second convolution's gradient from the joined sums of patchwise_slopes: one thread for a weight,
// that of the first hidden channel also for the bias. Without hidden tiles, those of the narrow kernels.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    patchwise_close_second(const double* sums, T* grad_weight, T* grad_bias, int taps, int hidden,
                           int hidden_tiles, int weights) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= weights) return;
    const int in = i % hidden, tap = i / hidden % taps, out = i / hidden / taps;
    if (hidden_tiles == 0) {
        const double* terms = sums + tap * 6 + out * 3;
        grad_weight[i] = static_cast<float>(terms[in]);
        if (in == 0) grad_bias[out * taps + tap] = static_cast<float>(terms[2]);
        return;
    }
    const int rows = hidden_tiles == 1 ? 1 : hidden_tiles / 2 + 1;
    const double* of_tap = sums + (out / CHANNELS * taps + tap) * rows * 128;
    const int column = out % CHANNELS / 2, odd = out % 2;
    grad_weight[i] = static_cast<float>(
        of_tap[in / 16 * 128 + (in % 8 * 4 + column) * 4 + in % 16 / 8 * 2 + odd]);
    if (in > 0) return;
    const int ones = hidden_tiles == 1 ? 2 : hidden_tiles / 2 * 128;
    grad_bias[out * taps + tap] = static_cast<float>(of_tap[ones + column * 4 + odd]);
}

// From the joined sums of patchwise_weight_gradient, one thread for a (tap, channel): the gradients of
// the first convolution and normalisation, and closing[0] and [1] of `count` values a channel: what
// the batch's statistics take back, steadily and in proportion to the relation less its pivot.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    patchwise_close_first(const double* sums, const T* scales, const T* weight, const T* mean,
                          const T* variance, const T* norm, const T* bias, double eps,
                          T* grad_weight, T* grad_norm, T* grad_bias, double* closing, int relation,
                          int tiles, int taps, int hidden, int hidden_tiles, double count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const int tap = i / relation, channel = i % relation;
    if (tap > taps) return;
    const Factors factors(mean, variance, norm, bias, eps, tap, channel, taps, relation);
    // Without hidden tiles, from the narrow kernels, whose order is (tap, sum, channel, row).
    const bool narrow = hidden_tiles == 0;
    const double* from =
        sums + (narrow ? tap * 16 : (tap * tiles + channel / 16) * 2 * hidden_tiles * 128);
    constexpr int BATCH = 4;  // rows that are loaded before any of them is stored
    double product = 0, slope = 0;
    for (int first = 0; first < hidden; first += BATCH) {
        double related[BATCH], plain[BATCH], weights[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            const int row = min(first + b, hidden - 1);
            const int place = narrow ? channel * 2 + row
                                     : row / 8 * 128 + (channel % 8 * 4 + row % 8 / 2) * 4 +
                                           channel % 16 / 8 * 2 + row % 2;
            related[b] = from[place] * scales[1];
            plain[b] = from[(narrow ? 8 : hidden_tiles * 128) + place] * scales[1];
            weights[b] = weight[row * relation * (taps + 1) + factors.number];
        }
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            if (first + b >= hidden) break;
            grad_weight[(first + b) * relation * (taps + 1) + factors.number] =
                static_cast<float>(factors.scale * related[b] + factors.shift * plain[b]);
            product += weights[b] * related[b];
            slope += weights[b] * plain[b];
        }
    }
    const double apart = factors.mean - factors.pivot;
    product = factors.deviation * (product / factors.unit - apart * slope);
    grad_norm[factors.number] = static_cast<float>(product);
    grad_bias[factors.number] = static_cast<float>(slope);
    const double share = count == 0 ? 0 : factors.scale * factors.unit / count;
    closing[i] = share * (slope - apart * factors.deviation * product);
    closing[relation * (taps + 1) + i] = share * factors.deviation * product;
}

// What the batch's statistics take back from the gradient of each pixel of the key, twice HW x relation,
// and of the query, twice relation: sums of `closing` over the windows' taps that read it.
template <typename T, int K>
__global__ void __launch_bounds__(THREADS)
    patchwise_spread(const double* closing, T* taken, int height, int width, int relation) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, plane = height * width;
    const int channel = i % relation, pixel = i / relation;
    if (pixel > plane) return;
    const int channels = relation * (K * K + 1);
    if (pixel == plane) {
        for (int k = 0; k < 2; ++k)
            taken[(2 * plane + k) * relation + channel] = static_cast<float>(
                closing[k * channels + K * K * relation + channel]);
        return;
    }
    int across[K];
#pragma unroll
    for (int dx = 0; dx < K; ++dx) across[dx] = readings(pixel % width, width, dx, K / 2);
    double steady = 0, tilt = 0;
    for (int dy = 0; dy < K; ++dy) {
        const int down = readings(pixel / width, height, dy, K / 2);
#pragma unroll
        for (int dx = 0; dx < K; ++dx) {
            const double* from = closing + (dy * K + dx) * relation + channel;
            steady += down * across[dx] * from[0];
            tilt += down * across[dx] * from[channels];
        }
    }
    taken[i] = static_cast<float>(steady);
    taken[plane * relation + i] = static_cast<float>(tilt);
}
