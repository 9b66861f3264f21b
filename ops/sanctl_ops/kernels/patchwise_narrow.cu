// Weighed values, and backward through them, where there are one or two weight channels and 3 x 3 taps: no
// products of matrices, which would be mostly zeros. A thread has two neighbouring pixels with all their
// channels. Values are staged as in patchwise_values.cuh.
#include "patchwise_values.cuh"

constexpr int THREADS = 256;
constexpr int K = 3, RADIUS = 1, TAPS = K * K;
constexpr int WIDE = 2;               // weight channels
constexpr int MOST = 6;               // of values and gradients, as a power of two
constexpr int TERMS = WIDE * 3;       // of a tap: for either weight channel two hidden ones and the bias
constexpr int PIXEL = WIDE * SHARE;   // staged values of a pixel

// Where a pixel's values of weight channel w lie: exchanged among two pixels so that threads read from
// different banks.
__device__ inline int narrow_place(int pixel, int w) {
    return (pixel / 2 * 4 + ((pixel % 2 * 2 + w) ^ (pixel / 4 & 3))) * SHARE;
}

__device__ inline const Vector<unsigned, 4>& staged_values(const Half* staged, int pixel, int w) {
    return *reinterpret_cast<const Vector<unsigned, 4>*>(staged + narrow_place(pixel, w));
}

// All values of a pixel, a word for both weight channels' values number g.
template <typename T>
__device__ inline void load_pixel(unsigned (&pairs)[SHARE], const T* pixel, bool exists,
                                  const Shape& shape) {
    if (exists && shape.value_vector == 8) {
        const auto words = reinterpret_cast<const Vector<unsigned, 4>*>(pixel);
        const Vector<unsigned, 4> halves[2] = {words[0], words[1]};
#pragma unroll
        for (int g = 0; g < SHARE; ++g) pairs[g] = halves[g / 4].at[g % 4];
        return;
    }
#pragma unroll
    for (int g = 0; g < SHARE; ++g) {
        pairs[g] = 0;
        if (!exists || g >= shape.share) continue;
        pairs[g] = pixel[g * shape.hidden].bits;
        if (shape.hidden == WIDE)
            pairs[g] |= static_cast<unsigned>(pixel[g * WIDE + 1].bits) << 16;
    }
}

// The values of either weight channel side by side.
__device__ inline void part(const unsigned (&pairs)[SHARE], Vector<unsigned, 4> (&values)[WIDE]) {
#pragma unroll
    for (int g = 0; g < SHARE; g += 2) {
        values[0].at[g / 2] = __byte_perm(pairs[g], pairs[g + 1], 0x5410);
        values[1].at[g / 2] = __byte_perm(pairs[g], pairs[g + 1], 0x7632);
    }
}

// As stage_values does.
template <typename T, bool REFLECT, int LIMIT>
__device__ inline float stage_pixels(Half* to, float* most, const T* image, int image_pitch,
                                     const Shape& shape, const Tile& tile) {
    const int columns = tile.filled + 2 * RADIUS, pixels = (tile.rows + 2 * RADIUS) * columns;
    unsigned largest = 0;
    for (Walk at(threadIdx.x, blockDim.x, columns); at.place < pixels; at.next()) {
        const int y = source<REFLECT>(tile.top - RADIUS + at.row, shape.height);
        const int x = source<REFLECT>(tile.left - RADIUS + at.column, shape.width);
        const bool exists = y >= 0 && x >= 0;
        unsigned pairs[SHARE];
        Vector<unsigned, 4> values[WIDE];
        load_pixel(pairs, image + static_cast<long long>(y * shape.width + x) * image_pitch, exists,
                   shape);
        part(pairs, values);
#pragma unroll
        for (int w = 0; w < WIDE; ++w) {
            largest = larger_than<T>(largest, values[w]);
            *reinterpret_cast<Vector<unsigned, 4>*>(to + narrow_place(at.place, w)) = values[w];
        }
    }
    float scale, inverse;
    scale_of<LIMIT>(most_of_block<T>(largest, most), scale, inverse);
    for (int i = threadIdx.x; i < pixels * WIDE; i += blockDim.x) {
        auto& values = reinterpret_cast<Vector<unsigned, 4>*>(to)[i];
        Vector<unsigned, 4> converted = values;
#pragma unroll
        for (int e = 0; e < 4; ++e) converted.at[e] = scaled<T>(converted.at[e], scale);
        values = converted;
    }
    return inverse;
}

