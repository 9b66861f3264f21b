// Hidden values' gradients, staged for the pixels of a key that gather them. A tap multiplies all of what
// a pixel gets by the same weights and cuts it off at the same place, so that what windows read beyond the
// image is added up beforehand, with what they read at the pixel mirrored there: nothing is scattered,
// there are no atomics, and two runs give the same bits.
#pragma once

#include "patchwise.cuh"

// The rows of a tile, or its columns, as they are staged: BESIDE lines, those of the tile, BESIDE lines.
// Beside the tile lie its neighbours, or, at a border of the image, sums of two lines each: for every line
// i and tap for which two windows have that tap there, one of them by reflection. The line next to the
// tile is empty then.
template <int K>
struct FoldedLines {
    static constexpr int RADIUS = K / 2, MIRRORED = RADIUS * (RADIUS + 1) / 2, BESIDE = MIRRORED + 1;
    int start, length, side;  // the tile's first line, its lines, those of the image

    __device__ bool at_start() const { return start == 0; }
    __device__ bool at_end() const { return start + length == side; }
    __device__ int count() const { return length + 2 * BESIDE; }

    // Where that is staged which line i of the tile gets by a tap.
    __device__ int place(int i, int tap) const {
        const int centre = i + RADIUS - tap, last = count() - 1, opposite = length - 1 - i;
        if (at_start() && i > 0 && i + tap <= RADIUS) return number(i, tap);
        if (at_end() && opposite > 0 && opposite + K - 1 - tap <= RADIUS)
            return last - number(opposite, K - 1 - tap);
        if (at_start() && centre < 0) return MIRRORED;
        if (at_end() && centre >= length) return last - MIRRORED;
        return BESIDE + centre;
    }

    // The two lines of the image that are added up at a place; -1 for one that there is not.
    __device__ void sources(int place, int& first, int& second) const {
        first = second = -1;
        const bool after = place >= BESIDE + length;
        const int i = after ? count() - 1 - place : place;
        if (i >= BESIDE || !(after ? at_end() : at_start())) {
            const int line = place - BESIDE;
            if (line >= -RADIUS && line < length + RADIUS) first = source<false>(start + line, side);
            return;
        }
        if (i == MIRRORED) return;
        int line = 1, tap = i;
        for (; tap > RADIUS - line; ++line) tap -= RADIUS + 1 - line;
        first = line + RADIUS - tap;
        second = RADIUS - tap - line;
        if (first >= side) first = -1;
        else if (after) first = side - 1 - first;
        if (after) second = side - 1 - second;
    }

  private:
    // The line and tap's number among those that are added up at the start: i + tap <= RADIUS.
    static __device__ int number(int i, int tap) {
        return (i - 1) * (2 * RADIUS + 2 - i) / 2 + tap;
    }
};

template <int K>
struct FoldedTile {
    FoldedLines<K> rows, columns;

    __device__ FoldedTile(const Shape& shape, const Tile& tile)
        : rows{tile.top, tile.rows, shape.height}, columns{tile.left, tile.columns, shape.width} {}
};

using EightHalves = Vector<unsigned, 4>;

__device__ inline EightHalves add_eight(const EightHalves& a, const EightHalves& b) {
    EightHalves sum;
#pragma unroll
    for (int e = 0; e < 4; ++e) sum.at[e] = add_halves(a.at[e], b.at[e]);
    return sum;
}

// Hands numbers below `count` to visit(number, first line, step between lines): where there are more
// threads than numbers, threads share the lines.
template <typename Visit>
__device__ inline void deal_out(int count, Visit visit) {
    const int thread = threadIdx.x, threads = blockDim.x;
    const int groups = max(1, threads / count), step = groups > 1 ? count : threads;
    if (thread / step >= groups) return;
    for (int i = thread % step; i < count; i += step) visit(i, thread / step, groups);
}

// Stages a tile of an image of 8 * WT channels. Returns when all threads have.
template <int K, int WT>
__device__ inline void stage_folded(Half* to, const Half* image, const FoldedTile<K>& tile) {
    using Lines = FoldedLines<K>;
    constexpr int WIDTH = WT * CHANNELS, PITCH = HIDDEN_PITCH<WT>, BESIDE = Lines::BESIDE;
    const Lines &rows = tile.rows, &columns = tile.columns;
    const int across = columns.count();
    const int begin = rows.at_start() ? 0 : -Lines::RADIUS;
    const int end = rows.length + (rows.at_end() ? 0 : Lines::RADIUS);
    deal_out(across * WT, [&](int i, int group, int groups) {
        const int column = i / WT, chunk = i % WT * CHANNELS;
        int first, second;
        columns.sources(column, first, second);
#pragma unroll 4
        for (int row = begin + group; row < end; row += groups) {
            const Half* line =
                image + static_cast<long long>((rows.start + row) * columns.side) * WIDTH + chunk;
            EightHalves sum{};
            if (first >= 0) sum = *reinterpret_cast<const EightHalves*>(line + first * WIDTH);
            if (second >= 0)
                sum = add_eight(sum, *reinterpret_cast<const EightHalves*>(line + second * WIDTH));
            *reinterpret_cast<EightHalves*>(
                to + ((BESIDE + row) * across + column) * PITCH + chunk) = sum;
        }
    });
    __syncthreads();
    const int most = rows.at_end() ? 2 * BESIDE : BESIDE;
    deal_out(across * WT, [&](int i, int group, int groups) {
        Half* own = to + i / WT * PITCH + i % WT * CHANNELS;
        const auto at = [&](int place) -> EightHalves& {
            return *reinterpret_cast<EightHalves*>(own + place * across * PITCH);
        };
        for (int r = (rows.at_start() ? 0 : BESIDE) + group; r < most; r += groups) {
            const int place = r < BESIDE ? r : rows.length + r;
            int first, second;
            rows.sources(place, first, second);
            EightHalves sum{};
            if (first >= 0) sum = at(BESIDE + first - rows.start);
            if (second >= 0) sum = add_eight(sum, at(BESIDE + second - rows.start));
            at(place) = sum;
        }
    });
    __syncthreads();
}
