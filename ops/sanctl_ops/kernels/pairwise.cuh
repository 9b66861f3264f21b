// What the kernels of pairwise attention have in common: tiles of pixels, the relation behind the
// first normalisation as fragments of matrices, and packed weights.
//
// Query and key come folded: two planes of halves, (N, H * W, REL + 8), whose channels are
// [relation | 2 positions, 1, zeros], such that z = relu(query - key) but for the last 8 channels,
// which are multiplied and shifted after subtracting: differences of positions are small beside the
// positions. With REL = 0, all channels are among these 8. The constant channel makes the second
// normalisation's shift, and sums over z, come out of the same products.
//
// A warp takes 16 pixels and goes through their K * K taps. Fragments are laid out as the PTX manual
// describes mma.m16n8k16: lane l holds of an 8 x 8 matrix two neighbours of row l / 4, in columns
// 2 * (l % 4) and the next one; here such a matrix is called a block.
//
// Two kinds of walks: over queries, whose neighbours are keys, reflected outside; and over keys in
// the padded plane, from -K / 2 on, whose neighbours are the queries that have them in their windows.
#pragma once

#include "window.cuh"

constexpr int GROUP = 16;  // pixels of a warp
constexpr int TAIL = 8;    // channels behind those of the relation

// Blocks of channels of a fragment with REL + TAIL channels.
template <int REL>
constexpr int CHUNKS = (REL + TAIL) / 8;

// Hidden channels, padded: what the second convolution sums over.
template <int REL>
constexpr int HIDDEN = REL > 0 ? REL : 8;

// Blocks of weight channels.
template <int REL>
constexpr int SLABS = REL > 16 ? REL / 16 : 1;

// Threads of a block that walks over relations, at most, and blocks of a multiprocessor, at least: what
// many channels take of registers leaves room for few warps, which small blocks fill.
template <int REL>
constexpr int RELATION_THREADS = REL > 16 ? 128 : 256;
template <int REL>
constexpr int RELATION_BLOCKS = REL == 32 ? 3 : 2;

// How a walk over planes is cut into tiles; laid out as TILING in pairwise.py.
struct Tiling {
    Divisor across, down;  // tiles of an image
    Divisor columns;       // of a tile
    Divisor staged;        // columns of a tile and of what its windows reach
    int rows;              // of a tile
    int height, width;     // of the planes
};

// One tile: its first row and column, in the padded plane where the walk is over KEYS.
struct Place {
    int n, top, left;

    __device__ Place(unsigned tile, const Tiling& tiling) {
        left = tiling.across.divide(tile) * tiling.columns.divisor;
        top = tiling.down.divide(tile) * tiling.rows;
        n = tile;
    }
};

// A pixel of a tile; the tile's first one in place of one that does not exist.
template <int K, bool KEYS>
struct Pixel {
    static constexpr int RADIUS = K / 2;
    int row, column;  // in the tile
    int y, x;         // in the plane of queries or, padded, of keys
    bool exists;

    __device__ Pixel(unsigned number, const Place& place, const Tiling& tiling) {
        row = number;
        unsigned quotient = number;
        column = tiling.columns.divide(quotient);
        row = quotient;
        const int more = KEYS ? 2 * RADIUS : 0;
        exists = row < tiling.rows && place.top + row < tiling.height + more &&
                 place.left + column < tiling.width + more;
        if (!exists) row = column = 0;
        y = place.top + row;
        x = place.left + column;
    }

    // Its number in the plane; of keys, that of the pixel shown there.
    __device__ int number(const Tiling& tiling) const {
        if (!KEYS) return y * tiling.width + x;
        return source<true>(y - RADIUS, tiling.height) * tiling.width +
               source<true>(x - RADIUS, tiling.width);
    }

    // Its number in the padded plane.
    __device__ int padded_number(const Tiling& tiling) const {
        return y * (tiling.width + 2 * RADIUS) + x;
    }

    // The number of its first neighbour in the staged tile; that of step (i, j) lies i rows and j
    // columns further.
    __device__ int staged_number(const Tiling& tiling) const {
        return row * tiling.staged.divisor + column;
    }

