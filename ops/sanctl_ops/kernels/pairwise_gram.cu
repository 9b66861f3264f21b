// The Gram matrix of z over all images, pixels and taps: see pairwise.cuh. The second normalisation's
// statistics follow from it.
//
// z is computed transposed, so that pixels are what a product sums over; it is both factors. Only
// blocks on and above the diagonal are computed. A block of threads sums up some tiles in float, not
// more than 256 products in a row, since tensor cores cut off what they add up.
#include "pairwise.cuh"

// Parts that the rows of the matrix are dealt out to, to fit into registers.
template <int REL>
constexpr int PARTS = REL > 64 ? 4 : 1;

template <int REL, int PART>
struct GramSums {
    static constexpr int ROWS = (CHUNKS<REL> + 1) / 2;  // of 16 channels
    float sums[(ROWS - PART + PARTS<REL> - 1) / PARTS<REL>][CHUNKS<REL>][4];

    __device__ void clear() {
        for (auto& row : sums)
            for (auto& block : row)
                for (float& sum : block) sum = 0;
    }

    __device__ void add(const unsigned (&z)[CHUNKS<REL>][2]) {
#pragma unroll
        for (int m = PART, i = 0; m < ROWS; m += PARTS<REL>, ++i) {
            const bool low = 2 * m + 1 < CHUNKS<REL>;  // whether the lower 8 rows exist
            const int below = low ? 2 * m + 1 : 0;
#pragma unroll
            for (int n = 2 * m; n < CHUNKS<REL>; ++n)
                Mma<Half>::k16(sums[i][n], z[2 * m][0], low ? z[below][0] : 0, z[2 * m][1],
                               low ? z[below][1] : 0, z[n][0], z[n][1]);
        }
    }

    // Adds the sums of a warp to what the block's warps before it have written.
    __device__ void join(float* shared, bool first, int lane) const {
#pragma unroll
        for (int m = PART, i = 0; m < ROWS; m += PARTS<REL>, ++i)
#pragma unroll
            for (int n = 2 * m; n < CHUNKS<REL>; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float& sum = shared[((i * CHUNKS<REL> + n) * 4 + e) * 32 + lane];
                    sum = sums[i][n][e] + (first ? 0 : sum);
                }
    }

    // Writes the block's sums to its matrix, of CHUNKS * 8 rows and columns.
    __device__ static void write(const float* shared, float* matrix, int lane) {
#pragma unroll 1
        for (int m = PART, i = 0; m < ROWS; m += PARTS<REL>, ++i)
#pragma unroll 1
            for (int n = 2 * m; n < CHUNKS<REL>; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int row = m * 16 + lane / 4 + e / 2 * 8;
                    if (row < CHUNKS<REL> * 8)
                        matrix[row * CHUNKS<REL> * 8 + n * 8 + lane % 4 * 2 + e % 2] =
                            shared[((i * CHUNKS<REL> + n) * 4 + e) * 32 + lane];
                }
    }
};

template <int REL, int K, int PART>
__device__ inline void sum_gram(const Half* query, const Half* key, const Half* affine,
                                float* partials, const Tiling& tiling, int tiles, int all_tiles,
                                int share) {
    constexpr int SIZE = REL + TAIL;
    extern __shared__ double shared[];
    Half* staged = reinterpret_cast<Half*>(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int plane = tiling.height * tiling.width;
    const int pixels = tiling.rows * tiling.columns.divisor;
    GramSums<REL, PART> gram;
    gram.clear();
    const int end = min(share * tiles + tiles, all_tiles);
#pragma unroll 1
    for (int tile = share * tiles; tile < end; ++tile) {
        const Place place(tile, tiling);
        __syncthreads();
        stage_relation<REL, K>(key, staged, place, tiling);
#pragma unroll 1
        for (int first = warp * GROUP; first < pixels; first += warps * GROUP) {
            const Pixel<K, false> row(first + lane % 16, place, tiling);
            Relation<REL, true> relation(query, affine, staged, lane, row, tiling);
            unsigned exist[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const Pixel<K, false> one(first + h * 8 + lane % 4 * 2, place, tiling);
                const Pixel<K, false> other(first + h * 8 + lane % 4 * 2 + 1, place, tiling);
                const Half* image = query + static_cast<long long>(place.n) * plane * SIZE;
                exist[h] = (one.exists ? 0xffff : 0) | (other.exists ? 0xffff0000 : 0);
                relation.take_centres(h, image + one.number(tiling) * SIZE,
                                      image + other.number(tiling) * SIZE, exist[h], lane);
            }
#pragma unroll 1
            for (int i = 0; i < K; ++i)
#pragma unroll(REL <= 32 ? K : 1)
                for (int j = 0; j < K; ++j) {
                    unsigned z[CHUNKS<REL>][2];
                    relation.compute((i * tiling.staged.divisor + j) * SIZE * 2, z);
#pragma unroll
                    for (int h = 0; h < 2; ++h) z[CHUNKS<REL> - 1][h] &= exist[h];
                    gram.add(z);
                }
        }
    }
    __syncthreads();
    float* joined = reinterpret_cast<float*>(shared);
    for (int w = 0; w < warps; ++w) {
        if (warp == w) gram.join(joined, w == 0, lane);
        __syncthreads();
    }
    if (warp == 0) gram.write(joined, partials + share * SIZE * SIZE, lane);
}

// Blocks take `tiles` tiles each; those of all parts of a share follow each other. Partials are
// (shares, REL + 8, REL + 8), of which the blocks below the diagonal stay as they are.
template <int REL, int K>
__global__ void __launch_bounds__(RELATION_THREADS<REL>, RELATION_BLOCKS<REL>)
    pairwise_gram(const Half* query, const Half* key, const Half* affine, float* partials,
                  Tiling tiling, int tiles, int all_tiles) {
    const int share = blockIdx.x / PARTS<REL>;
    const auto sum = [&](auto part) {
        sum_gram<REL, K, decltype(part)::value>(query, key, affine, partials, tiling, tiles,
                                                all_tiles, share);
    };
    if constexpr (PARTS<REL> == 1) sum(Number<0>());
    else
        switch (blockIdx.x % PARTS<REL>) {
            case 0: sum(Number<0>()); break;
            case 1: sum(Number<1>()); break;
            case 2: sum(Number<2>()); break;
            default: sum(Number<3>());
        }
}
