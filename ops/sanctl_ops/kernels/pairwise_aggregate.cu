// Sums of values weighted by the softmax of stored logits: see pairwise_sums.cuh.
#include "pairwise_sums.cuh"

// `out` is (N, H * W, channels), `value` likewise with `pitch` elements from pixel to pixel; *most_value
// is the largest value, disregarding signs.
template <typename T, int BLOCKS, int K>
__global__ void __launch_bounds__(256, 2)
    pairwise_aggregate(const Half* logits, const float* log_sums, const T* value, T* out,
                       const float* most_value, Tiling tiling, Divisor slabs, int slots,
                       int channels, int step, int pitch) {
    constexpr int PITCH = BLOCKS * 8 + 8;
    extern __shared__ double shared[];
    Half* staged = reinterpret_cast<Half*>(shared);
    const int lane = threadIdx.x % 32, plane = tiling.height * tiling.width;
    const int pixels = tiling.rows * tiling.columns.divisor;
    unsigned tile = blockIdx.x;
    const int slab = slabs.divide(tile);
    const Place place(tile, tiling);
    const Channels own(channels, step, slab, slots, lane);
    const float scale = value_scale(most_value);
    stage_values<T, BLOCKS, K, false>(value, scale, staged, place, tiling, pitch, step, slab);
    const long long slab_number = static_cast<long long>(place.n) * slabs.divisor + slab;
    const Half* slab_logits = logits + slab_number * K * K * plane * slots;
    LogitRow<K> row_of_taps(staged + (tiling.rows + K - 1) * tiling.staged.divisor * PITCH);
#pragma unroll 1
    for (int first = threadIdx.x / 32 * GROUP; first < pixels; first += blockDim.x / 32 * GROUP) {
        const Pixel<K, false> of_row(first + lane % 16, place, tiling);
        unsigned row = value_row<BLOCKS>(staged, of_row.staged_number(tiling), lane);
        int number[2];
        bool exists[2];
        float log_sum[2][2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const Pixel<K, false> pixel(first + h * 8 + lane / 4, place, tiling);
            number[h] = pixel.number(tiling);
            exists[h] = pixel.exists;
            load<2>(log_sums + (slab_number * plane + number[h]) * slots + own.slot, log_sum[h]);
        }
        ValueSums<BLOCKS> sums;
        const auto copy = [&](int i) {
            row_of_taps.copy(
                slab_logits, slots,
                [&](int j) { return ((i * K + j) * plane + of_row.number(tiling)) * slots; },
                [](int) { return true; });
        };
        copy(0);
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
                for (int h = 0; h < 2; ++h) weights[h] = weights_of(logit[j][h], log_sum[h]);
                load_values<BLOCKS>(row + j * PITCH * 2, values);
                sums.add(values, weights);
            }
            sums.end_row();
        }
        const float unscale = 1 / scale;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (!exists[h]) continue;
            T* to = out + (place.n * static_cast<long long>(plane) + number[h]) * channels + own.first;
#pragma unroll
            for (int b = 0; b < BLOCKS; ++b) {
                const float pair[2] = {sums.rows[b][h][0] * unscale, sums.rows[b][h][1] * unscale};
                store<2>(to + b * step, pair);
            }
        }
    }
}