    // Over keys, bit j tells whether there are queries in the column of steps (i, j).
    __device__ unsigned columns_of_queries(const Tiling& tiling) const {
        unsigned exist = 0;
#pragma unroll
        for (int j = 0; j < K; ++j) {
            const int query = x - 2 * RADIUS + j;
            exist |= (query >= 0 && query < tiling.width) << j;
        }
        return exist;
    }

    // Over keys, whether there are queries in the row of steps (i, j).
    __device__ bool row_of_queries(int i, const Tiling& tiling) const {
        const int query = y - 2 * RADIUS + i;
        return query >= 0 && query < tiling.height;
    }
};

// Where a walk over keys is in what is stored for every tap and query, (K * K, H * W, slots).
template <int K>
struct KeyWalk {
    unsigned for_tap, for_row;  // what is added for every step, and for every row of them

    __device__ KeyWalk(const Tiling& tiling, int slots) {
        const unsigned plane = tiling.height * tiling.width;
        for_tap = (1 - plane) * slots;
        for_row = (tiling.width - K) * slots;
    }

    // The first step is to the query above and left of the key, whose last tap it is.
    __device__ static unsigned first(const Pixel<K, true>& pixel, const Tiling& tiling, int slots) {
        const unsigned plane = tiling.height * tiling.width;
        return ((K * K - 1) * plane + (pixel.y - K + 1) * tiling.width + pixel.x - K + 1) * slots;
    }

    // What step (i, j) lies behind the first one.
    __device__ unsigned step(int i, int j) const { return (i * K + j) * for_tap + i * for_row; }
};

// Pixels of a staged tile.
template <int K>
__device__ inline int staged_pixels(const Tiling& tiling) {
    return (tiling.rows + K - 1) * tiling.staged.divisor;
}

// One of them: its number in the plane, and whether it exists.
template <int K, bool KEYS>
struct StagedPixel {
    int number;
    bool exists = true;

    __device__ StagedPixel(int at, const Place& place, const Tiling& tiling) {
        constexpr int BEFORE = KEYS ? K - 1 : K / 2;
        unsigned line = at;
        int x = place.left - BEFORE + static_cast<int>(tiling.staged.divide(line));
        int y = place.top - BEFORE + static_cast<int>(line);
        if (KEYS) {
            exists = y >= 0 && y < tiling.height && x >= 0 && x < tiling.width;
            if (!exists) x = y = 0;
        } else {
            // What ragged tiles reach beyond the reflected pixels is not used.
            y = max(source<true>(y, tiling.height), 0);
            x = max(source<true>(x, tiling.width), 0);
        }
        number = y * tiling.width + x;
    }
};

// Hands every pixel of a staged tile to visit(where in the tile, number in the plane, existing).
template <int K, bool KEYS, typename Visit>
__device__ inline void visit_staged(const Place& place, const Tiling& tiling, int first, int step,
                                    Visit visit) {
    const int count = staged_pixels<K>(tiling);
    for (int i = first; i < count; i += step) {
        const StagedPixel<K, KEYS> pixel(i, place, tiling);
        visit(i, pixel.number, pixel.exists);
    }
}

// Copies the folded keys that a tile's windows reach.
template <int REL, int K>
__device__ inline void stage_relation(const Half* keys, Half* to, const Place& place,
                                      const Tiling& tiling) {
    constexpr int SIZE = REL + TAIL;
    const Half* image = keys + static_cast<long long>(place.n) * tiling.height * tiling.width * SIZE;
    visit_staged<K, false>(place, tiling, threadIdx.x, blockDim.x, [&](int at, int number, bool) {
#pragma unroll
        for (int c = 0; c < SIZE; c += 8)
            copy_async<8>(to + at * SIZE + c, image + number * SIZE + c);
    });
    end_group();
    wait_for_groups<0>();
    __syncthreads();
}

__device__ inline unsigned pair_at(const Half* from) {
    return *reinterpret_cast<const unsigned*>(from);
}

// The relation of 16 pixels to one neighbour of each, in blocks of 8 pixels and 8 channels: block
// [c][h] has pixels h * 8 on, channels c * 8 on. TRANSPOSED ones have a channel in every row.
template <int REL, bool TRANSPOSED>
struct Relation {
    static constexpr int SIZE = REL + TAIL;
    unsigned centre[CHUNKS<REL>][2];
    unsigned scale, shift;  // of the tail
    unsigned from;          // shared address of this lane's row of the first neighbours

