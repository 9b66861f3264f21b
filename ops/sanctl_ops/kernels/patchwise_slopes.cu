// Backward through the values' sums: the slopes of the weights exist in registers and, for one row of
// taps, in shared memory. From them come the gradients of rectified hidden values and of the second
// convolution.
#include "patchwise_values.cuh"

constexpr int THREADS = 256;
constexpr int MOST = 6;  // of values and gradients, as a power of two: 8 products of them fit halves

// Pixels that the largest tile's products have.
__device__ inline int most_pixels(const Shape& shape) {
    const int rows = (shape.height + shape.down - 1) / shape.down;
    const int columns = (shape.width + shape.across - 1) / shape.across;
    return (rows * (columns + columns % 2) + PIXELS - 1) / PIXELS * PIXELS;
}

// Products that a warp makes in turn.
template <int WT>
constexpr int TOGETHER = WT == 8 ? 1 : 2;

// Products of 16 rows that a tap's part of the second convolution's gradient takes: hidden channels,
// and a row of ones for the bias, which for 8 channels fits in beside them.
template <int WT>
constexpr int ROWS_OF_SECOND = WT == 1 ? 1 : WT / 2 + 1;

// The gradients of the values that a lane has: of two pixels and two weight channels.
using Gradients = unsigned[2][2][SHARE / 2];

// Those of one pixel as they are; zeros where there are none. `channel` is the first weight channel.
template <typename T>
__device__ inline void load_gradients(pair_t<T> (&pairs)[SHARE], const T* pixel, int channel,
                                      bool exists, const Shape& shape) {
    const int count = exists ? shape.hidden - channel : 0;
#pragma unroll
    for (int g = 0; g < SHARE; ++g) {
        const T* from = pixel + g * shape.hidden + channel;
        pairs[g] = pair_t<T>{};
        if (count <= 0 || g >= shape.share) continue;
        pairs[g] = shape.value_vector > 1 ? *reinterpret_cast<const pair_t<T>*>(from)
                                          : load_pair(from, count);
    }
}

// The same as scaled halves, the values that share a weight side by side.
template <typename T>
__device__ inline void turn(const pair_t<T> (&pairs)[SHARE], float scale,
                            unsigned (&gradients)[2][SHARE / 2]) {
#pragma unroll
    for (int g = 0; g < SHARE; g += 2) {
        const unsigned one = scaled<T>(pairs[g], scale), next = scaled<T>(pairs[g + 1], scale);
        gradients[0][g / 2] = __byte_perm(one, next, 0x5410);
        gradients[1][g / 2] = __byte_perm(one, next, 0x7632);
    }
}

// Two slopes of one pixel and tap, of two weight channels: sums over the values that share them.
__device__ inline unsigned slopes_of(const unsigned (&gradients)[2][SHARE / 2],
                                     const Vector<unsigned, 4> (&values)[2]) {
    unsigned sums[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        sums[e] = multiply_halves(gradients[e][0], values[e].at[0]);
#pragma unroll
        for (int g = 1; g < SHARE / 2; ++g)
            sums[e] = fma_halves(gradients[e][g], values[e].at[g], sums[e]);
    }
    return add_halves(__byte_perm(sums[0], sums[1], 0x5410),
                      __byte_perm(sums[0], sums[1], 0x7632));
}

// Hands the slopes of K taps of a row to take(k, of the first pixel, of the second one).
template <int K, typename Take>
__device__ inline void visit_slopes(const Row& row, const Gradients& gradients, Take take) {
    unsigned before = 0;
#pragma unroll
    for (int k = 0; k <= K; ++k) {
        const Vector<unsigned, 4> values[2] = {row.read(k, 0), row.read(k, 1)};
        if (k > 0) take(k - 1, before, slopes_of(gradients[1], values));
        if (k < K) before = slopes_of(gradients[0], values);
    }
}

