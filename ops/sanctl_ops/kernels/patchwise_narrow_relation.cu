// The relation of patchwise attention in both directions where it has up to four channels, two hidden ones
// and 3 x 3 taps: no products of matrices, which would be mostly zeros. A thread has a pixel at a time.
#include "patchwise.cuh"

constexpr int THREADS = 256;
constexpr int K = 3, RADIUS = 1, TAPS = K * K;
constexpr int WIDE = 2, RELATION = 4;
constexpr int SUMS = 2 * RELATION * WIDE;  // of a tap: times the relation, and times 1

// Channels of a pixel, two in a word.
using Channels = Vector<unsigned, 2>;

template <typename T>
__device__ inline void load_relation(const T* pixel, const Shape& shape, float (&values)[RELATION]) {
    if (shape.relation == RELATION && shape.relation_vector == RELATION)
        return load<RELATION>(pixel, values);
#pragma unroll
    for (int c = 0; c < RELATION; ++c) values[c] = c < shape.relation ? widen(pixel[c]) : 0.0f;
}

// In units; pivots and units are zero for channels that there are not.
template <typename T>
__device__ inline Channels in_units(const T* pixel, const Units& units, const Shape& shape) {
    float x[RELATION];
    load_relation(pixel, shape, x);
#pragma unroll
    for (int c = 0; c < RELATION; ++c) x[c] = (x[c] - units.pivots[c]) * units.units[c];
    return {pack_units(x[0], x[1]), pack_units(x[2], x[3])};
}

template <typename T>
__device__ inline void stage_keys(Channels* to, const T* key, const Units& units, const Shape& shape,
                                  const Tile& tile, int top, int rows) {
    const int columns = tile.columns + 2 * RADIUS;
#pragma unroll 4
    for (int i = threadIdx.x; i < rows * columns; i += blockDim.x) {
        const int y = source<true>(top + i / columns, shape.height);
        const int x = source<true>(tile.left - RADIUS + i % columns, shape.width);
        to[i] = in_units(key + static_cast<long long>(y * shape.width + x) * shape.key_pitch, units,
                         shape);
    }
}

// The relation's factors at one tap: two words for either pair of channels.
__device__ inline Vector<unsigned, 4> factors_of(const Half* affine, int tap) {
    const auto lines = reinterpret_cast<const Vector<unsigned, 4>*>(affine) + tap * 4;
    return {lines[0].at[0], lines[0].at[1], lines[1].at[0], lines[1].at[1]};
}

// A tap's part of the first convolution, or of its transpose, for either hidden channel.
struct Weights {
    Vector<float, RELATION> of[WIDE];
};

// Adds one tap's share of both hidden channels.
__device__ inline void add_tap(const Channels& x, const Vector<unsigned, 4>& factors,
                               const Weights& weights, float (&sums)[WIDE]) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
        const unsigned z =
            fma_relu_halves(factors.at[2 * pair], x.at[pair], factors.at[2 * pair + 1]);
        const float first = to_float(Half{static_cast<unsigned short>(z)});
        const float next = to_float(Half{static_cast<unsigned short>(z >> 16)});
#pragma unroll
        for (int w = 0; w < WIDE; ++w)
            sums[w] += first * weights.of[w].at[2 * pair] + next * weights.of[w].at[2 * pair + 1];
    }
}

// A block computes the hidden values of a tile.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    patchwise_hidden_narrow(const T* query, const T* key, const float* units, const Half* affine,
                            const float* weight, float* hidden, Shape shape) {
    extern __shared__ double shared[];
    auto factors = reinterpret_cast<Vector<unsigned, 4>*>(shared);
    auto weights = reinterpret_cast<Weights*>(factors + TAPS + 1);
    auto staged = reinterpret_cast<Channels*>(weights + TAPS + 1);
    const Tile tile(shape, blockIdx.x);
    const long long before = static_cast<long long>(tile.n) * shape.pixels();
    const int columns = tile.columns + 2 * RADIUS;
    for (int tap = threadIdx.x; tap <= TAPS; tap += blockDim.x)
        factors[tap] = factors_of(affine, tap);
    for (int i = threadIdx.x; i < (TAPS + 1) * RELATION * WIDE; i += blockDim.x) {
        const int tap = i / (RELATION * WIDE), w = i / RELATION % WIDE, c = i % RELATION;
        const int number = tap == TAPS ? c : shape.relation + c * TAPS + tap;
        weights[tap].of[w].at[c] = c < shape.relation && w < shape.hidden
                                       ? weight[w * shape.relation * (TAPS + 1) + number]
                                       : 0;
    }
    stage_keys(staged, key + before * shape.key_pitch, Units(units, false, 1), shape, tile,
               tile.top - RADIUS, tile.rows + 2 * RADIUS);
    __syncthreads();
    for (int i = threadIdx.x; i < tile.count(); i += blockDim.x) {
        const int pixel = tile.pixel(shape, i), place = tile.place(i, RADIUS);
        float sums[WIDE] = {};
        add_tap(in_units(query + (before + pixel) * shape.query_pitch, Units(units, true, 1), shape),
                factors[TAPS], weights[TAPS], sums);
#pragma unroll
        for (int tap = 0; tap < TAPS; ++tap) {
            const int window = place + (tap / K - RADIUS) * columns + tap % K - RADIUS;
            add_tap(staged[window], factors[tap], weights[tap], sums);
        }
        float* to = hidden + (before + pixel) * shape.hidden;
        to[0] = sums[0];
        if (shape.hidden == WIDE) to[1] = sums[1];
    }
}