    // `affine` holds 8 factors and 8 summands; `pixels` are the lane's, l / 4 and l / 4 + 8 or, if
    // transposed, those in its columns; `row` is pixel l % 16.
    template <typename P>
    __device__ Relation(const Half* centres, const Half* affine, const Half* staged, int lane,
                        const P& row, const Tiling& tiling) {
        from = shared_address(staged) + row.staged_number(tiling) * SIZE * 2 + lane / 16 * 16;
        if (TRANSPOSED) {
            scale = affine[lane / 4].bits * 0x10001u;
            shift = affine[TAIL + lane / 4].bits * 0x10001u;
        } else {
            scale = pair_at(affine + lane % 4 * 2);
            shift = pair_at(affine + TAIL + lane % 4 * 2);
        }
    }

    // Takes the pixel of rows l / 4 (h = 0) or l / 4 + 8, at its place in the folded plane.
    __device__ void take_centre(int h, const Half* pixel, int lane) {
#pragma unroll
        for (int c = 0; c < CHUNKS<REL>; ++c) centre[c][h] = pair_at(pixel + c * 8 + lane % 4 * 2);
    }

    // Takes a transposed block's two columns, 2 * (l % 4) and the next one. Where `exist` has zeros,
    // z will be zero but for the tail.
    __device__ void take_centres(int h, const Half* first, const Half* second, unsigned exist,
                                 int lane) {
        constexpr unsigned LEAST = 0xfb53fb53;  // -60000
#pragma unroll
        for (int c = 0; c < CHUNKS<REL>; ++c)
            centre[c][h] = (first[c * 8 + lane / 4].bits |
                            static_cast<unsigned>(second[c * 8 + lane / 4].bits) << 16) & exist |
                           LEAST & ~exist;
    }

    // Computes z for neighbours `offset` bytes behind the first ones.
    __device__ void compute(int offset, unsigned (&z)[CHUNKS<REL>][2]) const {
        constexpr unsigned MINUS_ONE = 0xbc00bc00;
#pragma unroll
        for (int c = 0; c + 1 < CHUNKS<REL>; c += 2) {
            unsigned other[4];
            load_matrices<TRANSPOSED>(from + offset + c * 16, other);
#pragma unroll
            for (int b = 0; b < 4; ++b) {
                const unsigned own = centre[c + b / 2][b % 2];
                z[c + b / 2][b % 2] = multiply_add_relu_pairs(other[b], MINUS_ONE, own);
            }
        }
        constexpr int LAST = CHUNKS<REL> - 1;
        unsigned other[2];
        load_matrices<TRANSPOSED>(from + offset + LAST * 16, other);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const unsigned apart = subtract_pairs(centre[LAST][h], other[h]);
            z[LAST][h] = multiply_add_relu_pairs(apart, scale, shift);
        }
    }
};

// Weights as blocks of 8 rows and 8 columns, ROWS x COLUMNS of them, in the order in which lanes read
// them: four columns of blocks together, 16 bytes of a lane. KEPT ones stay in registers.
template <int ROWS, int COLUMNS, bool KEPT>
struct Blocks {
    static constexpr int FOURS = (COLUMNS + 3) / 4;
    static constexpr int ELEMENTS = ROWS * FOURS * 256;
    using Four = Vector<unsigned, 4>;
    const Four* from;
    unsigned kept[KEPT ? ROWS : 1][KEPT ? FOURS * 4 : 1];

    __device__ Blocks(const Half* packed, int lane)
        : from(reinterpret_cast<const Four*>(packed) + lane) {
        if constexpr (KEPT)
#pragma unroll
            for (int r = 0; r < ROWS; ++r) fetch(r, kept[r]);
    }

    __device__ void fetch(int row, unsigned (&blocks)[FOURS * 4]) const {
#pragma unroll
        for (int f = 0; f < FOURS; ++f) {
            const Four four = from[(row * FOURS + f) * 32];
#pragma unroll
            for (int c = 0; c < 4; ++c) blocks[f * 4 + c] = four.at[c];
        }
    }

