// Values in shared memory, and sums of them weighed. Weights exist in registers only, made by a product
// of hidden values with the second convolution's rows, a tap at a time.
//
// Values are staged as halves, scaled by a power of two that a tile chooses for itself. Two neighbouring
// pixels, which a lane sums up, read their row of taps together: every value once. Sums are halves for one
// row of taps, and float beyond.
#pragma once

#include "patchwise.cuh"
#include "patchwise_pairs.cuh"

// The largest of what all threads hold; `shared` has room for a float of every warp.
__device__ inline float most_of_block(float own, float* shared) {
    for (int apart = 16; apart > 0; apart /= 2)
        own = fmaxf(own, __shfl_xor_sync(~0u, own, apart));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = own;
    __syncthreads();
    for (int warp = 0; warp < blockDim.x / 32; ++warp) own = fmaxf(own, shared[warp]);
    __syncthreads();
    return own;
}

// Where the values of weight channel w lie for a staged pixel: every second pair of pixels has its
// channels in pairs exchanged, so that lanes read from different banks.
__device__ inline int value_place(int pixel, int w) {
    return pixel * VALUES + (w ^ (pixel >> 1 & 1)) * SHARE;
}

// Stages CHANNELS x SHARE values of a pixel with those that share a weight side by side.
__device__ inline void store_turned(Half* to, int pixel, const Vector<unsigned, 4> (&from)[SHARE]) {
#pragma unroll
    for (int w = 0; w < CHANNELS; ++w) {
        Vector<unsigned, 4> turned;
#pragma unroll
        for (int g = 0; g < SHARE; g += 2)
            turned.at[g / 2] = __byte_perm(from[g].at[w / 2], from[g + 1].at[w / 2],
                                           w % 2 == 0 ? 0x5410 : 0x7632);
        *reinterpret_cast<Vector<unsigned, 4>*>(to + value_place(pixel, w)) = turned;
    }
}

// Scales what is staged as pairs of T.
template <typename T>
__device__ inline void scale_staged(Half* staged, int count, float scale) {
    for (int i = threadIdx.x; i < count / 8; i += blockDim.x) {
        auto& values = reinterpret_cast<Vector<unsigned, 4>*>(staged)[i];
        Vector<unsigned, 4> converted = values;
#pragma unroll
        for (int e = 0; e < 4; ++e) converted.at[e] = scaled<T>(converted.at[e], scale);
        values = converted;
    }
}

// Hands every place of a tile with `halo` pixels around to take(place, its pixel, whether that exists).
template <bool REFLECT, int UNROLL, typename T, typename Take>
__device__ inline void visit_pixels(const T* image, int image_pitch, const Shape& shape,
                                    const Tile& tile, int halo, Take take) {
    const int columns = tile.filled + 2 * halo, pixels = (tile.rows + 2 * halo) * columns;
#pragma unroll UNROLL
    for (Walk at(threadIdx.x, blockDim.x, columns); at.place < pixels; at.next()) {
        const int y = source<REFLECT>(tile.top - halo + at.row, shape.height);
        const int x = source<REFLECT>(tile.left - halo + at.column, shape.width);
        const bool exists = y >= 0 && x >= 0;
        take(at.place,
             image + (exists ? static_cast<long long>(y * shape.width + x) : 0) * image_pitch, exists);
    }
}

// Stages a tile of values, or of their gradient, with `halo` pixels around: of CHANNELS weight channels
// from `first` on, the SHARE value channels of each side by side. Around the image there are reflections
// or zeros. Returns by what to multiply sums of them, which were taken to less than 2^MOST.
//
// Values of 16 bits are scaled where they are staged. Those of 32 bits do not fit there: they are loaded
// twice, at first for their scale alone.
template <typename T, bool REFLECT, int MOST>
__device__ inline float stage_values(Half* to, float* most, const T* image, int image_pitch,
                                     const Shape& shape, const Tile& tile, int halo, int first) {
    constexpr bool FITS = sizeof(T) == sizeof(Half);
    const int count = shape.hidden - first;
    const auto load_share = [&](const T* pixel, bool exists, int g) {
        return exists && g < shape.share
                   ? load_pairs(pixel + g * shape.hidden, count, shape.value_vector)
                   : Vector<pair_t<T>, 4>{};
    };
    Largest<T> largest;
    visit_pixels<REFLECT, 1>(
        image + first, image_pitch, shape, tile, halo, [&](int place, const T* pixel, bool exists) {
            Vector<pair_t<T>, 4> from[SHARE];
#pragma unroll
            for (int g = 0; g < SHARE; ++g) {
                from[g] = load_share(pixel, exists, g);
#pragma unroll
                for (int e = 0; e < 4; ++e) largest.add(from[g].at[e]);
            }
            if constexpr (FITS) store_turned(to, place, from);
        });
    float scale, inverse;
    scale_of<MOST>(most_of_block(largest.value(), most), scale, inverse);
    if constexpr (FITS) {
        scale_staged<T>(to, (tile.rows + 2 * halo) * (tile.filled + 2 * halo) * VALUES, scale);
    } else {
        visit_pixels<REFLECT, 1>(
            image + first, image_pitch, shape, tile, halo,
            [&](int place, const T* pixel, bool exists) {
                Vector<unsigned, 4> halves[SHARE];
#pragma unroll
                for (int g = 0; g < SHARE; ++g) {
                    const auto from = load_share(pixel, exists, g);
#pragma unroll
                    for (int e = 0; e < 4; ++e) halves[g].at[e] = scaled<T>(from.at[e], scale);
                }
                store_turned(to, place, halves);
            });
    }
    return inverse;
}

