// What lies between the passes over pixels of pairwise attention, in double: sums of partial sums, the
// second normalisation's statistics and gradients, and weights as the passes read them. See
// pairwise.cuh.
#include "pairwise.cuh"

constexpr int THREADS = 128;
constexpr int JOINING = 512;  // threads of a block that sums up partial sums
constexpr int JOINED = 8;     // elements of such a block: what memory hands out at once, of floats
constexpr double LOG2_E = 1.4426950408889634;
// What the factors of gradients are scaled to at most.
constexpr float MOST_BACK = 1024;

// Columns of a matrix with COLUMNS blocks in a row as it is packed.
template <int COLUMNS>
constexpr int WHOLE = (COLUMNS + 3) / 4 * 32;

// Where an element of a matrix with COLUMNS blocks in a row is, in the order of struct Blocks.
template <int COLUMNS>
__device__ inline int packed_at(int row, int column) {
    constexpr int FOURS = (COLUMNS + 3) / 4;
    const int block = column / 8;
    return (((row / 8 * FOURS + block / 4) * 32 + row % 8 * 4 + column % 8 / 2) * 4 + block % 4) * 2 +
           column % 2;
}

// Where the folded planes have channel c of the relation, of the positions or, at relation + 2, the
// constant.
template <int REL>
__device__ inline int slot_of(int c, int relation) {
    return c < relation || REL == 0 ? c : REL + c - relation;
}

// Adds up a double of every thread; all threads have the sum.
__device__ inline double sum_of_block(double value, double* shared) {
    __syncthreads();
    shared[threadIdx.x] = value;
    for (int apart = THREADS / 2; apart > 0; apart /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < apart) shared[threadIdx.x] += shared[threadIdx.x + apart];
    }
    __syncthreads();
    return shared[0];
}

// The largest of what the threads have.
__device__ inline double most_of_block(double value, double* shared) {
    __syncthreads();
    shared[threadIdx.x] = value;
    for (int apart = THREADS / 2; apart > 0; apart /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < apart)
            shared[threadIdx.x] = max(shared[threadIdx.x], shared[threadIdx.x + apart]);
    }
    __syncthreads();
    return shared[0];
}

// Sums up (shares, elements) over the shares.
template <typename T>
__global__ void __launch_bounds__(JOINING)
    pairwise_join(const T* partials, double* sums, int shares, int elements) {
    extern __shared__ double shared[];
    const int element = blockIdx.x * JOINED + threadIdx.x % JOINED, first = threadIdx.x / JOINED;
    double sum = 0;
    if (element < elements)
#pragma unroll 8
        for (int share = first; share < shares; share += JOINING / JOINED)
            sum += partials[static_cast<long long>(share) * elements + element];
    shared[threadIdx.x] = sum;
    for (int apart = JOINING / 2; apart >= JOINED; apart /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < apart) shared[threadIdx.x] += shared[threadIdx.x + apart];
    }
    if (threadIdx.x < JOINED && element < elements) sums[element] = shared[threadIdx.x];
}