// sums += (rectified hidden values, and ones)^T * slopes of one tap, over 16 pixels of a tile.
template <int WT>
__device__ inline void add_product(const Half* hidden, const Half* slopes, int lane,
                                   float (&sums)[ROWS_OF_SECOND<WT>][4]) {
    const unsigned ones = lane < 4 ? 0x3c003c00 : 0;
    unsigned a[4], b[4];
    const unsigned of_slopes = shared_address(slopes + lane % 16 * CHANNELS);
    if constexpr (WT == 1) {
        load_matrices<true>(
            lane < 16 ? shared_address(hidden + lane * HIDDEN_PITCH<WT>) : of_slopes, a);
        Mma<Half>::k16(sums[0], a[0], ones, a[1], ones, a[2], a[3]);
    } else {
        load_matrices<true>(of_slopes, b);
        const Half* row = hidden + (lane % 8 + lane / 16 * 8) * HIDDEN_PITCH<WT> + lane / 8 % 2 * 8;
#pragma unroll
        for (int r = 0; r < WT / 2; ++r) {
            load_matrices<true>(shared_address(row + r * PIXELS), a);
            Mma<Half>::k16(sums[r], a[0], a[1], a[2], a[3], b[0], b[1]);
        }
        Mma<Half>::k16(sums[WT / 2], ones, 0, ones, 0, b[0], b[1]);
    }
}

// The arrays of a block in shared memory.
template <int WT>
struct Arrays {
    float* most;
    Half *values, *slopes, *hidden;
    int pixels;

    __device__ Arrays(void* shared, const Shape& shape, int K)
        : most(static_cast<float*>(shared)), values(reinterpret_cast<Half*>(most + 32)),
          pixels(most_pixels(shape)) {
        const int rows = (shape.height + shape.down - 1) / shape.down + K - 1;
        const int columns = (shape.width + shape.across - 1) / shape.across;
        slopes = values + rows * (columns + columns % 2 + K - 1) * VALUES;
        hidden = slopes + K * pixels * CHANNELS;
    }
};

// Stages rectified hidden values as the rows of products.
template <int WT>
__device__ inline void stage_rows(const Arrays<WT>& arrays, const Half* rectified,
                                  const Shape& shape, const Tile& tile) {
#pragma unroll 4
    for (int i = threadIdx.x; i < arrays.pixels * WT; i += blockDim.x) {
        const int row = i / WT, chunk = i % WT * 8;
        *reinterpret_cast<Vector<unsigned, 4>*>(arrays.hidden + row * HIDDEN_PITCH<WT> + chunk) =
            *reinterpret_cast<const Vector<unsigned, 4>*>(
                rectified + tile.pixel(shape, in_pairs(row)) * WT * CHANNELS + chunk);
    }
}

// Adds one row of taps to the second convolution's sums: a warp takes a tap at a time.
template <int K, int WT>
__device__ inline void add_products(const Arrays<WT>& arrays, float* partials, float factor,
                                    bool anew) {
    constexpr int R = ROWS_OF_SECOND<WT>;
    const int lane = threadIdx.x % 32;
    for (int dx = threadIdx.x / 32; dx < K; dx += blockDim.x / 32) {
        float sums[R][4] = {};
        for (int s = 0; s < arrays.pixels; s += PIXELS)
            add_product<WT>(arrays.hidden + s * HIDDEN_PITCH<WT>,
                            arrays.slopes + (dx * arrays.pixels + s) * CHANNELS, lane, sums);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            auto& kept = reinterpret_cast<Vector<float, 4>*>(partials)[(dx * R + r) * 32 + lane];
            Vector<float, 4> total = anew ? Vector<float, 4>{} : kept;
#pragma unroll
            for (int e = 0; e < 4; ++e) total.at[e] += sums[r][e] * factor;
            kept = total;
        }
    }
}

