// The gradients of weighted sums of values, for logits and for values: see pairwise_sums.cuh.
#include "pairwise_sums.cuh"

// Adds up what lanes that share weight channels have: fewer slots than 8 repeat among a quad.
template <int SLOTS>
__device__ inline unsigned sum_of_quad(unsigned pair) {
    if (SLOTS <= 4) pair = add_pairs(pair, __shfl_xor_sync(0xffffffff, pair, 2));
    if (SLOTS <= 2) pair = add_pairs(pair, __shfl_xor_sync(0xffffffff, pair, 1));
    return pair;
}

template <int SLOTS>
__device__ inline float sum_of_quad(float value) {
    if (SLOTS <= 4) value += __shfl_xor_sync(0xffffffff, value, 2);
    if (SLOTS <= 2) value += __shfl_xor_sync(0xffffffff, value, 1);
    return value;
}

// Writes the gradients of the (natural) logits, scaled as the products of values and slopes are; laid
// out as logits.
template <typename T, int BLOCKS, int K, int SLOTS>
__global__ void __launch_bounds__(256, 2)
    pairwise_logits_gradient(const T* grad, const Half* logits, const float* log_sums,
                             const T* value, const T* out, Half* grad_logits,
                             const float* most_value, const float* most_slope, Tiling tiling,
                             Divisor slabs, int channels, int step, int pitch) {
    constexpr int slots = SLOTS, PITCH = BLOCKS * 8 + 8;
    extern __shared__ double shared[];
    Half* staged = reinterpret_cast<Half*>(shared);
    const int lane = threadIdx.x % 32, plane = tiling.height * tiling.width;
    const int pixels = tiling.rows * tiling.columns.divisor;
    unsigned tile = blockIdx.x;
    const int slab = slabs.divide(tile);
    const Place place(tile, tiling);
    const Channels own(channels, step, slab, slots, lane);
    const float scale_of_slopes = slope_scale(most_slope);
    const float scale = value_scale(most_value);
    stage_values<T, BLOCKS, K, false>(value, scale, staged, place, tiling, pitch, step, slab);
    const long long slab_number = static_cast<long long>(place.n) * slabs.divisor + slab;
    const long long before = slab_number * K * K * plane * slots;
    LogitRow<K> row_of_taps(staged + (tiling.rows + K - 1) * tiling.staged.divisor * PITCH);
#pragma unroll 1
    for (int first = threadIdx.x / 32 * GROUP; first < pixels; first += blockDim.x / 32 * GROUP) {
        const Pixel<K, false> of_row(first + lane % 16, place, tiling);
        unsigned row = value_row<BLOCKS>(staged, of_row.staged_number(tiling), lane);
        int number[2];
        bool mine[2];
        float log_sum[2][2], delta[2][2] = {};
        unsigned slopes[BLOCKS][2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const Pixel<K, false> pixel(first + h * 8 + lane / 4, place, tiling);
            number[h] = pixel.number(tiling);
            mine[h] = pixel.exists && lane % 4 * 2 < slots;
            load<2>(log_sums + (slab_number * plane + number[h]) * slots + own.slot, log_sum[h]);
            const long long at =
                (place.n * static_cast<long long>(plane) + number[h]) * channels + own.first;
#pragma unroll
            for (int b = 0; b < BLOCKS; ++b) {
                float slope[2], sum[2];
                load<2>(grad + at + b * step, slope);
                load<2>(out + at + b * step, sum);
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    slope[e] *= scale_of_slopes;
                    delta[h][e] += slope[e] * (sum[e] * scale);
                }
                slopes[b][h] = pack<Half>(slope[0], slope[1]);
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) delta[h][e] = sum_of_quad<SLOTS>(delta[h][e]);
        }
        const auto copy = [&](int i) {
            row_of_taps.copy(
                logits + before, slots,
                [&](int j) { return ((i * K + j) * plane + of_row.number(tiling)) * slots; },
                [](int) { return true; });
        };
        copy(0);
        Half* to = grad_logits + before + own.slot;
#pragma unroll 1
        for (int i = 0; i < K; ++i, row += tiling.staged.divisor * PITCH * 2) {
            unsigned logit[K][2];
            row_of_taps.read(own.slot, logit);
            if (i + 1 < K) copy(i + 1);
#pragma unroll
            for (int j = 0; j < K; ++j, to += plane * slots) {
                unsigned values[BLOCKS][2];
                load_values<BLOCKS>(row + j * PITCH * 2, values);
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    unsigned product = 0;
#pragma unroll
                    for (int b = 0; b < BLOCKS; ++b)
                        product = multiply_add_pairs(values[b][h], slopes[b][h], product);
                    product = sum_of_quad<SLOTS>(product);
                    const float first_weight = power_of_two(first_of(logit[j][h]) - log_sum[h][0]);
                    const float second_weight = power_of_two(second_of(logit[j][h]) - log_sum[h][1]);
                    unsigned packed = pack<Half>(first_weight * (first_of(product) - delta[h][0]),
                                                 second_weight * (second_of(product) - delta[h][1]));
                    forget_origin(packed);  // nothing but the store depends on a condition
                    if (mine[h]) *reinterpret_cast<unsigned*>(to + number[h] * slots) = packed;
                }
            }
        }
    }
}

