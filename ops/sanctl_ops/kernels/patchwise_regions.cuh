// Gradients of what windows read, gathered where it lies: nothing is scattered, there are no atomics, and
// two runs give the same bits.
//
// What windows read beyond the image mirrors pixels of the tile at that border. A block first computes
// what these positions get, which comes from few taps, keeps it, and adds it to the pixels that they mirror.
#pragma once

#include "patchwise.cuh"

// Numbers of the positions around a tile that lie beyond the image, or would if it ended there.
struct Beyond {
    int rows, columns, radius;  // of the tile

    __device__ int number(int y, int x) const {
        if (y >= 0 && y < rows)
            return 2 * radius * (pitch() + y) + (x < 0 ? x : x - columns) + radius;
        return ((y < 0 ? y : y - rows) + radius) * pitch() + x + radius;
    }

  private:
    __device__ int pitch() const { return columns + 2 * radius; }
};

// One of the nine parts of a tile with what lies beyond the image around it, and the taps by which
// windows in the image read it. Where neighbours are taken in pairs, it begins at an even place, and more
// positions than there are fill it up.
struct Region {
    static constexpr int ALL = 9, MIDDLE = 4;
    int top, left, rows, columns;  // the first two relative to the tile
    int first_dy, last_dy, first_dx, last_dx;
    int begin, end;  // columns that exist
    int staged_columns, radius;

    __device__ Region(const Shape& shape, const Tile& tile, int number, int radius,
                      bool pairs = false)
        : staged_columns(tile.filled + 2 * radius), radius(radius) {
        side(number / 3, radius, tile.rows, tile.top == 0, tile.top + tile.rows == shape.height, top,
             rows, first_dy, last_dy);
        side(number % 3, radius, tile.columns, tile.left == 0,
             tile.left + tile.columns == shape.width, left, columns, first_dx, last_dx);
        begin = left;
        end = left + columns;
        if (!pairs || columns == 0) return;
        // Windows then begin at even places, too; one tap more meets zeros.
        last_dx += last_dx % 2;
        left = (left + 4) / 2 * 2 - 4;
        columns = (end - left + 1) / 2 * 2;
    }

    __device__ int count() const { return rows * columns; }
    __device__ int products() const { return (count() + PIXELS - 1) / PIXELS; }

    __device__ bool exists(int i) const {
        const int x = left + i % columns;
        return i < count() && x >= begin && x < end;
    }

    // Where the window lies that reads position i by tap (0, 0), in a tile staged with its halo.
    __device__ int window(int i) const { return place(i) + radius * staged_columns + radius; }

    // The number of position i among those beyond the image.
    __device__ int beyond(const Tile& tile, int i) const {
        return Beyond{tile.rows, tile.columns, radius}.number(top + i / columns, left + i % columns);
    }

    // Position i among those of the tile and its halo; for one beyond the last, that of another, so that
    // neighbours stay so.
    __device__ int place(int i) const {
        i = i < count() ? i : max(count() - 2 + i % 2, 0);
        return (top + i / columns + radius) * staged_columns + left + i % columns + radius;
    }

  private:
    static __device__ void side(int part, int radius, int length, bool at_start, bool at_end,
                                int& start, int& extent, int& first, int& last) {
        start = part == 0 ? -radius : part == 1 ? 0 : length;
        extent = part == 1 ? length : (part == 0 ? at_start : at_end) ? radius : 0;
        first = part == 2 ? radius + 1 : 0;
        last = part == 0 ? radius - 1 : 2 * radius;
    }
};

// The numbers of the positions beyond the image that mirror pixel i of the tile, by reflection `down` of its
// row and all those of its column; -1 for one that there is not. Returns whether there may be any.
__device__ inline bool find_mirrored(const Shape& shape, const Tile& tile, int radius, int i,
                                     int down, int (&numbers)[IMAGES<true>]) {
    const Beyond beyond{tile.rows, tile.columns, radius};
    int row, column;
    if (!image<true>(tile.top + i / tile.filled, shape.height, radius, down, row)) return false;
#pragma unroll
    for (int across = 0; across < IMAGES<true>; ++across) {
        const bool exists =
            image<true>(tile.left + i % tile.filled, shape.width, radius, across, column) &&
            down + across > 0;
        numbers[across] = exists ? beyond.number(row - tile.top, column - tile.left) : -1;
    }
    return true;
}

// Lets the block's warps share the products of all regions but the middle one.
template <typename Compute>
__device__ inline void compute_mirrors(const Shape& shape, const Tile& tile, int radius,
                                       bool pairs, Compute compute) {
    int product = threadIdx.x / 32;
    for (int number = 0; number < Region::ALL; ++number) {
        if (number == Region::MIDDLE) continue;
        const Region region(shape, tile, number, radius, pairs);
        for (; product < region.products(); product += blockDim.x / 32) compute(region, product);
        product -= region.products();
    }
    __syncthreads();
}
