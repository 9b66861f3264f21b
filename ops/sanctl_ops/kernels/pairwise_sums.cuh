// Sums of values weighted by the softmax of stored logits, and their gradients: see pairwise.cuh and
// pairwise_logits.cu.
//
// A warp takes 16 pixels and the channels of one slab: a weight channel's values lie in blocks of 8
// neighbouring channels. Lane l has pixels l / 4 and l / 4 + 8, of every block channels 2 * (l % 4) and
// the next one, and the weights of just these. Values and slopes are staged as halves, multiplied by
// powers of two that keep them in range; sums over one row of taps are kept in halves, too, those over
// rows in float.
#pragma once

#include "pairwise.cuh"

// Where the channels of a slab lie.
struct Channels {
    int all;    // channels of a pixel
    int step;   // between blocks
    int first;  // of the lane, of the first block
    int slot;   // the lane's first of two weight channels
    int slots;

    __device__ Channels(int channels, int channels_between, int slab, int slots, int lane)
        : all(channels),
          step(channels_between),
          first(slab * 8 + lane % 4 * 2),
          slot(lane % 4 * 2 & (slots - 1)),
          slots(slots) {}
};

// Writes 8 values as halves.
__device__ inline void store_scaled(Half* to, float (&values)[8], float scale) {
#pragma unroll
    for (int e = 0; e < 8; ++e) values[e] *= scale;
    store<8>(to, values);
}

// Stages BLOCKS blocks of a slab's channels; `planes` have `apart_pixels` elements from pixel to pixel.
template <typename T, int BLOCKS, int K, bool KEYS>
__device__ inline void stage_values(const T* planes, float scale, Half* to, const Place& place,
                                    const Tiling& tiling, int apart_pixels, int step, int slab) {
    constexpr int PITCH = BLOCKS * 8 + 8;
    const int block = threadIdx.x % BLOCKS, first = threadIdx.x / BLOCKS, apart = blockDim.x / BLOCKS;
    const T* image = planes + static_cast<long long>(place.n) * tiling.height * tiling.width * apart_pixels +
                     slab * 8 + block * step;
    to += block * 8;
    if constexpr (sizeof(T) == sizeof(Half)) {
        visit_staged<K, KEYS>(place, tiling, first, apart, [&](int at, int number, bool exists) {
            copy_or_clear<8>(reinterpret_cast<T*>(to + at * PITCH), image + number * apart_pixels, exists);
        });
        end_group();
        wait_for_groups<0>();
        // Every thread converts what it has copied itself.
        visit_staged<K, KEYS>(place, tiling, first, apart, [&](int at, int, bool) {
            float values[8];
            load<8>(reinterpret_cast<const T*>(to + at * PITCH), values);
            store_scaled(to + at * PITCH, values, scale);
        });
    } else {
        // A copy would take more room than halves: some pixels are read at once, then written.
        constexpr int AT_ONCE = 4;
        const int count = staged_pixels<K>(tiling);
        for (int i = first; i < count; i += AT_ONCE * apart) {
            float values[AT_ONCE][8] = {};
#pragma unroll
            for (int p = 0; p < AT_ONCE; ++p) {
                const StagedPixel<K, KEYS> pixel(min(i + p * apart, count - 1), place, tiling);
                if (pixel.exists) load<8>(image + pixel.number * apart_pixels, values[p]);
            }
#pragma unroll
            for (int p = 0; p < AT_ONCE; ++p)
                if (i + p * apart < count)
                    store_scaled(to + (i + p * apart) * PITCH, values[p], scale);
        }
        end_group();
        wait_for_groups<0>();
    }
    __syncthreads();
}

// Copies as many halves as a pixel has slots, or zeros where there is none.
__device__ inline void copy_slots(Half* to, const Half* from, int slots, bool exists) {
    if (slots == 8) copy_or_clear<8>(to, from, exists);
    else if (slots == 4) copy_or_clear<4>(to, from, exists);
    else copy_or_clear<2>(to, from, exists);
}

// The logits of a warp's 16 pixels at one row of taps, 8 slots for each, in shared memory: they are
// copied while sums go over the row before. Lane l copies for pixel l % 16, every other tap.
template <int K>
struct LogitRow {
    static constexpr int HALVES = K * GROUP * 8;
    Half* row;  // the warp's
    int lane;

    // `memory` has HALVES for every warp; what it held of other pixels has been read.
    __device__ LogitRow(Half* memory) : row(memory + threadIdx.x / 32 * HALVES), lane(threadIdx.x % 32) {}

    // Copies what lies at at(tap) for taps that exist(tap), not waiting for it.
    template <typename At, typename Exist>
    __device__ void copy(const Half* logits, int slots, At at, Exist exist) {
#pragma unroll
        for (int pair = 0; pair < K; pair += 2) {
            const int tap = pair + lane / 16;
            const bool exists = exist(tap);
            if (tap < K)
                copy_slots(row + (tap * GROUP + lane % 16) * 8, logits + (exists ? at(tap) : 0), slots,
                           exists);
        }
        end_group();
    }

    // Reads two slots of pixels l / 4 and l / 4 + 8, after which another row may be copied.
    __device__ void read(int slot, unsigned (&logits)[K][2]) const {
        wait_for_groups<0>();
        __syncwarp();
#pragma unroll
        for (int j = 0; j < K; ++j)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                logits[j][h] = pair_at(row + (j * GROUP + h * 8 + lane / 4) * 8 + slot);
        __syncwarp();
    }
};

// The two weights of a lane, rounded.
__device__ inline unsigned weights_of(unsigned logits, const float (&log_sums)[2]) {
    return pack<Half>(power_of_two(first_of(logits) - log_sums[0]),
                      power_of_two(second_of(logits) - log_sums[1]));
}

// Shared address of this lane's row for load_matrices: pixel l % 16 and block l / 16.
template <int BLOCKS>
__device__ inline unsigned value_row(const Half* staged, int number, int lane) {
    return shared_address(staged) + number * (BLOCKS * 8 + 8) * 2 + lane / 16 * 16;
}

// Reads the lane's values of all blocks, of a neighbour `offset` bytes behind the first one.
template <int BLOCKS>
__device__ inline void load_values(unsigned row, unsigned (&values)[BLOCKS][2]) {
    if constexpr (BLOCKS == 1) load_matrices<false>(row, values[0]);
    else
#pragma unroll
        for (int b = 0; b < BLOCKS; b += 2) {
            unsigned four[4];
            load_matrices<false>(row + b * 16, four);
#pragma unroll
            for (int e = 0; e < 4; ++e) values[b + e / 2][e % 2] = four[e];
        }
}

// Sums of a lane's values.
template <int BLOCKS>
struct ValueSums {
    unsigned row[BLOCKS][2];     // of one row of taps
    float rows[BLOCKS][2][2];

    __device__ ValueSums() {
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
            for (int h = 0; h < 2; ++h) rows[b][h][0] = rows[b][h][1] = 0;
    }

    __device__ void begin_row() {
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) row[b][0] = row[b][1] = 0;
    }

    __device__ void add(const unsigned (&values)[BLOCKS][2], const unsigned (&weights)[2]) {
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                row[b][h] = multiply_add_pairs(values[b][h], weights[h], row[b][h]);
    }

    __device__ void end_row() {
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                rows[b][h][0] += first_of(row[b][h]);
                rows[b][h][1] += second_of(row[b][h]);
            }
    }
};