// The values of the pixels from an even one on, in a row, that a lane reads: of two weight channels.
struct Row {
    const Half* values[2];  // of either channel, where channels are not exchanged

    __device__ Row(const Half* staged, int pixel, int lane)
        : values{staged + value_place(pixel, lane % 4 * 2),
                 staged + value_place(pixel, lane % 4 * 2 + 1)} {}

    __device__ const Vector<unsigned, 4>& read(int pixel, int channel) const {
        return *reinterpret_cast<const Vector<unsigned, 4>*>(values[channel ^ (pixel >> 1 & 1)] +
                                                             pixel * VALUES);
    }
};

// What a lane sums up: for two neighbouring pixels and two weight channels, the values that share them.
using Held = float[2][2][SHARE];

// held += sums over `count` taps (at most K) of a row: tap k of the first pixel reads value k, and that of
// the second one the next. make(k, weights) makes a lane's four weights.
template <int K, typename Make>
__device__ inline void weigh_row(const Row& row, int count, Make make, Held& held) {
    unsigned sums[2][2][4] = {}, before[2] = {};
#pragma unroll
    for (int k = 0; k <= K; ++k) {
        unsigned now[2][2];
        if (k < count) {
            float weights[4];
            make(k, weights);
#pragma unroll
            for (int i = 0; i < 4; ++i) now[i / 2][i % 2] = pack_finite(weights[i], weights[i]);
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const Vector<unsigned, 4> values = row.read(k, e);
#pragma unroll
            for (int g = 0; g < 4; ++g) {
                if (k < count) sums[0][e][g] = fma_halves(now[0][e], values.at[g], sums[0][e][g]);
                if (k > 0) sums[1][e][g] = fma_halves(before[e], values.at[g], sums[1][e][g]);
            }
            before[e] = now[1][e];
        }
        if (k == count) break;
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        held[i / 8][i / 4 % 2][i % 4 * 2] += first_of<Half>(sums[i / 8][i / 4 % 2][i % 4]);
        held[i / 8][i / 4 % 2][i % 4 * 2 + 1] += second_of<Half>(sums[i / 8][i / 4 % 2][i % 4]);
    }
}

// Writes what a lane holds of one pixel, times `factor`.
template <typename T>
__device__ inline void write_values(const float (&held)[2][SHARE], float factor, T* pixel,
                                    int channel, const Shape& shape) {
#pragma unroll
    for (int g = 0; g < SHARE; ++g) {
        T* to = pixel + g * shape.hidden + channel;
        if (g >= shape.share || channel >= shape.hidden) continue;
        const float first = held[0][g] * factor, second = held[1][g] * factor;
        if (shape.hidden % 2 == 0) {
            *reinterpret_cast<pair_t<T>*>(to) = paired<T>(first, second);
        } else {
            to[0] = narrow<T>(first);
            if (channel + 1 < shape.hidden) to[1] = narrow<T>(second);
        }
    }
}

// The weights of 16 pixels for one tap, from rows of rectified hidden values.
template <int WT>
__device__ inline void make_weights(const Rows<WT>& rows, const Half* second, const float* bias,
                                    int tap, int lane, float (&weights)[4]) {
    const auto start = reinterpret_cast<const Vector<float, 2>*>(bias)[tap * 4 + lane % 4];
    weights[0] = weights[2] = start.at[0];
    weights[1] = weights[3] = start.at[1];
    rows.multiply(weights, fragment<WT>(second, tap, lane));
}
