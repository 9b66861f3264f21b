// The logits of pairwise attention and the logarithms of their sums of powers, both to base 2: see
// pairwise.cuh.
#include "pairwise.cuh"

// Beyond this, a sum of powers takes a new reference.
constexpr float FAR = 64;

// Sums of powers of two over taps, relative to the first tap's logit; four of a lane.
struct PowerSums {
    float reference[4], sum[4];

    __device__ void add(const float (&logit)[4], bool first) {
        float apart[4], most = 0;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            if (first) {
                reference[e] = logit[e];
                sum[e] = 0;
            }
            apart[e] = logit[e] - reference[e];
            most = max(most, apart[e]);
        }
        if (most > FAR)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (apart[e] > FAR) {
                    sum[e] *= power_of_two(-apart[e]);
                    reference[e] = logit[e];
                    apart[e] = 0;
                }
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e] += power_of_two(apart[e]);
    }
};

// `logits` are (N, slabs, K * K, H * W, slots) and `log_sums` (N, slabs, H * W, slots): slab s has
// weight channels s * 8 on, and fewer slots than 8 repeat themselves among the 8 columns of weights2,
// whose rows of blocks are slabs.
template <int REL, int K>
__global__ void __launch_bounds__(RELATION_THREADS<REL>, REL == 64 ? 3 : RELATION_BLOCKS<REL>)
    pairwise_logits(const Half* query, const Half* key, const Half* affine, const Half* weights1,
                    const Half* weights2, Half* logits, float* log_sums, Tiling tiling, int slots) {
    constexpr int SIZE = REL + TAIL, HIDDEN_CHUNKS = HIDDEN<REL> / 8;
    extern __shared__ double shared[];
    Half* staged = reinterpret_cast<Half*>(shared);
    const int lane = threadIdx.x % 32, plane = tiling.height * tiling.width;
    const int pixels = tiling.rows * tiling.columns.divisor;
    const Place place(blockIdx.x, tiling);
    const Weights1<REL> first_weights(weights1, lane);
    const Blocks<SLABS<REL>, HIDDEN_CHUNKS, (REL <= 32)> second_weights(weights2, lane);
    stage_relation<REL, K>(key, staged, place, tiling);
#pragma unroll 1
    for (int first = threadIdx.x / 32 * GROUP; first < pixels; first += blockDim.x / 32 * GROUP) {
        const Pixel<K, false> row(first + lane % 16, place, tiling);
        Relation<REL, false> relation(query, affine, staged, lane, row, tiling);
        int number[2];
        bool mine[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const Pixel<K, false> pixel(first + h * 8 + lane / 4, place, tiling);
            number[h] = pixel.number(tiling);
            mine[h] = pixel.exists && lane % 4 * 2 < slots;
            relation.take_centre(h, query + (place.n * static_cast<long long>(plane) + number[h]) * SIZE,
                                 lane);
        }
        PowerSums powers[SLABS<REL>];
        Half* tap = logits + static_cast<long long>(place.n) * SLABS<REL> * K * K * plane * slots +
                    lane % 4 * 2;
        const unsigned slab = K * K * plane * slots;
#pragma unroll 1
        for (int i = 0; i < K; ++i)
#pragma unroll(REL <= 16 ? K : 1)
            for (int j = 0; j < K; ++j, tap += plane * slots) {
                unsigned z[CHUNKS<REL>][2];
                relation.compute((i * tiling.staged.divisor + j) * SIZE * 2, z);
                float sums[SLABS<REL>][4] = {};
                unsigned hidden[HIDDEN_CHUNKS][2];
#pragma unroll
                for (int c = 0; c < HIDDEN_CHUNKS; ++c) {
                    unsigned weights[Weights1<REL>::FOURS * 4];
                    first_weights.read(c, weights);
                    float shifted[4] = {};
                    multiply<CHUNKS<REL>, 0>(shifted, z, weights);
                    hidden[c][0] = pack_relu(shifted[0], shifted[1]);
                    hidden[c][1] = pack_relu(shifted[2], shifted[3]);
                }
#pragma unroll
                for (int s = 0; s < SLABS<REL>; ++s) {
                    unsigned weights[(HIDDEN_CHUNKS + 3) / 4 * 4];
                    second_weights.read(s, weights);
                    multiply<HIDDEN_CHUNKS, 0>(sums[s], hidden, weights);
                    float rounded[4];
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const unsigned pair = pack<Half>(sums[s][h * 2], sums[s][h * 2 + 1]);
                        rounded[h * 2] = first_of(pair);
                        rounded[h * 2 + 1] = second_of(pair);
                        if (mine[h])
                            *reinterpret_cast<unsigned*>(tap + (s * slab + number[h] * slots)) = pair;
                    }
                    powers[s].add(rounded, i == 0 && j == 0);
                }
            }
#pragma unroll
        for (int s = 0; s < SLABS<REL>; ++s)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (mine[e / 2])
                    log_sums[((static_cast<long long>(place.n) * SLABS<REL> + s) * plane + number[e / 2]) * slots +
                             lane % 4 * 2 + e % 2] =
                        powers[s].reference[e] + logarithm(powers[s].sum[e]);
    }
}