    // Reads a row of blocks, which must be known when compiling if they are kept.
    __device__ void read(int row, unsigned (&blocks)[FOURS * 4]) const {
        if constexpr (KEPT)
#pragma unroll
            for (int c = 0; c < FOURS * 4; ++c) blocks[c] = kept[row][c];
        else
            fetch(row, blocks);
    }
};

// Adds (16 pixels x COUNT blocks of channels) * (transposed row of blocks, from FIRST on).
template <int COUNT, int FIRST, int WIDE, int N>
__device__ inline void multiply(float (&sums)[4], const unsigned (&a)[N][2],
                                const unsigned (&row)[WIDE]) {
#pragma unroll
    for (int c = 0; c + 1 < COUNT; c += 2)
        Mma<Half>::k16(sums, a[c][0], a[c][1], a[c + 1][0], a[c + 1][1], row[FIRST + c],
                       row[FIRST + c + 1]);
    if constexpr (COUNT % 2 == 1)
        Mma<Half>::k8(sums, a[COUNT - 1][0], a[COUNT - 1][1], row[FIRST + COUNT - 1]);
}

// The slopes of the logits of 16 pixels, read AHEAD taps before their use, as blocks of 8 pixels and 8
// slots: [slab][h] has pixels h * 8 on.
template <int SLABS, int K, int AHEAD>
struct Slopes {
    const Half* tap[2];  // what is read next, of the lane's pixels
    bool mine[2];        // whether these exist, and the lane's slots
    unsigned of_tap;     // what is stored for a tap
    unsigned next[AHEAD][SLABS][2];

    // `image` is (SLABS, K * K, pixels, slots).
    __device__ Slopes(const Half* image, const unsigned (&pixels)[2], const bool (&exist)[2],
                      unsigned of_tap, int slots, int lane)
        : of_tap(of_tap) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            tap[h] = image + pixels[h] * slots + lane % 4 * 2;
            mine[h] = exist[h] && lane % 4 * 2 < slots;
        }
#pragma unroll
        for (int v = 0; v < AHEAD; ++v) read(next[v], true);
    }

    // Reads a tap, if there is `any` behind the one before.
    __device__ void read(unsigned (&to)[SLABS][2], bool any) {
#pragma unroll
        for (int s = 0; s < SLABS; ++s)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                to[s][h] = mine[h] && any ? pair_at(tap[h] + s * K * K * of_tap) : 0;
        tap[0] += of_tap;
        tap[1] += of_tap;
    }

    // Takes the taps that come next, for which `read_ahead` will read as many.
    template <int TAPS>
    __device__ void take(unsigned (&taps)[TAPS][SLABS][2]) {
#pragma unroll
        for (int v = 0; v < AHEAD; ++v)
#pragma unroll
            for (int s = 0; s < SLABS; ++s)
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    (v < TAPS ? taps[v] : next[v - TAPS])[s][h] = next[v][s][h];
    }

    // `i` and `j` are the row and column of the first tap taken.
    template <int TAPS>
    __device__ void read_ahead(int i, int j) {
#pragma unroll
        for (int v = 0; v < TAPS; ++v)
            read(next[AHEAD - TAPS + v], AHEAD == K ? i + 1 < K : i * K + j + v + AHEAD < K * K);
    }
};

// Weights of the first convolution, which the second normalisation is folded into: a row of blocks
// for 8 hidden channels; at least two.
template <int REL>
using Weights1 = Blocks<(HIDDEN<REL> < 16 ? 16 : HIDDEN<REL>) / 8, CHUNKS<REL>, (REL <= 32)>;

template <int N>
struct Number {
    static constexpr int value = N;
};

// The largest power of two that is not above x.
__device__ inline float power_below(float x) {
    return __uint_as_float(__float_as_uint(x) & 0x7f800000);
}

// Values and slopes are halves multiplied by powers of two, found from the largest of them: sums of
// products, of 8 channels, stay in range.
__device__ inline float value_scale(const float* most) { return power_below(16 / max(*most, 1e-30f)); }

__device__ inline float slope_scale(const float* most) { return power_below(32 / max(*most, 1e-30f)); }