// A block takes the tiles blockIdx.x / WT, that plus `blocks`, and so on, of 8 weight channels. Its sums
// for the second convolution lie at partials[blockIdx.x * K * K * ROWS_OF_SECOND * 128].
template <typename T, int K, int WT>
__global__ void __launch_bounds__(THREADS, 2)
    patchwise_slopes(const T* grad, const T* value, const Half* rectified, const Half* turned,
                     float* gradients, float* partials, Shape shape, int blocks) {
    constexpr int RADIUS = K / 2, M = TOGETHER<WT>, R = ROWS_OF_SECOND<WT>;
    extern __shared__ double shared[];
    const Arrays<WT> arrays(shared, shape, K);
    const int part = blockIdx.x % WT, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    turned += part * K * K * 32 * WT * 2;
    partials += static_cast<long long>(blockIdx.x) * K * K * R * 128;
    gradients += static_cast<long long>(part) * shape.images * shape.pixels() * shape.hidden;
    for (int number = blockIdx.x / WT; number < shape.images * shape.tiles(); number += blocks) {
        const Tile tile(shape, number, true);
        const long long before = static_cast<long long>(tile.n) * shape.pixels();
        const int columns = tile.filled + 2 * RADIUS;
        // Loaded with what is staged.
        pair_t<T> own[M][2][SHARE];
#pragma unroll
        for (int j = 0; j < 2 * M; ++j) {
            const int i = (warp * M + j / 2) * PIXELS + lane / 4 * 2 + j % 2;
            auto& pairs = own[j / 2][j % 2];
            load_gradients(pairs, grad + (before + tile.pixel(shape, i)) * shape.grad_pitch,
                           part * CHANNELS + lane % 4 * 2, tile.exists(i), shape);
        }
        __syncthreads();
        float factor = stage_values<T, true, MOST>(
            arrays.values, arrays.most, value + before * shape.value_pitch, shape.value_pitch, shape,
            tile, RADIUS, part * CHANNELS);
        stage_rows(arrays, rectified + before * WT * CHANNELS, shape, tile);
        Largest<T> largest;
#pragma unroll
        for (int k = 0; k < 2 * M * SHARE; ++k)
            largest.add(own[k / SHARE / 2][k / SHARE % 2][k % SHARE]);
        float scale, inverse;
        scale_of<MOST>(most_of_block(largest.value(), arrays.most), scale, inverse);
        factor *= inverse;
        Gradients held[M];
#pragma unroll
        for (int j = 0; j < 2 * M; ++j) turn<T>(own[j / 2][j % 2], scale, held[j / 2][j % 2]);
        float sums[M][WT][4] = {};
#pragma unroll 1
        for (int dy = 0; dy < K; ++dy) {
#pragma unroll
            for (int m = 0; m < M; ++m) {
                const int product = warp * M + m;
                if (product * PIXELS >= arrays.pixels) break;
                const int corner = tile.place(product * PIXELS + lane / 4 * 2, RADIUS) +
                                   (dy - RADIUS) * columns - RADIUS;
                Half* to = arrays.slopes + (product * PIXELS + lane / 4) * CHANNELS + lane % 4 * 2;
                const auto take = [&](int dx, unsigned first, unsigned next) {
                    const auto b = fragment<WT>(turned, dy * K + dx, lane);
#pragma unroll
                    for (int w = 0; w < WT; ++w) Mma<Half>::k8(sums[m][w], first, next, b.at[w]);
                    Half* place = to + dx * arrays.pixels * CHANNELS;
                    *reinterpret_cast<unsigned*>(place) = first;
                    *reinterpret_cast<unsigned*>(place + 8 * CHANNELS) = next;
                };
                visit_slopes<K>(Row(arrays.values, corner, lane), held[m], take);
            }
            __syncthreads();
            add_products<K, WT>(arrays, partials + dy * K * R * 128, factor, number < blocks);
            __syncthreads();
        }
#pragma unroll
        for (int j = 0; j < 2 * M; ++j) {
            const int i = (warp * M + j / 2) * PIXELS + lane / 4 * 2 + j % 2;
            if (!tile.exists(i)) continue;
            float* to = gradients + (before + tile.pixel(shape, i)) * shape.hidden;
#pragma unroll
            for (int k = 0; k < 2 * WT; ++k) {
                const int channel = k / 2 * CHANNELS + lane % 4 * 2 + k % 2;
                if (channel < shape.hidden)
                    to[channel] = sums[j / 2][k / 2][j % 2 * 2 + k % 2] * factor;
            }
        }
    }
}
