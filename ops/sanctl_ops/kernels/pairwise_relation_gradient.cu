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
        int number[2];  // of the query or, over keys, of the first one
        bool mine[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            relation.take_centre(h, centres + pixel[h].number(tiling) * SIZE, lane);
            number[h] = KEYS ? (pixel[h].y - K + 1) * tiling.width + pixel[h].x - K + 1
                             : pixel[h].number(tiling);
            mine[h] = pixel[h].exists && lane % 4 * 2 < slots;
        }
        const Half* logits = grad_logits +
                             static_cast<long long>(place.n) * SLABS<REL> * K * K * plane * slots +
                             lane % 4 * 2;
        float sums[CHUNKS<REL>][4] = {};
#pragma unroll 1
        for (int i = 0; i < K; ++i)
#pragma unroll(REL <= 16 ? K : 1)
            for (int j = 0; j < K; ++j) {
                unsigned slopes[SLABS<REL>][2], z[CHUNKS<REL>][2];
                bool counts[2];
                const Half* tap = logits + static_cast<long long>(tap_of<K, KEYS>(i, j)) * plane * slots;
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    counts[h] = !KEYS || pixel[h].has(i, j, tiling);
                    const int at = number[h] + (KEYS ? i * tiling.width + j : 0);
#pragma unroll
                    for (int s = 0; s < SLABS<REL>; ++s)
                        slopes[s][h] =
                            mine[h] && counts[h]
                                ? pair_at(tap + (static_cast<long long>(s) * K * K * plane + at) * slots)
                                : 0;
                }
                relation.compute((i * tiling.staged.divisor + j) * SIZE * 2, z);
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
                        hidden[c][h] = pack<Half>(values[h * 2] > 0 ? slope[h * 2] : 0,
                                                  values[h * 2 + 1] > 0 ? slope[h * 2 + 1] : 0);
                }
#pragma unroll
                for (int c = 0; c < CHUNKS<REL>; ++c) {
                    unsigned weights[Back::FOURS * 4];
                    float slope[4] = {};
                    back_weights.read(c, weights);
                    multiply<HIDDEN_CHUNKS, 0>(slope, hidden, weights);
                    multiply<CHUNKS<REL>, HIDDEN_CHUNKS>(slope, z, weights);
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        if (counts[h] && (z[c][h] & 0xffff) != 0) sums[c][h * 2] += slope[h * 2];
                        if (counts[h] && z[c][h] > 0xffff) sums[c][h * 2 + 1] += slope[h * 2 + 1];
                    }
                }
            }
        const float factor = KEYS ? -*unscale : *unscale;
        const int all = KEYS ? (tiling.height + K - 1) * (tiling.width + K - 1) : plane;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (!pixel[h].exists) continue;
            const int at = KEYS ? pixel[h].padded_number(tiling) : number[h];
            float* to = grad + (static_cast<long long>(place.n) * all + at) * SIZE + lane % 4 * 2;
#pragma unroll
            for (int c = 0; c < CHUNKS<REL>; ++c) {
                const float pair[2] = {sums[c][h * 2] * factor, sums[c][h * 2 + 1] * factor};
                store<2>(to + c * 8, pair);
            }
        }
    }
}
