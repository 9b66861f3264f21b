// Sums for the gradients of both convolutions' weights: g2 [z; 1]^T, g2 being the gradient behind the
// second normalisation, and hidden times the gradient of the logits. See pairwise.cuh.
//
// Hidden channels are computed transposed, a row of each, so that they are at once factors of products
// that sum over pixels. As in pairwise_gram.cu, at most 256 products are added up in a row.
#include "pairwise.cuh"

// Rows of 16 hidden channels that a block of threads takes, and parts that they make.
template <int REL>
constexpr int ROWS = REL == 32 || REL == 64 ? 2 : 1;
template <int REL>
constexpr int PARTS = (HIDDEN<REL> + 15) / 16 / ROWS<REL>;

// Taps whose slopes are read ahead of their use, as many as there are registers for.
template <int REL, int K>
constexpr int AHEAD = REL <= 16 ? K : REL <= 64 ? 2 : 1;

// Adds (two rows of blocks of weights) * (transposed blocks of 8 pixels, COUNT of them).
template <int COUNT, int WIDE, int N>
__device__ inline void multiply_transposed(float (&sums)[4], const unsigned (&upper)[WIDE],
                                           const unsigned (&lower)[WIDE], const unsigned (&b)[N][2],
                                           int h) {
#pragma unroll
    for (int c = 0; c + 1 < COUNT; c += 2)
        Mma<Half>::k16(sums, upper[c], lower[c], upper[c + 1], lower[c + 1], b[c][h], b[c + 1][h]);
    if constexpr (COUNT % 2 == 1)
        Mma<Half>::k8(sums, upper[COUNT - 1], lower[COUNT - 1], b[COUNT - 1][h]);
}

// 16 hidden channels of 16 pixels: blocks [upper or lower 8 channels][first or last 8 pixels].
struct Hidden {
    unsigned value[2][2], slope[2][2];

    // Takes 8 pixels; slopes count where the value is positive.
    __device__ void take(int h, const float (&values)[4], const float (&slopes)[4]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            value[r][h] = pack_relu(values[r * 2], values[r * 2 + 1]);
            slope[r][h] =
                where_positive(value[r][h], pack<Half>(slopes[r * 2], slopes[r * 2 + 1]));
        }
    }
};

