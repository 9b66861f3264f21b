// The gradient behind the first normalisation, summed over the taps of every query or, in a walk over
// keys, over the queries of every padded key: see pairwise.cuh.
#include "pairwise.cuh"

// Writes (N, H * W, REL + 8) or, over KEYS, (N, padded pixels, REL + 8), multiplied by *unscale. Rows
// of blocks of weights1 and of weights2, transposed, are hidden channels; those of `back` are channels
// of z: what the gradient behind the second normalisation is multiplied by and, after that, z itself.
template <int REL, int K, bool KEYS>
__global__ void __launch_bounds__(256, REL <= 16 ? 2 : 1)
    pairwise_relation_gradient(const Half* query, const Half* key, const Half* affine,
                               const Half* weights1, const Half* weights2, const Half* back,
                               const Half* grad_logits, const float* unscale, float* grad,
                               Tiling tiling, int slots) {
    constexpr int SIZE = REL + TAIL, HIDDEN_CHUNKS = HIDDEN<REL> / 8;
    extern __shared__ double shared[];
    Half* staged = reinterpret_cast<Half*>(shared);
    const int lane = threadIdx.x % 32, plane = tiling.height * tiling.width;
    const int pixels = tiling.rows * tiling.columns.divisor;
    const Place place(blockIdx.x, tiling);
    const Weights1<REL> first_weights(weights1, lane);
    using SecondWeights = Blocks<HIDDEN_CHUNKS, SLABS<REL>, (REL <= 32)>;
    const SecondWeights second_weights(weights2, lane);
    using Back = Blocks<CHUNKS<REL>, HIDDEN_CHUNKS + CHUNKS<REL>, (REL <= 32)>;
    const Back back_weights(back, lane);
    stage_relation<REL, K, KEYS>(KEYS ? query : key, staged, place, tiling);
    const Half* centres = (KEYS ? key : query) + static_cast<long long>(place.n) * plane * SIZE;
#pragma unroll 1
    for (int first = threadIdx.x / 32 * GROUP; first < pixels; first += blockDim.x / 32 * GROUP) {
        const Pixel<K, KEYS> row(first + lane % 16, place, tiling);
        Relation<REL, KEYS, false> relation(centres, affine, staged, lane, row, tiling);
        const Pixel<K, KEYS> pixel[2] = {{first + lane / 4u, place, tiling},
                                         {first + 8 + lane / 4u, place, tiling}};
        unsigned at[2], columns[2];
        bool mine[2];
        const Walk<K, KEYS> walk(tiling, slots);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            relation.take_centre(h, centres + pixel[h].number(tiling) * SIZE, lane);
            mine[h] = pixel[h].exists && lane % 4 * 2 < slots;
            at[h] = walk.first(pixel[h], tiling, slots);
            columns[h] = KEYS ? pixel[h].columns_of_queries(tiling) : 0;
        }
        const Half* image = grad_logits +
                            static_cast<long long>(place.n) * SLABS<REL> * K * K * plane * slots +
                            lane % 4 * 2;
        const unsigned slab = K * K * plane * slots;
        float sums[CHUNKS<REL>][4] = {};
#pragma unroll 1
        for (int i = 0; i < K; ++i) {
            unsigned exist[2];
#pragma unroll
            for (int h = 0; h < 2; ++h)
                exist[h] = KEYS && pixel[h].row_of_queries(i, tiling) ? columns[h] : 0;
#pragma unroll(REL <= 16 ? K : 1)
            for (int j = 0; j < K; ++j) {
                unsigned slopes[SLABS<REL>][2], z[CHUNKS<REL>][2];
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const bool read = KEYS ? mine[h] && exist[h] >> j & 1 : mine[h];
#pragma unroll
                    for (int s = 0; s < SLABS<REL>; ++s)
                        slopes[s][h] = read ? pair_at(image + (at[h] + s * slab)) : 0;
                    at[h] += walk.next_tap;
                }
                relation.compute((i * tiling.staged.divisor + j) * SIZE * 2, z);
                if (KEYS)
#pragma unroll
                    for (int c = 0; c < CHUNKS<REL>; ++c)
#pragma unroll
                        for (int h = 0; h < 2; ++h) z[c][h] = exist[h] >> j & 1 ? z[c][h] : 0;
                unsigned hidden[HIDDEN_CHUNKS][2];
#pragma unroll
                for (int c = 0; c < HIDDEN_CHUNKS; ++c) {
                    unsigned weights[Weights1<REL>::FOURS * 4], weights_back[SecondWeights::FOURS * 4];
                    float values[4] = {}, slope[4] = {};
                    first_weights.read(c, weights);
                    multiply<CHUNKS<REL>, 0>(values, z, weights);
                    second_weights.read(c, weights_back);
                    multiply<SLABS<REL>, 0>(slope, slopes, weights_back);
#pragma unroll
                    for (int h = 0; h < 2; ++h)
                        hidden[c][h] = where_positive(pack_relu(values[h * 2], values[h * 2 + 1]),
                                                      pack<Half>(slope[h * 2], slope[h * 2 + 1]));
                }
#pragma unroll
                for (int c = 0; c < CHUNKS<REL>; ++c) {
                    unsigned weights[Back::FOURS * 4];
                    float slope[4] = {};
                    back_weights.read(c, weights);
                    multiply<HIDDEN_CHUNKS, 0>(slope, hidden, weights);
                    multiply<CHUNKS<REL>, HIDDEN_CHUNKS>(slope, z, weights);
#pragma unroll
                    for (int h = 0; h < 2; ++h)
                        add_where_positive(z[c][h], slope[h * 2], slope[h * 2 + 1], sums[c][h * 2],
                                           sums[c][h * 2 + 1]);
                }
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) at[h] += walk.next_row;
        }
        const float factor = KEYS ? -*unscale : *unscale;
        const int all = KEYS ? (tiling.height + K - 1) * (tiling.width + K - 1) : plane;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (!pixel[h].exists) continue;
            const int number = KEYS ? pixel[h].padded_number(tiling) : pixel[h].number(tiling);
            float* to = grad + (static_cast<long long>(place.n) * all + number) * SIZE + lane % 4 * 2;
#pragma unroll
            for (int c = 0; c < CHUNKS<REL>; ++c) {
                const float pair[2] = {sums[c][h * 2] * factor, sums[c][h * 2 + 1] * factor};
                store<2>(to + c * 8, pair);
            }
        }
    }
}
