// What the first convolution's gradient, and those of the normalisation before it, are made of: sums
// over pixels of the hidden values' gradients times the relation (in units) and times 1, both where the
// relation is above zero. The relation exists in registers only.
#include "patchwise.cuh"

constexpr int KEY_PITCH = PIXELS + 8;  // of staged pixels with 16 channels
constexpr int TILES_AT_ONCE = 16;      // whose sums are kept in registers: tensor cores round downwards

// Blocks of 7 warps that a multiprocessor is to hold, RESIDENT in patchwise_relations.py.
template <int WT>
constexpr int RESIDENT = WT <= 2 ? 4 : WT == 4 ? 3 : 2;

// Sums of 16 channels of the relation at one tap: times the relation, and times 1.
template <int WT>
struct Sums {
    float related[WT][4], plain[WT][4];

    __device__ void clear() {
#pragma unroll
        for (int w = 0; w < WT; ++w)
#pragma unroll
            for (int e = 0; e < 4; ++e) related[w][e] = plain[w][e] = 0;
    }

    // Adds 16 pixels. `row` addresses this lane's row of the relation, `gradient` that of the gradients.
    __device__ void add(unsigned row, unsigned gradient, const unsigned (&line)[4]) {
        unsigned x[4], ones[4];
        load_matrices<true>(row, x);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            ones[i] = above_zero(fma_relu_halves(line[i % 2 * 2], x[i], line[i % 2 * 2 + 1]));
            x[i] = multiply_halves(ones[i], x[i]);
        }
#pragma unroll
        for (int w = 0; w < WT; w += 2) {
            unsigned b[4];
            load_matrices<true>(gradient + w * CHANNELS * sizeof(Half), b);
#pragma unroll
            for (int v = 0; v < (WT == 1 ? 1 : 2); ++v) {
                Mma<Half>::k16(related[w + v], x[0], x[1], x[2], x[3], b[2 * v], b[2 * v + 1]);
                Mma<Half>::k16(plain[w + v], ones[0], ones[1], ones[2], ones[3], b[2 * v],
                               b[2 * v + 1]);
            }
        }
    }

    // Adds all of them, or writes them for the first time, and clears them.
    __device__ void flush(float* to, int lane, bool anew) {
#pragma unroll
        for (int w = 0; w < 2 * WT; ++w) {
            auto& kept = reinterpret_cast<Vector<float, 4>*>(to)[w * 32 + lane];
            Vector<float, 4> total = anew ? Vector<float, 4>{} : kept;
#pragma unroll
            for (int e = 0; e < 4; ++e) total.at[e] += w < WT ? related[w][e] : plain[w - WT][e];
            kept = total;
        }
        clear();
    }
};

// The relation's factors of channels l / 4 and l / 4 + 8, each twice in a word.
__device__ inline void load_line(const Half* affine, int number, int lane, unsigned (&line)[4]) {
    const auto pairs =
        reinterpret_cast<const Vector<unsigned, 4>*>(affine)[number * 4 + lane / 4 % 8 / 2];
    const unsigned which = lane / 4 % 2 == 0 ? 0x1010 : 0x3232;
#pragma unroll
    for (int i = 0; i < 4; ++i) line[i] = __byte_perm(pairs.at[i], 0, which);
}

// A block has one row of taps, a tap for each of its K warps, and 16 channels of the key, or of the query
// (QUERY), whose pixels the warps share. It takes the tiles `number`, that plus `blocks`, and so on, and
// writes its sums (a warp's, of the query) to partials[(number * taps + tap) * tiles + channels / 16].
template <typename T, int K, int WT, bool QUERY>
__global__ void __launch_bounds__(K * 32, RESIDENT<WT>)
    patchwise_weight_gradient(const T* image, const float* units, const Half* affine,
                              const Half* gradient, float* partials, Shape shape, int blocks) {
    constexpr int RADIUS = QUERY ? 0 : K / 2, WIDTH = WT * CHANNELS;
    extern __shared__ double shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tiles = shape.relation_tiles;
    const int channels = blockIdx.x % tiles, rest = blockIdx.x / tiles;
    const int dy = QUERY ? 0 : rest % K, share = QUERY ? rest : rest / K;
    const int pitch = QUERY ? shape.query_pitch : shape.key_pitch;
    const int tap = QUERY ? K * K : dy * K + warp;
    const int most_columns = (shape.width + shape.across - 1) / shape.across;
    const int most_rows = (shape.height + shape.down - 1) / shape.down;
    const int pixels = (most_rows * most_columns + PIXELS - 1) / PIXELS * PIXELS;
    Half* staged = reinterpret_cast<Half*>(shared);
    Half* gradients = staged + most_rows * (most_columns + 2 * RADIUS) * KEY_PITCH;
    int* places = reinterpret_cast<int*>(gradients + pixels * HIDDEN_PITCH<WT>);
    unsigned line[4];
    load_line(affine, tap * tiles + channels, lane, line);
    partials += static_cast<long long>(((QUERY ? share * K + warp : share * K * K + tap) * tiles +
                                        channels)) * 2 * WT * 128;
    const unsigned of_gradient = shared_address(
        gradients + lane % 16 * HIDDEN_PITCH<WT> + (WT == 1 ? 0 : lane / 16 * CHANNELS));
    // This lane's row of the transposed matrices: a pixel, and 8 channels of it.
    const int own = lane % 8 + lane / 16 * 8;
    const unsigned of_relation =
        shared_address(staged + lane / 8 % 2 * 8 + (QUERY ? 0 : warp * KEY_PITCH));
    Sums<WT> sums;
    sums.clear();
    int taken = 0;
    bool anew = true;
    for (int number = share; number < shape.images * shape.tiles(); number += blocks) {
        const Tile tile(shape, number);
        const long long before = static_cast<long long>(tile.n) * shape.pixels();
        const int columns = tile.columns + 2 * RADIUS;
        __syncthreads();
        stage_relation(staged, KEY_PITCH, image + before * pitch, pitch, Units(units, QUERY, tiles),
                       shape, tile.top + dy - RADIUS, tile.left - RADIUS, tile.rows, columns,
                       channels * PIXELS, 2);
#pragma unroll 4
        for (int i = threadIdx.x; i < pixels * WT; i += blockDim.x) {
            const int pixel = i / WT, chunk = i % WT * 8;
            Vector<unsigned, 4> values{};
            if (pixel < tile.count())
                values = *reinterpret_cast<const Vector<unsigned, 4>*>(
                    gradient + (before + tile.pixel(shape, pixel)) * WIDTH + chunk);
            *reinterpret_cast<Vector<unsigned, 4>*>(gradients + pixel * HIDDEN_PITCH<WT> + chunk) =
                values;
        }
        for (int i = threadIdx.x; i < pixels; i += blockDim.x) {
            const int pixel = min(i, tile.count() - 1);
            places[i] = (pixel / tile.columns * columns + pixel % tile.columns) * KEY_PITCH *
                        static_cast<int>(sizeof(Half));
        }
        __syncthreads();
        for (int p = QUERY ? warp * PIXELS : 0; p < pixels; p += QUERY ? K * PIXELS : PIXELS)
            sums.add(of_relation + places[p + own],
                     of_gradient + p * HIDDEN_PITCH<WT> * sizeof(Half), line);
        if (++taken % TILES_AT_ONCE == 0) {
            sums.flush(partials, lane, anew);
            anew = false;
        }
    }
    sums.flush(partials, lane, anew);
}
