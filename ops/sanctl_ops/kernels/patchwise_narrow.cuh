// What kernels of patchwise attention share that serve one or two weight channels and 3 x 3 taps: no
// products of matrices, which would be mostly zeros. A thread has two neighbouring pixels with all their
// channels. Values are staged as in patchwise_values.cuh.
#pragma once

#include "patchwise_values.cuh"

constexpr int THREADS = 256;
constexpr int K = 3, RADIUS = 1, TAPS = K * K;
constexpr int WIDE = 2;               // weight channels
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

// All values of a pixel, a pair for both weight channels' values number g.
template <typename T>
__device__ inline void load_pixel(pair_t<T> (&pairs)[SHARE], const T* pixel, bool exists,
                                  const Shape& shape) {
    if (exists && shape.value_vector == 8) {
        const auto halves = reinterpret_cast<const Vector<pair_t<T>, 4>*>(pixel);
        const Vector<pair_t<T>, 4> both[2] = {halves[0], halves[1]};
#pragma unroll
        for (int g = 0; g < SHARE; ++g) pairs[g] = both[g / 4].at[g % 4];
        return;
    }
#pragma unroll
    for (int g = 0; g < SHARE; ++g)
        pairs[g] = load_pair(pixel + g * shape.hidden,
                             exists && g < shape.share ? shape.hidden : 0);
}

// The values of either weight channel side by side.
__device__ inline void part(const unsigned (&pairs)[SHARE], Vector<unsigned, 4> (&values)[WIDE]) {
#pragma unroll
    for (int g = 0; g < SHARE; g += 2) {
        values[0].at[g / 2] = __byte_perm(pairs[g], pairs[g + 1], 0x5410);
        values[1].at[g / 2] = __byte_perm(pairs[g], pairs[g + 1], 0x7632);
    }
}

// Stages all values of a pixel.
__device__ inline void store_parted(Half* to, int pixel, const unsigned (&pairs)[SHARE]) {
    Vector<unsigned, 4> values[WIDE];
    part(pairs, values);
#pragma unroll
    for (int w = 0; w < WIDE; ++w)
        *reinterpret_cast<Vector<unsigned, 4>*>(to + narrow_place(pixel, w)) = values[w];
}

// As stage_values does.
template <typename T, bool REFLECT, int LIMIT>
__device__ inline float stage_pixels(Half* to, float* most, const T* image, int image_pitch,
                                     const Shape& shape, const Tile& tile) {
    constexpr bool FITS = sizeof(T) == sizeof(Half);
    Largest<T> largest;
    visit_pixels<REFLECT, 3>(
        image, image_pitch, shape, tile, RADIUS, [&](int place, const T* pixel, bool exists) {
            pair_t<T> pairs[SHARE];
            load_pixel(pairs, pixel, exists, shape);
#pragma unroll
            for (int g = 0; g < SHARE; ++g) largest.add(pairs[g]);
            if constexpr (FITS) store_parted(to, place, pairs);
        });
    float scale, inverse;
    scale_of<LIMIT>(most_of_block(largest.value(), most), scale, inverse);
    if constexpr (FITS) {
        scale_staged<T>(to, (tile.rows + 2 * RADIUS) * (tile.filled + 2 * RADIUS) * PIXEL, scale);
    } else {
        visit_pixels<REFLECT, 3>(
            image, image_pitch, shape, tile, RADIUS, [&](int place, const T* pixel, bool exists) {
                pair_t<T> pairs[SHARE];
                unsigned halves[SHARE];
                load_pixel(pairs, pixel, exists, shape);
#pragma unroll
                for (int g = 0; g < SHARE; ++g) halves[g] = scaled<T>(pairs[g], scale);
                store_parted(to, place, halves);
            });
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
            weights[w] = pack_finite(sum, sum);
        }
    }
};
