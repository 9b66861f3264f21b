// What the kernels of patchwise attention share: tiles of an image in shared memory, channels last, and
// the fragments of products of 16 pixels.
//
// A relation's channel is normalised, scaled and cut off by one instruction for two of them: a * x + b
// in halves, where x is (image - pivot) * unit, of the size of 1. Weights lie in memory as the lanes of
// a warp hold them in fragments (PTX manual, mma.m16n8k16 and mma.m16n8k8): see patchwise_fold.cu.
#pragma once

#include "window.cuh"

constexpr int PIXELS = 16;      // of one product
constexpr int CHANNELS = 8;     // weight channels of one product
constexpr int SHARE = 8;        // value channels that share a weight, at most
constexpr int VALUES = CHANNELS * SHARE;
constexpr float MOST_HALF = 65504;

// Laid out as SHAPE in patchwise.py.
struct Shape {
    int images, height, width;
    int down, across;             // tiles of an image
    int relation, hidden, share;  // channels: of query and key; of the weights; sharing one of these
    int relation_tiles;           // 16 channels each, the last one filled up with zeros
    int query_pitch, key_pitch, value_pitch, grad_pitch;  // elements between pixels
    int relation_vector, value_vector;                    // channels that one access may move

    __device__ int pixels() const { return height * width; }
    __device__ int tiles() const { return down * across; }
};

// The rows and columns of an image that a block computes. Tiles differ by one in their sides, so that
// what lies beyond the borders mirrors pixels of the tile at the border. Where neighbours are taken in
// pairs, rows are filled up to an even number.
struct Tile {
    int n, top, left, rows, columns;
    int filled;  // columns with those that fill up

    __device__ Tile(const Shape& shape, int number, bool pairs = false) {
        const int x = number % shape.across, y = number / shape.across % shape.down;
        n = number / shape.tiles();
        top = y * shape.height / shape.down;
        left = x * shape.width / shape.across;
        rows = (y + 1) * shape.height / shape.down - top;
        columns = (x + 1) * shape.width / shape.across - left;
        filled = pairs ? columns + columns % 2 : columns;
    }

    __device__ int count() const { return rows * filled; }
    __device__ int products() const { return (count() + PIXELS - 1) / PIXELS; }
    __device__ bool exists(int i) const { return i < count() && i % filled < columns; }

    // The pixel of the image that is number i of the tile; for one that does not exist, another.
    __device__ int pixel(const Shape& shape, int i) const {
        i = min(i, count() - 1);
        return (top + i / filled) * shape.width + left + min(i % filled, columns - 1);
    }

    // The place of pixel i in a staged tile with `halo` pixels around; for one beyond the last, that of
    // another, so that neighbours stay so.
    __device__ int place(int i, int halo) const {
        i = i < count() ? i : count() - 2 + i % 2;
        return (i / filled + halo) * (filled + 2 * halo) + i % filled + halo;
    }
};

// Where neighbours are taken in pairs, row r of a product is this pixel of it, so that a lane has two
// neighbours.
__device__ inline int in_pairs(int row) { return row / 16 * 16 + row % 8 * 2 + row % 16 / 8; }

// Whether windows may read a pixel by reflection.
__device__ inline bool reflects(int y, int x, const Shape& shape, int radius) {
    return min(y, shape.height - 1 - y) <= radius || min(x, shape.width - 1 - x) <= radius;
}

// How often tap number `tap` of a row of K windows reads a pixel, mirrored ones included.
__device__ inline int readings(int pixel, int side, int tap, int radius) {
    int count = 0;
#pragma unroll
    for (int which = 0; which < IMAGES<true>; ++which) {
        int position;
        if (image<true>(pixel, side, radius, which, position)) {
            const int centre = position - tap + radius;
            count += centre >= 0 && centre < side;
        }
    }
    return count;
}

// The power of two, and its inverse, that takes `bound` to less than 2^MOST, or as far as there is one;
// NaN for a bound that is not finite.
template <int MOST>
__device__ inline void scale_of(float bound, float& scale, float& inverse) {
    const int exponent = __float_as_uint(bound) >> 23;
    const int wanted = min(max(253 + MOST - exponent, 1), 253);
    scale = __uint_as_float(static_cast<unsigned>(wanted) << 23) + (bound - bound);
    inverse = __uint_as_float(static_cast<unsigned>(254 - wanted) << 23);
}

// Where a thread is among the pixels that a block goes through in turn, without dividing each time.
struct Walk {
    int place, row, column;  // of all places, and of a row of `columns`

    __device__ Walk(int first, int step, int columns)
        : place(first), row(first / columns), column(first % columns), step(step),
          down(step / columns), across(step % columns), columns(columns) {}

    __device__ void next() {
        place += step;
        row += down;
        column += across;
        if (column < columns) return;
        column -= columns;
        ++row;
    }

  private:
    int step, down, across, columns;
};

// As near to x as `most` lets it be; a NaN stays one.
__device__ inline float within(float x, float most) {
    x = x > most ? most : x;
    return x < -most ? -most : x;
}

__device__ inline float within_halves(float x) { return within(x, MOST_HALF); }

// Two values in units. No more deviations than these are possible among the values of a batch, but with
// running statistics; they leave room for scale and shift.
__device__ inline unsigned pack_units(float first, float second) {
    constexpr float MOST = 8192;
    return pack<Half>(within(first, MOST), within(second, MOST));
}

