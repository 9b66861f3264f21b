// Sums of weighed values: weights exist in registers only, made by a product of hidden values with the
// second convolution's rows, a tap at a time.
#pragma once

#include "patchwise.cuh"

// What a lane holds of 16 pixels: pixels l / 4 and l / 4 + 8, weight channels 2 * (l % 4) and the next
// one, and the values that share them.
using Held = float[2][2][SHARE];

// held += weights * values, whose two pixels lie at `first` and `second`.
template <typename T>
__device__ inline void weigh(const float (&weights)[4], const T* first, const T* second,
                             Held& held) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const auto values = *reinterpret_cast<const Vector<unsigned, 4>*>(
                (half == 0 ? first : second) + e * SHARE);
#pragma unroll
            for (int g = 0; g < SHARE; g += 2) {
                held[half][e][g] += weights[2 * half + e] * first_of<T>(values.at[g / 2]);
                held[half][e][g + 1] += weights[2 * half + e] * second_of<T>(values.at[g / 2]);
            }
        }
}

// Writes what a lane holds of one pixel.
template <typename T>
__device__ inline void write_values(const float (&held)[2][SHARE], T* pixel, int channel,
                                    const Shape& shape) {
#pragma unroll
    for (int g = 0; g < SHARE; ++g) {
        T* to = pixel + g * shape.hidden + channel;
        if (g >= shape.share || channel >= shape.hidden) continue;
        if (shape.hidden % 2 == 0) {
            *reinterpret_cast<unsigned*>(to) = pack<T>(held[0][g], held[1][g]);
        } else {
            to[0] = narrow<T>(held[0][g]);
            if (channel + 1 < shape.hidden) to[1] = narrow<T>(held[1][g]);
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