// A block for every padded hidden channel. `sums` is the upper half of the Gram matrix of all slots,
// of which `gram` takes those that are used; if RUNNING, it is not read, gram becomes zero, and mean and
// variance are given. `packed1` is the first convolution with the second normalisation, `packed2` the second one,
// by weight channels, for logits to base 2, `packed2_back` the same by hidden channels.
template <int REL, bool RUNNING>
__global__ void __launch_bounds__(THREADS)
    pairwise_pack(const double* sums, const float* weight1, const float* weight2,
                  const float* norm_weight, const float* norm_bias, float* mean, float* variance,
                  double* gram, Half* packed1, Half* packed2, Half* packed2_back, double eps,
                  int relation, int weights) {
    constexpr int SIZE = REL + TAIL;
    extern __shared__ double shared[];
    const int o = blockIdx.x, channels = relation + 2;
    const float* row = weight1 + o * channels;
    const auto gram_at = [&](int c, int d) {
        const int i = slot_of<REL>(c, relation), j = slot_of<REL>(d, relation);
        return sums[min(i, j) * SIZE + max(i, j)];
    };
    double scale = 0, shift = 0;
    for (int i = o; i <= channels; i += gridDim.x)
        for (int j = threadIdx.x; j <= channels; j += THREADS)
            gram[i * (channels + 1) + j] = RUNNING ? 0 : gram_at(i, j);
    if (!RUNNING) {
        const double count = gram_at(channels, channels);
        double parts[2] = {};
        if (o < relation)
            for (int c = threadIdx.x; c < channels; c += THREADS) {
                const double mean_z = gram_at(c, channels) / count;
                double covariance = 0;
                for (int d = 0; d < channels; ++d)
                    covariance += row[d] * (gram_at(c, d) / count - mean_z * (gram_at(d, channels) / count));
                parts[0] += row[c] * mean_z;
                parts[1] += row[c] * covariance;
            }
        const double found = sum_of_block(parts[0], shared);
        const double spread = max(sum_of_block(parts[1], shared), 0.0);
        if (o < relation) {
            scale = norm_weight[o] / sqrt(spread + eps);
            shift = norm_bias[o] - scale * found;
            if (threadIdx.x == 0) {
                mean[o] = found;
                variance[o] = spread;
            }
        }
    } else if (o < relation) {
        scale = norm_weight[o] / sqrt(variance[o] + eps);
        shift = norm_bias[o] - scale * mean[o];
    }
    for (int slot = threadIdx.x; slot < WHOLE<CHUNKS<REL>>; slot += THREADS)
        packed1[packed_at<CHUNKS<REL>>(o, slot)] = to_half(0);
    __syncthreads();
    if (o < relation)
        for (int c = threadIdx.x; c <= channels; c += THREADS)
            packed1[packed_at<CHUNKS<REL>>(o, slot_of<REL>(c, relation))] =
                to_half(c < channels ? scale * row[c] : shift);
    for (int w = threadIdx.x; w < SLABS<REL> * 8; w += THREADS)
        for (int column = o; column < WHOLE<HIDDEN<REL> / 8>; column += gridDim.x)
            packed2[packed_at<HIDDEN<REL> / 8>(w, column)] =
                to_half(column < relation ? weight2[w % weights * relation + column] * LOG2_E : 0);
    for (int w = threadIdx.x; w < WHOLE<SLABS<REL>>; w += THREADS)
        packed2_back[packed_at<SLABS<REL>>(o, w)] =
            to_half(o < relation && w < weights ? weight2[w * relation + o] : 0);
}

// A block for every hidden channel: gradients of the second normalisation and of both convolutions,
// and for every hidden channel what `pairwise_pack_back` needs of it. `sums` are (padded hidden
// channels, slots and slabs), multiplied by the scales of values and slopes. BY_BATCH: statistics
// depend on the input.
template <int REL, bool BY_BATCH>
__global__ void __launch_bounds__(THREADS)
    pairwise_close2(const double* sums, const double* gram, const float* most_value,
                    const float* most_slope, const float* weight1, const float* norm_weight,
                    const float* mean, const float* variance, float* grad_weight, float* grad_bias,
                    float* grad_weight1, float* grad_weight2, double* factors, double eps,
                    double count, int relation, int weights) {
    constexpr int SIZE = REL + TAIL;
    extern __shared__ double shared[];
    const int o = blockIdx.x, channels = relation + 2;
    const double unscale =
        1 / (static_cast<double>(value_scale(most_value)) * slope_scale(most_slope));
    const float* row = weight1 + o * channels;
    const double* sum = sums + o * (SIZE + SLABS<REL> * 8);
    double product = 0;
    for (int c = threadIdx.x; c < channels; c += THREADS)
        product += sum[slot_of<REL>(c, relation)] * row[c];
    product = sum_of_block(product, shared) * unscale;
    const double deviation = 1 / sqrt(variance[o] + eps), scale = norm_weight[o] * deviation;
    const double bias = sum[slot_of<REL>(channels, relation)] * unscale;
    const double weight = deviation * (product - mean[o] * bias);
    const double share = BY_BATCH ? deviation * weight / count : 0;
    for (int c = threadIdx.x; c < channels; c += THREADS) {
        double found = sum[slot_of<REL>(c, relation)] * unscale;
        if (BY_BATCH) {
            const double sum_z = gram[channels * (channels + 1) + c];
            double correlation = -mean[o] * sum_z;
            for (int d = 0; d < channels; ++d) correlation += row[d] * gram[d * (channels + 1) + c];
            found -= bias / count * sum_z + share * correlation;
        }
        grad_weight1[o * channels + c] = scale * found;
    }
    for (int w = threadIdx.x; w < weights; w += THREADS)
        grad_weight2[w * relation + o] = sum[SIZE + w] * unscale;
    if (threadIdx.x > 0) return;
    grad_weight[o] = weight;
    grad_bias[o] = bias;
    factors[o * 3] = scale;
    factors[o * 3 + 1] = share * scale;
    factors[o * 3 + 2] = BY_BATCH ? (bias / count - mean[o] * share) * scale : 0;
}