// The relation's signs and thresholds, and the first convolution's transpose, of one tap.
struct Turned {
    Vector<unsigned, 4> factors;
    Weights weights;

    // Adds to the gradient of a pixel's relation what comes from a window's hidden gradient.
    __device__ void add(const Channels& x, unsigned gradient, float (&sums)[RELATION]) const {
        const float one = to_float(Half{static_cast<unsigned short>(gradient)});
        const float next = to_float(Half{static_cast<unsigned short>(gradient >> 16)});
        const auto &first = weights.of[0], &second = weights.of[1];
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            const unsigned kept =
                fma_relu_halves(factors.at[2 * pair], x.at[pair], factors.at[2 * pair + 1]);
            const int c = 2 * pair;
            add_where(kept, one * first.at[c] + next * second.at[c],
                      one * first.at[c + 1] + next * second.at[c + 1], sums[c], sums[c + 1]);
        }
    }
};

// Writes a pixel's gradient; the relation is x, and steady[c] + tilt[c] * (x - pivot) is taken back.
template <typename T>
__device__ inline void write_gradient(T* to, const T* from, const float (&sums)[RELATION],
                                      float inverse, const Units& units, const float* steady,
                                      const float* tilt, const Shape& shape) {
    float x[RELATION];
    load_relation(from, shape, x);
#pragma unroll
    for (int c = 0; c < RELATION; ++c) {
        if (c >= shape.relation) continue;
        x[c] = sums[c] * units.units[c] * inverse -
               (steady ? steady[c] + tilt[c] * (x[c] - units.pivots[c]) : 0);
    }
    if (shape.relation == RELATION) return store<RELATION>(to, x);
    for (int c = 0; c < shape.relation; ++c) to[c] = narrow<T>(x[c]);
}

// As patchwise_relation_gradient; a block computes a tile, and `gradient` has two channels. What lies
// beyond the image mirrors pixels one away from its border, which gather for it, too.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    patchwise_relation_gradient_narrow(const T* query, const T* key, const float* units,
                                       const Half* affine, const Half* turned, const Half* gradient,
                                       const float* scales, const float* taken, T* out_query, T* out,
                                       Shape shape, int closed) {
    extern __shared__ double shared[];
    Turned* taps = reinterpret_cast<Turned*>(shared);
    unsigned* staged = reinterpret_cast<unsigned*>(taps + TAPS + 1);
    const Tile tile(shape, blockIdx.x);
    const int plane = shape.pixels(), columns = tile.columns + 2 * RADIUS;
    const long long before = static_cast<long long>(tile.n) * plane;
    const auto gradients = reinterpret_cast<const unsigned*>(gradient) + before;
    for (int tap = threadIdx.x; tap <= TAPS; tap += blockDim.x) {
        taps[tap].factors = factors_of(affine, tap);
#pragma unroll
        for (int c = 0; c < RELATION; ++c) {
            const Half* pair = turned + (tap * 64 + c * 4) * 2;
            taps[tap].weights.of[0].at[c] = to_float(pair[0]);
            taps[tap].weights.of[1].at[c] = to_float(pair[1]);
        }
    }
    for (int i = threadIdx.x; i < (tile.rows + 2 * RADIUS) * columns; i += blockDim.x) {
        const int y = source<false>(tile.top - RADIUS + i / columns, shape.height);
        const int x = source<false>(tile.left - RADIUS + i % columns, shape.width);
        staged[i] = y >= 0 && x >= 0 ? gradients[y * shape.width + x] : 0;
    }
    __syncthreads();
    const Units of_key(units, false, 1), of_query(units, true, 1);
    const float inverse = scales[1];
    const float* none = nullptr;
    for (int i = threadIdx.x; i < tile.count(); i += blockDim.x) {
        const int pixel = tile.pixel(shape, i), place = tile.place(i, RADIUS);
        const T* own_key = key + (before + pixel) * shape.key_pitch;
        const Channels x = in_units(own_key, of_key, shape);
        float sums[RELATION] = {};
#pragma unroll
        for (int tap = 0; tap < TAPS; ++tap)
            taps[tap].add(x, staged[place + (RADIUS - tap / K) * columns + RADIUS - tap % K], sums);
        const int own_row = pixel / shape.width, own_column = pixel % shape.width;
#pragma unroll 1
        for (int which = reflects(own_row, own_column, shape, RADIUS) ? 1 : 9; which < 9; ++which) {
            int row, column;
            if (!image<true>(own_row, shape.height, RADIUS, which / 3, row) ||
                !image<true>(own_column, shape.width, RADIUS, which % 3, column))
                continue;
            // The windows that read there have their centres in the image.
            for (int tap = 0; tap < TAPS; ++tap) {
                const int y = row + RADIUS - tap / K, z = column + RADIUS - tap % K;
                if (y >= 0 && y < shape.height && z >= 0 && z < shape.width)
                    taps[tap].add(x, gradients[y * shape.width + z], sums);
            }
        }
        const float* steady = closed ? taken + pixel * shape.relation : none;
        write_gradient(out + (before + pixel) * shape.relation, own_key, sums, inverse, of_key,
                       steady, taken + (plane + pixel) * shape.relation, shape);
        const T* own_query = query + (before + pixel) * shape.query_pitch;
        float alone[RELATION] = {};
        taps[TAPS].add(in_units(own_query, of_query, shape), staged[place], alone);
        const float* of_batch = taken + 2 * plane * shape.relation;
        write_gradient(out_query + (before + pixel) * shape.relation, own_query, alone, inverse,
                       of_query, closed ? of_batch : none, of_batch + shape.relation, shape);
    }
}

