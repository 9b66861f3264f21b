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
//
// A warp takes 64 pixels of one row, or whole rows of up to 32 or 16 pixels.
#pragma once

#include "staged_tile.cuh"

constexpr int PIXELS = 16;      // of one product
static_assert(CHANNELS == 8, "a product is of 8 channels");
constexpr int PRODUCTS = 4;     // of one warp: neighbours in a row, or in several
constexpr int SEGMENT = PRODUCTS * PIXELS;

// The place of a warp, of `segments` that share a row: its first row is one of `together` that it takes
// at once.
struct Task {
    int lane, warp;
    int n, weight_channel;
    int tile;
    int top, bottom;  // the rows of the block's tile, the last one excluded
    int row, begin;   // the warp's first row and column

    __device__ Task(const Deal& deal, const Divisor& segments, int height, int together) {
        unsigned part = blockIdx.x, share = threadIdx.x / 32;
        lane = threadIdx.x % 32;
        warp = share;
        tile = deal.tiles.divide(part);
        top = tile * deal.rows;
        bottom = min(top + deal.rows, height);
        weight_channel = deal.weight_channels.divide(part);
        n = part;
        begin = segments.divide(share) * SEGMENT;
        row = top + share * together;
    }
};

template <typename T>
__device__ inline unsigned zero_extended(T value) {
    return value.bits;
}

// Rounds two sums and writes them to two places.
template <typename T>
__device__ inline void write_pair(T* first, T* second, float one, float other) {
    const unsigned packed = pack<T>(one, other);
    first->bits = packed;
    second->bits = packed >> 16;
}

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
    unsigned kept[2];  // for __byte_perm: of a pair of elements, what lies in block 0, and in block 1

    __device__ explicit Band(int lane) {
        row = lane / 4;
        kept[0] = kept[1] = 0x3232;  // the upper halves of zero-extended elements: zeros
#pragma unroll
        for (int p = 0; p < 2; ++p) {
            const int apart = lane % 4 * 2 + p - row - SHIFT;
            block[p] = apart < -8 ? 2 : apart < 0 ? 1 : 0;
            diagonal[p] = apart + 8 * block[p];
            inside[p] = diagonal[p] < K && block[p] < 2;
            const unsigned change = inside[p] ? p == 0 ? 0x3232 ^ 0x3210 : 0x3232 ^ 0x5432 : 0;
            kept[0] ^= block[p] == 0 ? change : 0;
            kept[1] ^= block[p] == 1 ? change : 0;
            if (!inside[p]) diagonal[p] = 0;
        }
        forget_origin(kept[0]);
        forget_origin(kept[1]);
    }

    // Adds (band of weights) * (columns of 8 channels). `low` points to the weight of row l / 4 in
    // column 2 * (l % 4), `high` to that in the next one; those of row l / 4 + 8 lie 8 further on.
    template <typename T>
    __device__ void multiply(float (&sums)[4], const T* low, const T* high,
                             const unsigned (&columns)[4]) const {
        const unsigned upper[2] = {zero_extended(low[0]), zero_extended(high[0])};
        const unsigned lower[2] = {zero_extended(low[8]), zero_extended(high[8])};
        Mma<T>::k16(sums, __byte_perm(upper[0], upper[1], kept[0]), 0,
                    __byte_perm(upper[0], upper[1], kept[1]),
                    __byte_perm(lower[0], lower[1], kept[0]), columns[0], columns[1]);
        Mma<T>::k8(sums, 0, __byte_perm(lower[0], lower[1], kept[1]), columns[2]);
    }
};

// Where a lane's row of matrix l / 8 begins in a staged line: 8 columns of channel l % 8.
template <typename T, int MARGIN>
__device__ inline T* matrix_row(const Staged<T, MARGIN>& staged, int lane, int line) {
    return staged.data + lane % 8 * staged.plane_pitch + lane / 8 * 8 + line * staged.pitch;
}

// The vectors of K pieces of up to SEGMENT elements, `plane` elements apart in global memory and
// PITCH in shared memory, dealt out to a warp.
template <int K, int V, int PITCH>
struct Vectors {
    static constexpr int MOST = (K * (SEGMENT / V) + 31) / 32;  // of a lane
    int there[MOST], here[MOST], column[MOST];
    bool mine[MOST];

    // `vectors` is a piece's number of them.
    __device__ Vectors(int lane, const Divisor& vectors, int plane) {
#pragma unroll
        for (int k = 0; k < MOST; ++k) {
            unsigned tap = lane + k * 32;
            column[k] = vectors.divide(tap) * V;
            there[k] = tap * plane + column[k];
            here[k] = tap * PITCH + column[k];
            if (tap >= K) column[k] = SEGMENT;
        }
    }

    // Chooses the first `count` elements of each piece.
    __device__ void choose(int count) {
#pragma unroll
        for (int k = 0; k < MOST; ++k) mine[k] = column[k] < count;
    }

    // Hands the places of this lane's chosen vectors to visit(in global, in shared memory).
    template <typename Visit>
    __device__ void visit(Visit visit) const {
#pragma unroll
        for (int k = 0; k < MOST; ++k)
            if (mine[k]) visit(there[k], here[k]);
    }
};