// `partials` are (shares, 16 * ROWS * PARTS, REL + 8 + SLABS * 8). Rows of blocks of weights1 and of
// weights2, transposed, are hidden channels.
template <int REL, int K>
__global__ void __launch_bounds__(RELATION_THREADS<REL>, RELATION_BLOCKS<REL>)
    pairwise_weights_gradient(const Half* query, const Half* key, const Half* affine,
                              const Half* weights1, const Half* weights2, const Half* grad_logits,
                              float* partials, Tiling tiling, int slots, int tiles, int all_tiles) {
    constexpr int SIZE = REL + TAIL, WIDE = CHUNKS<REL> + SLABS<REL>;
    extern __shared__ double shared[];
    Half* staged = reinterpret_cast<Half*>(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int plane = tiling.height * tiling.width;
    const int pixels = tiling.rows * tiling.columns.divisor;
    const unsigned of_tap = plane * slots;
    const int share = blockIdx.x / PARTS<REL>, part = blockIdx.x % PARTS<REL>;
    using FirstWeights = Blocks<ROWS<REL> * 2, CHUNKS<REL>, (REL <= 32)>;
    using SecondWeights = Blocks<ROWS<REL> * 2, SLABS<REL>, (REL <= 64)>;
    const FirstWeights first_weights(weights1 + part * FirstWeights::ELEMENTS, lane);
    const SecondWeights second_weights(weights2 + part * SecondWeights::ELEMENTS, lane);
    float sums[ROWS<REL>][WIDE][4] = {};
    const int end = min(share * tiles + tiles, all_tiles);
#pragma unroll 1
    for (int tile = share * tiles; tile < end; ++tile) {
        const Place place(tile, tiling);
        __syncthreads();
        stage_relation<REL, K>(key, staged, place, tiling);
#pragma unroll 1
        for (int first = warp * GROUP; first < pixels; first += warps * GROUP) {
            const Pixel<K, false> row(first + lane % 16, place, tiling);
            Relation<REL, false> relation(query, affine, staged, lane, row, tiling);
            unsigned number[2];
            bool exists[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const Pixel<K, false> pixel(first + h * 8 + lane / 4, place, tiling);
                number[h] = pixel.number(tiling);
                exists[h] = pixel.exists;
                relation.take_centre(
                    h, query + (place.n * static_cast<long long>(plane) + number[h]) * SIZE, lane);
            }
            const Half* image =
                grad_logits + static_cast<long long>(place.n) * SLABS<REL> * K * K * of_tap;
            Slopes<SLABS<REL>, K, AHEAD<REL, K>> ahead(image, number, exists, of_tap, slots, lane);
#pragma unroll 1
            for (int i = 0; i < K; ++i)
#pragma unroll(REL <= 16 ? K : 1)
                for (int j = 0; j < K; ++j) {
                    unsigned tap[1][SLABS<REL>][2], z[CHUNKS<REL>][2];
                    ahead.take(tap);
                    ahead.template read_ahead<1>(i, j);
                    const auto& slopes = tap[0];
                    relation.compute((i * tiling.staged.divisor + j) * SIZE * 2, z);
                    Hidden hidden[ROWS<REL>];
#pragma unroll
                    for (int r = 0; r < ROWS<REL>; ++r) {
                        unsigned upper[FirstWeights::FOURS * 4], lower[FirstWeights::FOURS * 4];
                        unsigned upper2[SecondWeights::FOURS * 4], lower2[SecondWeights::FOURS * 4];
                        first_weights.read(r * 2, upper);
                        first_weights.read(r * 2 + 1, lower);
                        second_weights.read(r * 2, upper2);
                        second_weights.read(r * 2 + 1, lower2);
#pragma unroll
                        for (int h = 0; h < 2; ++h) {
                            float values[4] = {}, slope[4] = {};
                            multiply_transposed<CHUNKS<REL>>(values, upper, lower, z, h);
                            multiply_transposed<SLABS<REL>>(slope, upper2, lower2, slopes, h);
                            hidden[r].take(h, values, slope);
                        }
                    }
#pragma unroll
                    for (int c = 0; c < WIDE; ++c) {
                        unsigned columns[2];
#pragma unroll
                        for (int h = 0; h < 2; ++h)
                            columns[h] = transpose(c < CHUNKS<REL> ? z[c < CHUNKS<REL> ? c : 0][h]
                                                                   : slopes[c < CHUNKS<REL> ? 0 : c - CHUNKS<REL>][h]);
#pragma unroll
                        for (int r = 0; r < ROWS<REL>; ++r) {
                            const auto& a = c < CHUNKS<REL> ? hidden[r].slope : hidden[r].value;
                            Mma<Half>::k16(sums[r][c], a[0][0], a[1][0], a[0][1], a[1][1], columns[0],
                                           columns[1]);
                        }
                    }
                }
        }
    }
    __syncthreads();
    float* joined = reinterpret_cast<float*>(shared);
    for (int w = 0; w < warps; ++w) {
        if (warp == w)
#pragma unroll
            for (int r = 0; r < ROWS<REL>; ++r)
#pragma unroll
                for (int c = 0; c < WIDE; ++c)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        float& sum = joined[(r * 16 + lane / 4 + e / 2 * 8) * WIDE * 8 + c * 8 +
                                            lane % 4 * 2 + e % 2];
                        sum = sums[r][c][e] + (w == 0 ? 0 : sum);
                    }
        __syncthreads();
    }
    constexpr int COUNT = ROWS<REL> * 16 * WIDE * 8;
    for (int i = threadIdx.x; i < COUNT; i += blockDim.x)
        partials[(static_cast<long long>(share) * PARTS<REL> + part) * COUNT + i] = joined[i];
}