// Writes the gradient of the padded values, (N, padded pixels, channels): a walk over keys.
template <typename T, int BLOCKS, int K>
__global__ void __launch_bounds__(256, 2)
    pairwise_value_gradient(const T* grad, const Half* logits, const float* log_sums, float* padded,
                            const float* most_slope, Tiling tiling, Divisor slabs, int slots,
                            int channels, int step) {
    constexpr int PITCH = BLOCKS * 8 + 8;
    extern __shared__ double shared[];
    Half* staged = reinterpret_cast<Half*>(shared);
    const int lane = threadIdx.x % 32, plane = tiling.height * tiling.width;
    const int pixels = tiling.rows * tiling.columns.divisor;
    unsigned tile = blockIdx.x;
    const int slab = slabs.divide(tile);
    const Place place(tile, tiling);
    const Channels own(channels, step, slab, slots, lane);
    const long long slab_number = static_cast<long long>(place.n) * slabs.divisor + slab;
    const Half* slab_logits = logits + slab_number * K * K * plane * slots;
    // Behind the queries' slopes lie rows of logits, behind those the queries' sums of powers.
    Half* const rows = staged + (tiling.rows + K - 1) * tiling.staged.divisor * PITCH;
    LogitRow<K> row_of_taps(rows);
    float* staged_sums = reinterpret_cast<float*>(rows + blockDim.x / 32 * LogitRow<K>::HALVES);
    visit_staged<K, true>(place, tiling, threadIdx.x, blockDim.x, [&](int at, int number, bool exists) {
        for (int s = 0; s < slots; s += 2)
            copy_or_clear<2>(staged_sums + at * slots + s,
                             log_sums + (slab_number * plane + number) * slots + s, exists);
    });
    const float scale = slope_scale(most_slope);
    stage_values<T, BLOCKS, K, true>(grad, scale, staged, place, tiling, channels, step, slab);
#pragma unroll 1
    for (int first = threadIdx.x / 32 * GROUP; first < pixels; first += blockDim.x / 32 * GROUP) {
        const Pixel<K, true> of_row(first + lane % 16, place, tiling);
        unsigned row = value_row<BLOCKS>(staged, of_row.staged_number(tiling), lane);
        const Pixel<K, true> pixel[2] = {{first + lane / 4u, place, tiling},
                                         {first + 8 + lane / 4u, place, tiling}};
        const float* sums_of[2];
#pragma unroll
        for (int h = 0; h < 2; ++h)
            sums_of[h] = staged_sums + pixel[h].staged_number(tiling) * slots + own.slot;
        const KeyWalk<K> walk(tiling, slots);
        const unsigned at = walk.first(of_row, tiling, slots);
        const unsigned columns = of_row.columns_of_queries(tiling);
        // Where there is no query, there is no slope, and the weight does not matter.
        const auto copy = [&](int i) {
            const unsigned exist = of_row.row_of_queries(i, tiling) ? columns : 0;
            row_of_taps.copy(
                slab_logits, slots, [&](int j) { return at + walk.step(i, j); },
                [&](int j) { return exist >> j & 1; });
        };
        copy(0);
        ValueSums<BLOCKS> sums;
#pragma unroll 1
        for (int i = 0; i < K; ++i, row += tiling.staged.divisor * PITCH * 2) {
            unsigned logit[K][2];
            row_of_taps.read(own.slot, logit);
            if (i + 1 < K) copy(i + 1);
            sums.begin_row();
#pragma unroll
            for (int j = 0; j < K; ++j) {
                unsigned weights[2], values[BLOCKS][2];
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float log_sum[2];
                    load<2>(sums_of[h] + (i * tiling.staged.divisor + j) * slots, log_sum);
                    weights[h] = weights_of(logit[j][h], log_sum);
                }
                load_values<BLOCKS>(row + j * PITCH * 2, values);
                sums.add(values, weights);
            }
            sums.end_row();
        }
        const float unscale = 1 / scale;
        const int padded_plane = (tiling.height + K - 1) * (tiling.width + K - 1);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (!pixel[h].exists) continue;
            float* to = padded + (place.n * static_cast<long long>(padded_plane) +
                                  pixel[h].padded_number(tiling)) * channels + own.first;
#pragma unroll
            for (int b = 0; b < BLOCKS; ++b) {
                const float pair[2] = {sums.rows[b][h][0] * unscale, sums.rows[b][h][1] * unscale};
                store<2>(to + b * step, pair);
            }
        }
    }
}

// Adds what lies in the padding to the pixels shown there; a thread takes 8 channels of a pixel.
template <typename T, int K>
__global__ void __launch_bounds__(256)
    pairwise_fold(const float* padded, T* folded, Divisor eights, Divisor width, Divisor height,
                  int images) {
    constexpr int RADIUS = K / 2;
    unsigned rest = blockIdx.x * 256u + threadIdx.x;
    const int eight = eights.divide(rest), x = width.divide(rest), y = height.divide(rest);
    const int n = rest, channels = eights.divisor * 8, wide = width.divisor, high = height.divisor;
    if (n >= images) return;
    const float* plane = padded + static_cast<long long>(n) * (high + K - 1) * (wide + K - 1) * channels + eight * 8;
    float sums[8] = {};
#pragma unroll
    for (int a = 0; a < IMAGES<true>; ++a)
#pragma unroll
        for (int b = 0; b < IMAGES<true>; ++b) {
            int shown_y, shown_x;
            if (!image<true>(y, high, RADIUS, a, shown_y) || !image<true>(x, wide, RADIUS, b, shown_x)) continue;
            const float* from = plane + static_cast<long long>((shown_y + RADIUS) * (wide + K - 1) + shown_x + RADIUS) * channels;
            float values[8];
            load<4>(from, *reinterpret_cast<float(*)[4]>(values));
            load<4>(from + 4, *reinterpret_cast<float(*)[4]>(values + 4));
#pragma unroll
            for (int e = 0; e < 8; ++e) sums[e] += values[e];
        }
    store<8>(folded + ((static_cast<long long>(n) * high + y) * wide + x) * channels + eight * 8, sums);
}
