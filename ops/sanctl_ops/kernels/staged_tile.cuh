// Tiles of planes in shared memory: what the windows of some rows read, of all channels that share a
// weight. Blocks run over (image, weight channel, tile of rows).
#pragma once

#include "window.cuh"

constexpr int CHANNELS = 8;  // that share a weight, at most

template <int N>
struct Constant {
    static constexpr int value = N;
};

// Calls with(Constant<vector>()) for a power of two, at most MOST, chosen when the kernel is launched.
template <int MOST, typename With>
__device__ inline void with_vector(int vector, With with) {
    if constexpr (MOST == 1) with(Constant<1>());
    else if (vector == MOST) with(Constant<MOST>());
    else with_vector<MOST / 2>(vector, with);
}

// How the work on one layer is dealt out; laid out as DEAL in geometry.py.
struct Deal {
    Divisor tiles;            // of a plane
    Divisor weight_channels;
    Divisor vectors;          // of V pixels, of a row or of what a warp takes
    Divisor units;            // of a staged line, of as many pixels as one copy moves
    int rows;                 // of a tile
    int group;                // channels that share a weight
    int pitch, plane_pitch;   // elements of a staged line, and of all lines of a channel
};

// Where a tile is staged: row i of plane g at data + g * plane_pitch + i * pitch, its pixels from
// column MARGIN on.
template <typename T, int MARGIN>
struct Staged {
    T* data;
    int pitch, plane_pitch;

    __device__ Staged(void* shared, const Deal& deal)
        : data(static_cast<T*>(shared)), pitch(deal.pitch), plane_pitch(deal.plane_pitch) {}

    __device__ T* end() const { return data + CHANNELS * plane_pitch; }

    // Pixels that one copy may move: 16 bytes, or what divides the margin.
    static constexpr int MOST_AT_ONCE = 16 / sizeof(T);
    static constexpr int IN_MARGIN = MARGIN == 0 ? MOST_AT_ONCE : MARGIN & -MARGIN;
    static constexpr int MOST = IN_MARGIN < MOST_AT_ONCE ? IN_MARGIN : MOST_AT_ONCE;

    // Starts copying `lines` rows of `group` planes, from row `first` on, `vector` pixels at a time.
    // Rows outside are reflected or zero; all other columns, and the planes from `group` on, are zero.
    template <bool REFLECT>
    __device__ void copy(int vector, const T* planes, long long plane_stride,
                         const Strides& strides, const Window& window, const Deal& deal, int first,
                         int lines) const {
        with_vector<MOST>(vector, [&](auto v) {
            copy<REFLECT, decltype(v)::value>(planes, plane_stride, strides, window, deal, first,
                                              lines);
        });
    }

    // Makes the lines, which this thread has waited for, complete and known to all threads: RADIUS
    // columns on both sides reflect those inside.
    template <bool REFLECT, int RADIUS>
    __device__ void finish(int lines, int width) const {
        __syncthreads();
        if (!REFLECT) return;
        for (int i = threadIdx.x; i < CHANNELS * lines; i += blockDim.x) {
            T* row = data + i % CHANNELS * plane_pitch + i / CHANNELS * pitch + MARGIN;
#pragma unroll
            for (int k = 1; k <= RADIUS; ++k) {
                row[-k] = row[k];
                row[width - 1 + k] = row[width - 1 - k];
            }
        }
        __syncthreads();
    }

  private:
    template <bool REFLECT, int C>
    __device__ void copy(const T* planes, long long plane_stride, const Strides& strides,
                         const Window& window, const Deal& deal, int first, int lines) const {
        for (unsigned i = threadIdx.x; i < deal.units.divisor * lines; i += blockDim.x) {
            unsigned line = i;
            const int unit = deal.units.divide(line), column = unit * C - MARGIN;
            const int y = source<REFLECT>(first + static_cast<int>(line), window.height);
            // Rows below the last tile's windows are not used; they only must not be read.
            const bool exists = column >= 0 && column < window.width && y >= 0 && y < window.height;
            const T* from = planes + (exists ? y * strides.h + column * strides.w : 0);
            T* to = data + line * pitch + unit * C;
#pragma unroll
            for (int g = 0; g < CHANNELS; ++g, to += plane_pitch, from += plane_stride)
                copy_or_clear<C>(to, from, exists && g < deal.group);
        }
    }
};