// Channels `first` to `first + 7` of a pixel with `count` of them; zeros beyond, where anything may lie.
template <typename T>
__device__ inline void load_channels(const T* pixel, int first, int count, int vector,
                                     float (&values)[8]) {
    if (vector == 8 && first < count) return load<8>(pixel + first, values);
#pragma unroll
    for (int e = 0; e < 8; ++e) values[e] = first + e < count ? widen(pixel[first + e]) : 0.0f;
}

// Where an image's channels are zero and how large a unit is, as fold_relation found them.
struct Units {
    const float *pivots, *units;

    __device__ Units(const float* table, bool query, int tiles)
        : pivots(table + (query ? 2 : 0) * PIXELS * tiles), units(pivots + PIXELS * tiles) {}
};

// Eight channels' pivots and units, which are zero for channels that there are not.
struct EightUnits {
    float pivots[8], units[8];

    __device__ EightUnits(const Units& from, int first) {
        load<8>(from.pivots + first, pivots);
        load<8>(from.units + first, units);
    }

    __device__ Vector<unsigned, 4> apply(const float (&values)[8]) const {
        Vector<unsigned, 4> halves;
#pragma unroll
        for (int e = 0; e < 4; ++e)
            halves.at[e] = pack_units((values[2 * e] - pivots[2 * e]) * units[2 * e],
                                      (values[2 * e + 1] - pivots[2 * e + 1]) * units[2 * e + 1]);
        return halves;
    }
};

// Stages `rows` x `columns` pixels from (top, left) on, which mirror those inside the image: channels
// `first` to `first + 8 * chunks - 1`, in units. A thread stays with its channels.
template <typename T>
__device__ inline void stage_relation(Half* to, int pitch, const T* image, int image_pitch,
                                      const Units& units, const Shape& shape, int top, int left,
                                      int rows, int columns, int first, int chunks) {
    const int step = blockDim.x / chunks, chunk = threadIdx.x % chunks * 8;
    const EightUnits own(units, first + chunk);
    if (threadIdx.x >= step * chunks) return;
#pragma unroll 4
    for (Walk at(threadIdx.x / chunks, step, columns); at.row < rows; at.next()) {
        const int y = source<true>(top + at.row, shape.height);
        const int x = source<true>(left + at.column, shape.width);
        const T* pixel = image + static_cast<long long>(y * shape.width + x) * image_pitch;
        float values[8];
        load_channels(pixel, first + chunk, shape.relation, shape.relation_vector, values);
        *reinterpret_cast<Vector<unsigned, 4>*>(to + at.place * pitch + chunk) = own.apply(values);
    }
}

// One row of the first operand of products with hidden channels, 8 * TILES of them, as registers.
template <int TILES>
struct Rows {
    static constexpr int STEPS = (TILES + 1) / 2;  // of 16 channels, or one of 8
    unsigned at[STEPS][4];

    // From shared memory; `row` is the address of this lane's row (see row_of_lane).
    __device__ void load(unsigned row) {
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            if constexpr (TILES == 1) {
                unsigned two[2];
                load_matrices<false>(row, two);
                at[s][0] = two[0];
                at[s][1] = two[1];
            } else {
                load_matrices<false>(row + s * 32, at[s]);
            }
        }
    }

    // From global memory: pixels l / 4 and l / 4 + 8 at `first` and `second`.
    __device__ void load(const Half* first, const Half* second, int lane) {
#pragma unroll
        for (int s = 0; s < STEPS; ++s)
#pragma unroll
            for (int half = 0; half < (TILES == 1 ? 1 : 2); ++half) {
                const int channel = s * 16 + half * 8 + lane % 4 * 2;
                at[s][2 * half] = *reinterpret_cast<const unsigned*>(first + channel);
                at[s][2 * half + 1] = *reinterpret_cast<const unsigned*>(second + channel);
            }
    }

    // sums += rows * b, whose TILES registers lie at `b` in memory for every lane.
    __device__ void multiply(float (&sums)[4], const Vector<unsigned, TILES>& b) const {
        if constexpr (TILES == 1) {
            Mma<Half>::k8(sums, at[0][0], at[0][1], b.at[0]);
        } else {
#pragma unroll
            for (int s = 0; s < STEPS; ++s)
                Mma<Half>::k16(sums, at[s][0], at[s][1], at[s][2], at[s][3], b.at[2 * s],
                               b.at[2 * s + 1]);
        }
    }
};

// Elements between pixels of staged hidden values: neighbours lie in other banks.
template <int TILES>
constexpr int HIDDEN_PITCH = TILES == 1 ? CHANNELS : TILES * CHANNELS + 8;

// Which of 16 rows, and which 8 of its channels, a lane names to load_matrices for a first operand.
// One of 8 channels has two matrices only, which lanes 0 to 15 name.
template <int TILES>
__device__ inline int channel_of_lane(int lane) {
    return TILES == 1 ? 0 : lane / 16 * 8;
}

__device__ inline int row_of_lane(int lane) { return lane % 16; }

// A lane's part of a second operand in memory, register by register.
template <int WORDS>
__device__ inline Vector<unsigned, WORDS> fragment(const Half* fragments, int number, int lane) {
    return reinterpret_cast<const Vector<unsigned, WORDS>*>(fragments)[number * 32 + lane];
}