// The arrays of a block in shared memory.
struct Arrays {
    float *most, *terms;
    Half* values;
    unsigned* hidden;

    __device__ Arrays(void* shared, const Shape& shape)
        : most(static_cast<float*>(shared)), terms(most + 32),
          values(reinterpret_cast<Half*>(terms + 64)) {
        const int rows = (shape.height + shape.down - 1) / shape.down + 2 * RADIUS;
        const int columns = (shape.width + shape.across - 1) / shape.across;
        hidden = reinterpret_cast<unsigned*>(
            values + rows * (columns + columns % 2 + 2 * RADIUS) * PIXEL);
    }

    // The second convolution: terms[tap * TERMS + w * 3] for the hidden channels, and then the bias.
    __device__ void stage_terms(const float* weight, const float* bias, int hidden_channels) const {
        for (int i = threadIdx.x; i < TAPS * TERMS; i += blockDim.x) {
            const int tap = i / TERMS, w = i % TERMS / 3, in = i % 3, row = w * TAPS + tap;
            float term = 0;
            if (w < hidden_channels && in == 2) term = bias[row];
            else if (w < hidden_channels && in < hidden_channels)
                term = weight[row * hidden_channels + in];
            terms[i] = term;
        }
    }

    // The two weights of a pixel with these hidden values, each twice in a word.
    __device__ void make_weights(unsigned pair, int tap, unsigned (&weights)[WIDE]) const {
        const float first = first_of<Half>(pair), second = second_of<Half>(pair);
#pragma unroll
        for (int w = 0; w < WIDE; ++w) {
            const float* of_weight = terms + tap * TERMS + w * 3;
            const float sum = of_weight[0] * first + of_weight[1] * second + of_weight[2];
            weights[w] = pack<Half>(sum, sum);
        }
    }
};

using Sums = unsigned[WIDE][SHARE / 2];

__device__ inline void add_weighed(Sums& sums, const unsigned (&weights)[WIDE],
                                   const Vector<unsigned, 4> (&values)[WIDE]) {
#pragma unroll
    for (int w = 0; w < WIDE; ++w)
#pragma unroll
        for (int g = 0; g < SHARE / 2; ++g)
            sums[w][g] = fma_halves(weights[w], values[w].at[g], sums[w][g]);
}

// Writes a pixel's sums times `factor`.
template <typename T>
__device__ inline void write_pixel(const Sums& sums, float factor, T* pixel, const Shape& shape) {
    float held[WIDE][SHARE];
#pragma unroll
    for (int g = 0; g < SHARE; ++g)
#pragma unroll
        for (int w = 0; w < WIDE; ++w)
            held[w][g] = g % 2 == 0 ? first_of<Half>(sums[w][g / 2]) : second_of<Half>(sums[w][g / 2]);
    if (shape.hidden != WIDE || shape.share != SHARE)
        return write_values(held, factor, pixel, 0, shape);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        Vector<unsigned, 4> words;
#pragma unroll
        for (int g = 0; g < 4; ++g)
            words.at[g] = pack<T>(held[0][half * 4 + g] * factor, held[1][half * 4 + g] * factor);
        reinterpret_cast<Vector<unsigned, 4>*>(pixel)[half] = words;
    }
}

