// The gradient behind the first normalisation, summed over the taps of every query and, negative, over
// the queries of every key: see pairwise.cuh.
//
// Slopes are computed once, in a walk over queries, whose sums stay in registers. For keys they are
// added up in a plane of floats in shared memory, of all keys that the tile's windows reach. A group of
// pixels takes whole rows of the tile, so that warps add to different rows of keys while they are at the
// same row of taps: a barrier behind each keeps them there, and sums in one order. Keys that several
// tiles reach, or that are reflected, are joined by pairwise_fold_keys.
#include "pairwise.cuh"

constexpr int THREADS = 256;  // of a block of pairwise_fold_keys

// Taps that a warp takes at once, where weights do not fit into registers and are read once for them.
template <int REL>
constexpr int TOGETHER = REL > 32 ? 2 : 1;

// Taps whose slopes are read ahead of their use, as many as there are registers for.
template <int REL, int K>
constexpr int AHEAD = REL <= 16 ? K : REL == 32 ? 2 : TOGETHER<REL>;

// Parts that the slopes' blocks of 8 channels are dealt out to, for sums to fit shared memory, and
// blocks of a part.
template <int REL>
constexpr int PARTS = REL > 64 ? 2 : 1;  // as GRADIENT_PARTS in pairwise_tiles.py
template <int REL>
constexpr int PART_CHUNKS = (CHUNKS<REL> + PARTS<REL> - 1) / PARTS<REL>;

// Writes some of SIZE channels of keys, of which PITCH are in shared memory, multiplied by `factor`.
template <int SIZE, int PITCH, int CHANNELS>
__device__ inline void write_keys(const float* sums, float* to, int keys, float factor) {
    for (int i = threadIdx.x; i < keys * (CHANNELS / 4); i += blockDim.x) {
        const int key = i / (CHANNELS / 4), channel = i % (CHANNELS / 4) * 4;
        float four[4];
        load<4>(sums + key * PITCH + channel, four);
#pragma unroll
        for (int e = 0; e < 4; ++e) four[e] *= factor;
        store<4>(to + key * SIZE + channel, four);
    }
}

