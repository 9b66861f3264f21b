// Sums over windows as products of small matrices, for 16-bit values on tensor cores.
//
// The K taps of a row of windows are a band: the sum of pixel r takes columns r to r + K - 1. For 16
// pixels that is a product of a 16 x 24 matrix, which holds the weights on K diagonals and zeros
// elsewhere, and of a 24 x 8 matrix of the columns of 8 channels. A warp makes such a product by one
// instruction for the first 16 columns and one for the last 8, accumulating in float. Fragments are
// laid out as the PTX manual describes mma.m16n8k16, mma.m16n8k8 and ldmatrix.
//
// A weight of zero times an infinity is NaN: where an input is not finite, so are its neighbours'
// results, beyond the windows that it lies in.
#pragma once

#include "window.cuh"

constexpr int PIXELS = 16;      // of one product
constexpr int CHANNELS = 8;     // of one product
constexpr int PRODUCTS = 4;     // of one warp: neighbours in a row
constexpr int SEGMENT = PRODUCTS * PIXELS;

template <int N>
struct Constant {
    static constexpr int value = N;
};

// The elements of the band that one lane holds: of rows l / 4 and l / 4 + 8, in columns 2 * (l % 4)
// and the next one modulo 8. Each lies on at most one diagonal, the same for both rows. The first
// diagonal begins in column SHIFT.
template <int K, int SHIFT>
struct Band {
    static_assert(7 + K - 1 + SHIFT < 16, "row 7 lies within the first 16 columns");
    int row;           // l / 4
    int diagonal[2];   // 0 where there is none
    int block[2];      // the column is that modulo 8 plus 8 * block for row l / 4
    bool inside[2];
    unsigned mask[2];  // keeps of a pair of columns what lies in block 0, and in block 1

    __device__ explicit Band(int lane) {
        row = lane / 4;
        mask[0] = mask[1] = 0;
#pragma unroll
        for (int p = 0; p < 2; ++p) {
            const int apart = lane % 4 * 2 + p - row - SHIFT;
            block[p] = apart < -8 ? 2 : apart < 0 ? 1 : 0;
            diagonal[p] = apart + 8 * block[p];
            inside[p] = diagonal[p] < K && block[p] < 2;
            const unsigned half = inside[p] ? p == 0 ? 0x0000ffffu : 0xffff0000u : 0;
            mask[0] |= block[p] == 0 ? half : 0;
            mask[1] |= block[p] == 1 ? half : 0;
            if (!inside[p]) diagonal[p] = 0;
        }
    }

    // Adds (band of weights) * (columns of 8 channels); weights of row l / 4, and of row l / 4 + 8.
    template <typename T>
    __device__ void multiply(float (&sums)[4], unsigned upper, unsigned lower,
                             const unsigned (&columns)[4]) const {
        Mma<T>::k16(sums, upper & mask[0], 0, upper & mask[1], lower & mask[0], columns[0],
                    columns[1]);
        Mma<T>::k8(sums, 0, lower & mask[1], columns[2]);
    }
};

template <typename T>
__device__ inline unsigned pair(T low, T high) {
    return low.bits | static_cast<unsigned>(high.bits) << 16;
}

// Where a tile is staged: row i of plane g at data + g * plane_pitch + i * pitch, its pixels from
// column `margin` on.
template <typename T>
struct Staged {
    T* data;
    int margin, pitch, plane_pitch;
};

// Writes the columns beside a row that reflect V of its pixels.
template <int RADIUS, int V, typename T>
__device__ inline void reflect_columns(T* row, int column, int width, const Vector<T, V>& values) {
    if constexpr (V > RADIUS) {
#pragma unroll
        for (int i = 0; i < RADIUS; ++i) {
            if (column == 0) row[-1 - i] = values.at[1 + i];
            if (column + V == width) row[width + i] = values.at[V - 2 - i];
        }
    } else if (column <= RADIUS || column + V >= width - RADIUS) {
#pragma unroll
        for (int e = 0; e < V; ++e)
#pragma unroll
            for (int which = 1; which < IMAGES<true>; ++which) {
                int position;
                if (image<true>(column + e, width, RADIUS, which, position))
                    row[position] = values.at[e];
            }
    }
}

// Stages `lines` rows of `group` planes from row `first` on, V pixels at a time. Rows outside are
// reflected or zero, and so are RADIUS columns on both sides; all other columns, and the planes from
// `group` on, are 0.
template <bool REFLECT, int RADIUS, int V, typename T>
__device__ inline void stage_planes(const T* planes, long long plane_stride, const Strides& strides,
                                    const Window& window, int group, int first, int lines,
                                    const Staged<T>& staged) {
    constexpr int AT_ONCE = V == 8 ? 4 : V == 4 ? 6 : 10;  // most tiles take one turn
    constexpr int WIDEST = V < 4 ? V : 4;  // the margins are multiples of 4
    const int width = window.width, vectors = width / V;
    const int own_line = threadIdx.x / vectors, column = threadIdx.x % vectors * V;
    const int at_once = blockDim.x / vectors, all_lines = group * lines;
    const unsigned inverse = 65536 / lines + 1;  // i / lines == i * inverse >> 16 for these i
    for (int begin = 0; begin < all_lines; begin += AT_ONCE * at_once) {
        Vector<T, V> values[AT_ONCE];
        int to[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            const int index = begin + own_line + k * at_once, g = index * inverse >> 16;
            const int line = index - g * lines;
            const int y = source<REFLECT>(first + line, window.height);
            to[k] = -1;
            // Rows below the last tile's windows are not used; they only must not be read.
            if (own_line >= at_once || index >= all_lines || y < 0 || y >= window.height) continue;
            to[k] = g * staged.plane_pitch + line * staged.pitch + staged.margin;
            const T* from = planes + g * plane_stride + y * strides.h + column * strides.w;
            if (strides.w == 1)
                values[k] = *reinterpret_cast<const Vector<T, V>*>(from);
            else
#pragma unroll
                for (int e = 0; e < V; ++e) values[k].at[e] = from[e * strides.w];
        }
        if (begin == 0) {  // clears while the first loads are under way
            auto* cleared = reinterpret_cast<Vector<T, 8>*>(staged.data);
            for (int i = threadIdx.x; i < CHANNELS * staged.plane_pitch / 8; i += blockDim.x)
                cleared[i] = {};
            __syncthreads();
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            if (to[k] < 0) continue;
            T* row = staged.data + to[k];
#pragma unroll
            for (int e = 0; e < V; e += WIDEST)
                *reinterpret_cast<Vector<T, WIDEST>*>(row + column + e) =
                    *reinterpret_cast<const Vector<T, WIDEST>*>(&values[k].at[e]);
            if (REFLECT && RADIUS > 0) reflect_columns<RADIUS, V>(row, column, width, values[k]);
        }
    }
    __syncthreads();
}

// The same with the vector that a row of these planes allows, chosen when the kernel is launched.
template <bool REFLECT, int RADIUS, typename T>
__device__ inline void stage_planes(int vector, const T* planes, long long plane_stride,
                                    const Strides& strides, const Window& window, int group,
                                    int first, int lines, const Staged<T>& staged) {
    const auto stage = [&](auto v) {
        stage_planes<REFLECT, RADIUS, decltype(v)::value>(planes, plane_stride, strides, window,
                                                          group, first, lines, staged);
    };
    if (vector == 8) stage(Constant<8>());
    else if (vector == 4) stage(Constant<4>());
    else if (vector == 2) stage(Constant<2>());
    else stage(Constant<1>());
}