// As patchwise_weight_gradient; a block has one row of taps, or (number K of K + 1) the query. A warp's
// sums lie at partials[its number among those of all blocks with its taps * (TAPS + 1) * SUMS].
template <typename T>
__global__ void __launch_bounds__(THREADS, 3)
    patchwise_weight_gradient_narrow(const T* query, const T* key, const float* units,
                                     const Half* affine, const Half* gradient, float* partials,
                                     Shape shape, int blocks) {
    extern __shared__ double shared[];
    Channels* staged = reinterpret_cast<Channels*>(shared);
    const int dy = blockIdx.x % (K + 1), share = blockIdx.x / (K + 1);
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const bool is_query = dy == K;
    Vector<unsigned, 4> factors[K];
#pragma unroll
    for (int dx = 0; dx < K; ++dx) factors[dx] = factors_of(affine, min(dy * K + dx, TAPS));
    float added[K][SUMS] = {};
    for (int number = share; number < shape.images * shape.tiles(); number += blocks) {
        const Tile tile(shape, number);
        const long long before = static_cast<long long>(tile.n) * shape.pixels();
        const int columns = tile.columns + 2 * RADIUS;
        // Those of the pixels that a thread has: loaded with what is staged.
        unsigned slopes[2];
#pragma unroll
        for (int k = 0; k < 2; ++k)
            slopes[k] = reinterpret_cast<const unsigned*>(
                gradient)[before + tile.pixel(shape, threadIdx.x + k * blockDim.x)];
        __syncthreads();
        if (!is_query)
            stage_keys(staged, key + before * shape.key_pitch, Units(units, false, 1), shape, tile,
                       tile.top + dy - RADIUS, tile.rows);
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < tile.count(); i += blockDim.x) {
            const long long pixel = before + tile.pixel(shape, i);
            const float slope[WIDE] = {first_of(slopes[0]), second_of(slopes[0])};
            slopes[0] = slopes[1];
#pragma unroll
            for (int dx = 0; dx < K; ++dx) {
                if (is_query && dx > 0) break;
                const Channels x =
                    is_query ? in_units(query + pixel * shape.query_pitch, Units(units, true, 1), shape)
                             : staged[i / tile.columns * columns + i % tile.columns + dx];
#pragma unroll
                for (int pair = 0; pair < 2; ++pair) {
                    const unsigned ones = above_zero(fma_relu_halves(
                        factors[dx].at[2 * pair], x.at[pair], factors[dx].at[2 * pair + 1]));
                    const unsigned kept = multiply_halves(ones, x.at[pair]);
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int shift = 16 * e, c = pair * 2 + e;
                        const float related =
                            to_float(Half{static_cast<unsigned short>(kept >> shift)});
                        const float one = to_float(Half{static_cast<unsigned short>(ones >> shift)});
#pragma unroll
                        for (int w = 0; w < WIDE; ++w) {
                            added[dx][c * WIDE + w] += related * slope[w];
                            added[dx][SUMS / 2 + c * WIDE + w] += one * slope[w];
                        }
                    }
                }
            }
        }
    }
    partials += (static_cast<long long>(share) * warps + threadIdx.x / 32) * (TAPS + 1) * SUMS;
#pragma unroll
    for (int t = 0; t < K * SUMS; ++t) {
        float sum = added[t / SUMS][t % SUMS];
        for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
        if (lane == t % 32 && (!is_query || t < SUMS)) partials[dy * K * SUMS + t] = sum;
    }
}