// A block for every slot of z: what its gradient takes of the gradient behind the second
// normalisation and of z, and, from block 0, what undoes all scales of the product.
template <int REL>
__global__ void __launch_bounds__(THREADS)
    pairwise_pack_back(const double* factors, const float* most_value, const float* most_slope,
                       const float* weight1, Half* packed, float* unscale, int relation) {
    constexpr int COLUMNS = HIDDEN<REL> / 8 + CHUNKS<REL>;
    extern __shared__ double shared[];
    const int channels = relation + 2;
    double most = 0, indirect = 0, constant = 0, most_weight = 0;
    for (int i = threadIdx.x; i < relation * channels; i += THREADS) {
        most_weight = max(most_weight, fabs(static_cast<double>(weight1[i])));
        most = max(most, fabs(factors[i / channels * 3] * weight1[i]));
    }
    for (int o = threadIdx.x; o < relation; o += THREADS) {
        indirect += fabs(factors[o * 3 + 1]);
        constant += fabs(factors[o * 3 + 2]);
    }
    most = most_of_block(most, shared);
    most_weight = most_of_block(most_weight, shared);
    indirect = sum_of_block(indirect, shared);
    constant = sum_of_block(constant, shared);
    const double scale = static_cast<double>(value_scale(most_value)) * slope_scale(most_slope);
    // No element of z's factors is larger.
    const double bound = scale * most_weight * max(indirect * most_weight, constant);
    const double power = power_below(static_cast<float>(MOST_BACK / max(max(most, bound), 1e-30)));
    if (blockIdx.x == 0 && threadIdx.x == 0) *unscale = 1 / (power * scale);
    int own = -1;  // the slot's channel
    for (int c = 0; c < channels; ++c)
        if (slot_of<REL>(c, relation) == static_cast<int>(blockIdx.x)) own = c;
    for (int column = threadIdx.x; column < WHOLE<COLUMNS>; column += THREADS)
        packed[packed_at<COLUMNS>(blockIdx.x, column)] = to_half(0);
    __syncthreads();
    if (own < 0) return;
    for (int o = threadIdx.x; o < relation; o += THREADS)
        packed[packed_at<COLUMNS>(blockIdx.x, o)] =
            to_half(factors[o * 3] * weight1[o * channels + own] * power);
    for (int c = threadIdx.x; c <= channels; c += THREADS) {
        double of_z = 0;
        for (int o = 0; o < relation; ++o)
            of_z += weight1[o * channels + own] *
                    (c < channels ? factors[o * 3 + 1] * weight1[o * channels + c] : factors[o * 3 + 2]);
        packed[packed_at<COLUMNS>(blockIdx.x, HIDDEN<REL> + slot_of<REL>(c, relation))] =
            to_half(-of_z * scale * power);
    }
}
