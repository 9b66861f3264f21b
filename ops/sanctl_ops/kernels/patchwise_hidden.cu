// The hidden values of patchwise attention: the first convolution, of relations that exist in registers
// only.
#include "patchwise.cuh"

constexpr int THREADS = 256;

// Products that a warp makes at once.
template <int WT>
constexpr int TOGETHER = WT == 8 ? 1 : 2;

// The relation's factors of 16 channels, and their part of the convolution, as a lane holds them. They
// follow each other in memory, and the next ones are loaded while the present ones are used.
template <int WT>
struct Convolution {
    const Vector<unsigned, 4>* lines;
    const Vector<unsigned, 2>* fragments;
    int left;  // that follow
    Vector<unsigned, 4> line;
    Vector<unsigned, 2> weights[WT];

    __device__ Convolution(const Half* affine, const Half* convolution, int count, int lane)
        : lines(reinterpret_cast<const Vector<unsigned, 4>*>(affine) + lane % 4),
          fragments(reinterpret_cast<const Vector<unsigned, 2>*>(convolution) + lane), left(count) {
        load();
    }

    // Adds the share of 16 x TOGETHER pixels, whose relation's rows lie at `rows`.
    __device__ void add(const unsigned (&rows)[TOGETHER<WT>], float (&sums)[TOGETHER<WT>][WT][4]) {
        const auto factors = line;
        Vector<unsigned, 2> b[WT];
#pragma unroll
        for (int w = 0; w < WT; ++w) b[w] = weights[w];
        load();
#pragma unroll
        for (int m = 0; m < TOGETHER<WT>; ++m) {
            unsigned a[4];
            load_matrices<false>(rows[m], a);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                a[i] = fma_relu_halves(factors.at[i / 2 * 2], a[i], factors.at[i / 2 * 2 + 1]);
#pragma unroll
            for (int w = 0; w < WT; ++w)
                Mma<Half>::k16(sums[m][w], a[0], a[1], a[2], a[3], b[w].at[0], b[w].at[1]);
        }
    }

    // The same for all channels of a tap.
    __device__ void add_tap(const unsigned (&rows)[TOGETHER<WT>], int tiles,
                            float (&sums)[TOGETHER<WT>][WT][4]) {
        unsigned own[TOGETHER<WT>];
#pragma unroll
        for (int m = 0; m < TOGETHER<WT>; ++m) own[m] = rows[m];
#pragma unroll 1
        for (int r = 0; r < tiles; ++r) {
            add(own, sums);
#pragma unroll
            for (int m = 0; m < TOGETHER<WT>; ++m) own[m] += PIXELS * sizeof(Half);
        }
    }

  private:
    __device__ void load() {
        if (left == 0) return;
        --left;
        line = *lines;
#pragma unroll
        for (int w = 0; w < WT; ++w) weights[w] = fragments[w * 32];
        lines += 4;
        fragments += WT * 32;
    }
};

// A block computes a tile of an image, all warps at once: first the keys' share, then the query's.
template <typename T, int K, int WT>
__global__ void __launch_bounds__(THREADS, WT <= 2 ? 3 : 2)
    patchwise_hidden(const T* query, const T* key, const float* units, const Half* affine,
                     const Half* weights, float* hidden, Shape shape) {
    constexpr int M = TOGETHER<WT>, RADIUS = K / 2;
    extern __shared__ double shared[];
    Half* staged = reinterpret_cast<Half*>(shared);
    const Tile tile(shape, blockIdx.x);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int tiles = shape.relation_tiles, pitch = tiles * PIXELS + 8;
    const int columns = tile.columns + 2 * RADIUS;
    const long long before = static_cast<long long>(tile.n) * shape.pixels();
    stage_relation(staged, pitch, key + before * shape.key_pitch, shape.key_pitch,
                   Units(units, false, tiles), shape, tile.top - RADIUS, tile.left - RADIUS,
                   tile.rows + 2 * RADIUS, columns, 0, tiles * 2);
    __syncthreads();
    const unsigned start = shared_address(staged + lane / 16 * 8);
    const int first = warp * M * PIXELS + row_of_lane(lane);
    Convolution<WT> convolution(affine, weights, (K * K + 1) * tiles, lane);
    unsigned rows[M];
    float sums[M][WT][4] = {};
#pragma unroll
    for (int m = 0; m < M; ++m)
        rows[m] = start + (tile.place(first + m * PIXELS, RADIUS) - RADIUS * columns - RADIUS) *
                              pitch * static_cast<int>(sizeof(Half));
    for (int dy = 0; dy < K; ++dy) {
        for (int dx = 0; dx < K; ++dx) {
            convolution.add_tap(rows, tiles, sums);
#pragma unroll
            for (int m = 0; m < M; ++m) rows[m] += pitch * sizeof(Half);
        }
#pragma unroll
        for (int m = 0; m < M; ++m) rows[m] += (columns - K) * pitch * sizeof(Half);
    }
    __syncthreads();
    stage_relation(staged, pitch, query + before * shape.query_pitch, shape.query_pitch,
                   Units(units, true, tiles), shape, tile.top, tile.left, tile.rows, tile.columns, 0,
                   tiles * 2);
    __syncthreads();
#pragma unroll
    for (int m = 0; m < M; ++m)
        rows[m] = start + tile.place(first + m * PIXELS, 0) * pitch * sizeof(Half);
    convolution.add_tap(rows, tiles, sums);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = (warp * M + m) * PIXELS + half * 8 + lane / 4;
            if (i >= tile.count()) continue;
            float* to = hidden + (before + tile.pixel(shape, i)) * shape.hidden;
#pragma unroll
            for (int w = 0; w < WT; ++w)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int channel = w * CHANNELS + lane % 4 * 2 + e;
                    if (channel < shape.hidden) to[channel] = sums[m][w][2 * half + e];
                }
        }
}