// A block computes the values of a tile. `rectified` has two channels; `out` is dense.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    patchwise_attend_narrow(const T* value, const Half* rectified, const float* weight,
                            const float* bias, T* out, Shape shape) {
    extern __shared__ double shared[];
    const Arrays arrays(shared, shape);
    const Tile tile(shape, blockIdx.x, true);
    const long long before = static_cast<long long>(tile.n) * shape.pixels();
    const auto hidden = reinterpret_cast<const unsigned*>(rectified) + before;
    arrays.stage_terms(weight, bias, shape.hidden);
    const float factor =
        stage_pixels<T, true, -2>(arrays.values, arrays.most, value + before * shape.value_pitch,
                                  shape.value_pitch, shape, tile);
    __syncthreads();
    const int i = threadIdx.x * 2, columns = tile.filled + 2 * RADIUS;
    if (i >= tile.count()) return;
    const unsigned own[2] = {hidden[tile.pixel(shape, i)], hidden[tile.pixel(shape, i + 1)]};
    const int corner = tile.place(i, RADIUS) - RADIUS * columns - RADIUS;
    Sums sums[2] = {};
#pragma unroll
    for (int dy = 0; dy < K; ++dy)
#pragma unroll
        for (int k = 0; k <= K; ++k) {
            const int place = corner + dy * columns + k;
            const Vector<unsigned, 4> values[WIDE] = {staged_values(arrays.values, place, 0),
                                                      staged_values(arrays.values, place, 1)};
#pragma unroll
            for (int next = 0; next < 2; ++next) {
                const int dx = k - next;
                if (dx < 0 || dx >= K) continue;
                unsigned weights[WIDE];
                arrays.make_weights(own[next], dy * K + dx, weights);
                add_weighed(sums[next], weights, values);
            }
        }
#pragma unroll
    for (int next = 0; next < 2; ++next)
        if (tile.exists(i + next))
            write_pixel(sums[next], factor,
                        out + (before + tile.pixel(shape, i + next)) * shape.hidden * shape.share,
                        shape);
}

// Adds what the windows read that have their centres around staged place `place`, by tap (dy, dx).
__device__ inline void gather(const Arrays& arrays, int place, int columns, int dy, int dx,
                              Sums& sums) {
    const int window = place + (RADIUS - dy) * columns + RADIUS - dx;
    unsigned weights[WIDE];
    arrays.make_weights(arrays.hidden[window], dy * K + dx, weights);
    const Vector<unsigned, 4> values[WIDE] = {staged_values(arrays.values, window, 0),
                                              staged_values(arrays.values, window, 1)};
    add_weighed(sums, weights, values);
}

// A block computes the gradient of a tile's values. What lies beyond the image mirrors pixels one away
// from its border, which gather for it, too.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    patchwise_value_gradient_narrow(const T* grad, const Half* rectified, const float* weight,
                                    const float* bias, T* out, Shape shape) {
    extern __shared__ double shared[];
    const Arrays arrays(shared, shape);
    const Tile tile(shape, blockIdx.x, true);
    const long long before = static_cast<long long>(tile.n) * shape.pixels();
    const auto hidden = reinterpret_cast<const unsigned*>(rectified) + before;
    const int columns = tile.filled + 2 * RADIUS, i = threadIdx.x * 2;
    arrays.stage_terms(weight, bias, shape.hidden);
    for (int p = threadIdx.x; p < (tile.rows + 2 * RADIUS) * columns; p += blockDim.x) {
        const int y = source<false>(tile.top - RADIUS + p / columns, shape.height);
        const int x = source<false>(tile.left - RADIUS + p % columns, shape.width);
        arrays.hidden[p] = y >= 0 && x >= 0 ? hidden[y * shape.width + x] : 0;
    }
    const float factor =
        stage_pixels<T, false, -2>(arrays.values, arrays.most, grad + before * shape.grad_pitch,
                                   shape.grad_pitch, shape, tile);
    __syncthreads();
    if (i >= tile.count()) return;
    Sums sums[2] = {};
    const int own = tile.place(i, RADIUS);
#pragma unroll
    for (int dy = 0; dy < K; ++dy)
#pragma unroll
        for (int dx = 0; dx < K; ++dx) {
            gather(arrays, own, columns, dy, dx, sums[0]);
            gather(arrays, own + 1, columns, dy, dx, sums[1]);
        }
#pragma unroll
    for (int next = 0; next < 2; ++next) {
        if (!tile.exists(i + next)) continue;
        const int y = tile.top + i / tile.filled, x = tile.left + i % tile.filled + next;
#pragma unroll 1
        for (int which = reflects(y, x, shape, RADIUS) ? 1 : 9; which < 9; ++which) {
            int row, column;
            if (!image<true>(y, shape.height, RADIUS, which / 3, row) ||
                !image<true>(x, shape.width, RADIUS, which % 3, column))
                continue;
            const int place = (row - tile.top + RADIUS) * columns + column - tile.left + RADIUS;
            // The windows that read there have their centres at the border.
            for (int dy = 0; dy < K; ++dy)
                for (int dx = 0; dx < K; ++dx) {
                    const int above = row + RADIUS - dy, beside = column + RADIUS - dx;
                    if (above >= 0 && above < shape.height && beside >= 0 && beside < shape.width)
                        gather(arrays, place, columns, dy, dx, sums[next]);
                }
        }
        write_pixel(sums[next], factor,
                    out + (before + tile.pixel(shape, i + next)) * shape.hidden * shape.share, shape);
    }
}