// The sums of a part of the slopes; arguments as those of pairwise_relation_gradient.
template <int REL, int K, int PART>
__device__ inline void sum_slopes(unsigned tile, const Half* query, const Half* key,
                                  const Half* affine, const Half* weights1, const Half* weights2,
                                  const Half* back, const Half* grad_logits, const float* unscale,
                                  float* grad_query, float* grad_keys, const Tiling& tiling,
                                  int slots) {
    constexpr int SIZE = REL + TAIL, HIDDEN_CHUNKS = HIDDEN<REL> / 8, PITCH = PART_CHUNKS<REL> * 8;
    constexpr int FIRST = PART * PART_CHUNKS<REL>;
    constexpr int COUNT = PART + 1 < PARTS<REL> ? PART_CHUNKS<REL> : CHUNKS<REL> - FIRST;
    extern __shared__ double shared[];
    Half* staged = reinterpret_cast<Half*>(shared);
    const int lane = threadIdx.x % 32, plane = tiling.height * tiling.width;
    const int pixels = tiling.rows * tiling.columns.divisor;
    const int keys = (tiling.rows + K - 1) * tiling.staged.divisor;
    float* const key_sums = reinterpret_cast<float*>(staged + keys * SIZE);
    const Place place(tile, tiling);
    const Weights1<REL> first_weights(weights1, lane);
    using SecondWeights = Blocks<HIDDEN_CHUNKS, SLABS<REL>, (REL <= 32)>;
    const SecondWeights second_weights(weights2, lane);
    using Back = Blocks<CHUNKS<REL>, HIDDEN_CHUNKS + CHUNKS<REL>, (REL <= 32)>;
    const Back back_weights(back, lane);
    for (int i = threadIdx.x; i < keys * PITCH; i += blockDim.x) key_sums[i] = 0;
    stage_relation<REL, K>(key, staged, place, tiling);
    const unsigned of_tap = plane * slots;
    const Half* image = grad_logits + static_cast<long long>(place.n) * SLABS<REL> * K * K * of_tap;
    const Half* centres = query + static_cast<long long>(place.n) * plane * SIZE;
#pragma unroll 1
    for (int begin = 0; begin < pixels; begin += blockDim.x / 32 * GROUP) {
        const int first = begin + threadIdx.x / 32 * GROUP;
        const Pixel<K, false> row(first + lane % 16, place, tiling);
        Relation<REL, false> relation(centres, affine, staged, lane, row, tiling);
        unsigned number[2];
        bool exists[2];
        float* of_key[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const Pixel<K, false> pixel(first + h * 8 + lane / 4, place, tiling);
            number[h] = pixel.number(tiling);
            exists[h] = pixel.exists;
            relation.take_centre(h, centres + number[h] * SIZE, lane);
            of_key[h] = key_sums + pixel.staged_number(tiling) * PITCH + lane % 4 * 2;
        }
        Slopes<SLABS<REL>, K, AHEAD<REL, K>> ahead(image, number, exists, of_tap, slots, lane);
        float sums[COUNT][4] = {};
        // Takes some taps of row i at once, from j on.
        const auto take = [&](int i, int j, auto number_of_taps) {
            constexpr int TAPS = decltype(number_of_taps)::value;
            unsigned slopes[TAPS][SLABS<REL>][2], z[TAPS][CHUNKS<REL>][2];
            ahead.take(slopes);
#pragma unroll
            for (int v = 0; v < TAPS; ++v)
                relation.compute((i * tiling.staged.divisor + j + v) * SIZE * 2, z[v]);
            if (REL > 64) __syncthreads();  // warps read the same weights, which the cache keeps briefly
            unsigned hidden[TAPS][HIDDEN_CHUNKS][2];
#pragma unroll
            for (int c = 0; c < HIDDEN_CHUNKS; ++c) {
                unsigned weights[Weights1<REL>::FOURS * 4], weights_back[SecondWeights::FOURS * 4];
                first_weights.read(c, weights);
                second_weights.read(c, weights_back);
#pragma unroll
                for (int v = 0; v < TAPS; ++v) {
                    float values[4] = {}, slope[4] = {};
                    multiply<CHUNKS<REL>, 0>(values, z[v], weights);
                    multiply<SLABS<REL>, 0>(slope, slopes[v], weights_back);
#pragma unroll
                    for (int h = 0; h < 2; ++h)
                        hidden[v][c][h] = where_positive(pack_relu(values[h * 2], values[h * 2 + 1]),
                                                         pack<Half>(slope[h * 2], slope[h * 2 + 1]));
                }
            }
            if (REL > 64) __syncthreads();
            // Only here, where these slopes need no registers any more.
            ahead.template read_ahead<TAPS>(i, j);
#pragma unroll
            for (int c = 0; c < COUNT; ++c) {
                unsigned weights[Back::FOURS * 4];
                back_weights.read(FIRST + c, weights);
#pragma unroll
                for (int v = 0; v < TAPS; ++v) {
                    float slope[4] = {};
                    multiply<HIDDEN_CHUNKS, 0>(slope, hidden[v], weights);
                    multiply<CHUNKS<REL>, HIDDEN_CHUNKS>(slope, z[v], weights);
                    // Lanes add to keys that others have added to at the tap before.
                    if (c == 0 || v > 0) __syncwarp();
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        float* const at =
                            of_key[h] + (i * tiling.staged.divisor + j + v) * PITCH + c * 8;
                        float pair[2] = {};
                        if (exists[h]) load<2>(at, pair);
                        add_where_positive(z[v][FIRST + c][h], slope[h * 2], slope[h * 2 + 1],
                                           sums[c][h * 2], sums[c][h * 2 + 1], pair[0], pair[1]);
                        if (exists[h]) store<2>(at, pair);
                    }
                }
            }
        };
#pragma unroll 1
        for (int i = 0; i < K; ++i) {
#pragma unroll(REL <= 16 ? K : 1)
            for (int j = 0; j + TOGETHER<REL> <= K; j += TOGETHER<REL>)
                take(i, j, Number<TOGETHER<REL>>());
            if constexpr (TOGETHER<REL> > 1) take(i, K - 1, Number<1>());
            __syncthreads();
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (!exists[h]) continue;
            float* to = grad_query +
                        (static_cast<long long>(place.n) * plane + number[h]) * SIZE + FIRST * 8 +
                        lane % 4 * 2;
#pragma unroll
            for (int c = 0; c < COUNT; ++c) {
                const float pair[2] = {sums[c][h * 2] * *unscale, sums[c][h * 2 + 1] * *unscale};
                store<2>(to + c * 8, pair);
            }
        }
    }
    write_keys<SIZE, PITCH, COUNT * 8>(
        key_sums, grad_keys + static_cast<long long>(tile) * keys * SIZE + FIRST * 8, keys, -*unscale);
}

// Writes the sums of queries, (N, H * W, REL + 8), and of the keys of every tile, (tiles, staged keys,
// REL + 8), multiplied by *unscale. Rows of blocks of weights1 and of weights2, transposed, are hidden
// channels; those of `back` are channels of z: what the gradient behind the second normalisation is
// multiplied by and, after that, z itself.
template <int REL, int K>
__global__ void __launch_bounds__(RELATION_THREADS<REL>, RELATION_BLOCKS<REL>)
    pairwise_relation_gradient(const Half* query, const Half* key, const Half* affine,
                               const Half* weights1, const Half* weights2, const Half* back,
                               const Half* grad_logits, const float* unscale, float* grad_query,
                               float* grad_keys, Tiling tiling, int slots) {
    // Blocks that run at a time take the same part, and read the same weights.
    const unsigned tiles = gridDim.x / PARTS<REL>;
    const auto sum = [&](auto part) {
        sum_slopes<REL, K, decltype(part)::value>(blockIdx.x % tiles, query, key, affine, weights1,
                                                  weights2, back, grad_logits, unscale, grad_query,
                                                  grad_keys, tiling, slots);
    };
    if (PARTS<REL> == 1 || blockIdx.x < tiles) sum(Number<0>());
    else sum(Number<PARTS<REL> - 1>());
}

// Adds up the sums of keys of all tiles, (N, tiles of an image, staged keys, REL + 8), for every pixel
// that they show, (N, H * W, REL + 8); a thread takes 8 channels of a pixel.
template <int K>
__global__ void __launch_bounds__(THREADS)
    pairwise_fold_keys(const float* tiles, float* folded, Tiling tiling, Divisor eights,
                       Divisor width, Divisor height, int images) {
    constexpr int R = K / 2;
    const unsigned thread = blockIdx.x * static_cast<unsigned>(THREADS) + threadIdx.x;
    unsigned rest = thread;
    const int eight = eights.divide(rest), x = width.divide(rest), y = height.divide(rest), n = rest;
    if (n >= images) return;
    const int size = eights.divisor * 8, across = tiling.across.divisor, down = tiling.down.divisor;
    const int columns = tiling.columns.divisor, staged = tiling.staged.divisor;
    const int keys = (tiling.rows + K - 1) * staged;
    tiles += static_cast<long long>(n) * down * across * keys * size + eight * 8;
    float sums[8] = {};
    // Hands tiles of which a key is part to visit(tile, row or column there); they overlap by K - 1.
    const auto visit_tiles = [](int key, int side, int count, auto visit) {
        for (int tile = max(0, (key - K + 1) / side); tile < count && tile * side <= key; ++tile)
            if (key - tile * side < side + K - 1) visit(tile, key - tile * side);
    };
#pragma unroll
    for (int a = 0; a < IMAGES<true>; ++a)
#pragma unroll
        for (int b = 0; b < IMAGES<true>; ++b) {
            int shown_y, shown_x;
            if (!image<true>(y, height.divisor, R, a, shown_y) ||
                !image<true>(x, width.divisor, R, b, shown_x))
                continue;
            visit_tiles(shown_y + R, tiling.rows, down, [&](int tile_y, int row) {
                visit_tiles(shown_x + R, columns, across, [&](int tile_x, int column) {
                    const int key = (tile_y * across + tile_x) * keys + row * staged + column;
                    const float* from = tiles + static_cast<long long>(key) * size;
                    float values[2][4];
                    load<4>(from, values[0]);
                    load<4>(from + 4, values[1]);
#pragma unroll
                    for (int e = 0; e < 8; ++e) sums[e] += values[e / 4][e % 4];
                });
            });
        }
    float* const to = folded + static_cast<long long>(thread) * 8;
    store<4>(to, sums);
    store<4>(to + 4, sums + 4);
}