// A block takes the tiles blockIdx.x, that plus `blocks`, and so on. A warp's sums for the second
// convolution lie at partials[its number * TAPS * TERMS], in the order of Arrays::stage_terms.
template <typename T>
__global__ void __launch_bounds__(THREADS, 2)
    patchwise_slopes_narrow(const T* grad, const T* value, const Half* rectified,
                            const float* weight, const float* bias, float* gradients,
                            float* partials, Shape shape, int blocks) {
    extern __shared__ double shared[];
    const Arrays arrays(shared, shape);
    const int i = threadIdx.x * 2, lane = threadIdx.x % 32;
    arrays.stage_terms(weight, bias, shape.hidden);
    float added[TAPS][TERMS] = {};
    for (int number = blockIdx.x; number < shape.images * shape.tiles(); number += blocks) {
        const Tile tile(shape, number, true);
        const long long before = static_cast<long long>(tile.n) * shape.pixels();
        const int columns = tile.filled + 2 * RADIUS;
        __syncthreads();
        float factor = stage_pixels<T, true, MOST>(arrays.values, arrays.most,
                                                   value + before * shape.value_pitch,
                                                   shape.value_pitch, shape, tile);
        unsigned pairs[SHARE], most = 0;
#pragma unroll 1
        for (int next = 0; next < 2; ++next) {
            load_pixel(pairs, grad + (before + tile.pixel(shape, i + next)) * shape.grad_pitch,
                       tile.exists(i + next), shape);
#pragma unroll
            for (int g = 0; g < SHARE; ++g) most = larger<T>(most, pairs[g] & 0x7fff7fff);
        }
        float scale, inverse;
        scale_of<MOST>(most_of_block<T>(most, arrays.most), scale, inverse);
        factor *= inverse;
        const int corner = tile.place(i, RADIUS) - RADIUS * columns - RADIUS;
#pragma unroll 1
        for (int next = 0; next < 2; ++next) {
            const int pixel = tile.pixel(shape, i + next);
            load_pixel(pairs, grad + (before + pixel) * shape.grad_pitch, tile.exists(i + next),
                       shape);
            const unsigned own = reinterpret_cast<const unsigned*>(rectified)[before + pixel];
            const float hidden[2] = {first_of<Half>(own), second_of<Half>(own)};
            Vector<unsigned, 4> slopes[WIDE];
#pragma unroll
            for (int g = 0; g < SHARE; ++g) pairs[g] = scaled<T>(pairs[g], scale);
            part(pairs, slopes);
            float sums[2] = {};
#pragma unroll
            for (int tap = 0; tap < TAPS; ++tap) {
                const int place = corner + tap / K * columns + tap % K + next;
#pragma unroll
                for (int w = 0; w < WIDE; ++w) {
                    const auto values = staged_values(arrays.values, place, w);
                    unsigned products = multiply_halves(slopes[w].at[0], values.at[0]);
#pragma unroll
                    for (int g = 1; g < SHARE / 2; ++g)
                        products = fma_halves(slopes[w].at[g], values.at[g], products);
                    const float slope =
                        (first_of<Half>(products) + second_of<Half>(products)) * factor;
#pragma unroll
                    for (int in = 0; in < 2; ++in) {
                        sums[in] += slope * arrays.terms[tap * TERMS + w * 3 + in];
                        added[tap][w * 3 + in] += slope * hidden[in];
                    }
                    added[tap][w * 3 + 2] += slope;
                }
            }
            if (!tile.exists(i + next)) continue;
            float* to = gradients + (before + pixel) * shape.hidden;
            to[0] = sums[0];
            if (shape.hidden == WIDE) to[1] = sums[1];
        }
    }
    partials += static_cast<long long>(blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * TAPS * TERMS;
#pragma unroll
    for (int t = 0; t < TAPS * TERMS; ++t) {
        float sum = added[t / TERMS][t % TERMS];
        for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
        if (lane == t % 32) partials[t] = sum;
    }
}
