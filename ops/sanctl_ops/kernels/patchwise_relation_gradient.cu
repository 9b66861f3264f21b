// The gradients of patchwise attention's query and key. A key gathers from all pixels whose windows read
// it: for every tap a product of the hidden values' gradients with the first convolution, cut off where
// the relation was. What the batch's statistics take back is added at the end, once for a pixel.
#include "patchwise_folded.cuh"

constexpr int THREADS = 256;

// Relation channels, 8 each, that a block computes at once.
template <int WT>
constexpr int AT_ONCE = WT == 1 ? 2 : 4;

// Products of 16 pixels that a warp makes at once.
template <int WT>
constexpr int TOGETHER = WT == 8 ? 1 : 2;

// What a lane holds of 16 pixels: pixels l / 4 and l / 4 + 8, and of every 8 channels 2 * (l % 4) and the
// next one: the relation in units, and its gradient.
template <int WT>
struct Related {
    unsigned units[AT_ONCE<WT>][2];
    float sums[AT_ONCE<WT>][4];
};

// The relation's sign and threshold, and the first convolution's transpose (see patchwise_fold.cu), of 8
// channels at one tap, as a lane holds them.
template <int WT>
struct Eighth {
    Vector<unsigned, 2> line;
    Vector<unsigned, WT> weights;

    __device__ void add(const Rows<WT>& rows, const unsigned (&units)[2], float (&sums)[4]) const {
        float slopes[4] = {};
        rows.multiply(slopes, weights);
#pragma unroll
        for (int half = 0; half < 2; ++half)
            add_where(fma_relu_halves(line.at[0], units[half], line.at[1]), slopes[2 * half],
                      slopes[2 * half + 1], sums[2 * half], sums[2 * half + 1]);
    }
};

// Those of the channels that a block computes. They are too many for a cache near by, so that those of
// the next tap are loaded before they are needed.
template <int WT>
struct Convolution {
    const Vector<unsigned, 2>* lines;
    const Vector<unsigned, WT>* weights;
    int line_step, weight_step;  // to the next tap
    Eighth<WT> held[AT_ONCE<WT>];

    // `first` counts 8 channels each, of `tiles` of 16.
    __device__ Convolution(const Half* affine, const Half* turned, int tiles, int first, int lane)
        : lines(reinterpret_cast<const Vector<unsigned, 2>*>(affine) + first * 4 + lane % 4 * 2),
          weights(reinterpret_cast<const Vector<unsigned, WT>*>(turned) + first * 32 + lane),
          line_step(tiles * 8), weight_step(tiles * 64) {
#pragma unroll
        for (int r = 0; r < AT_ONCE<WT>; ++r) load(r);
    }

    // Adds the present tap's share, and goes on to the next tap.
    __device__ void add(const Rows<WT> (&rows)[TOGETHER<WT>], Related<WT> (&related)[TOGETHER<WT>],
                        bool last) {
        lines += last ? 0 : line_step;
        weights += last ? 0 : weight_step;
#pragma unroll
        for (int r = 0; r < AT_ONCE<WT>; ++r) {
#pragma unroll
            for (int m = 0; m < TOGETHER<WT>; ++m)
                held[r].add(rows[m], related[m].units[r], related[m].sums[r]);
            load(r);
        }
    }

  private:
    __device__ void load(int r) { held[r] = {lines[r / 2 * 8 + r % 2], weights[r * 32]}; }
};

// Two neighbouring channels of one pixel, by one access if `together`; zeros beyond `count`.
template <typename T>
__device__ inline void load_two(const T* from, int count, bool together, float (&values)[2]) {
    if (together && count > 0) return load<2>(from, values);
    values[0] = count > 0 ? widen(from[0]) : 0.0f;
    values[1] = count > 1 ? widen(from[1]) : 0.0f;
}

// An image, what it is measured in, and what statistics take back from a gradient: for channel c of
// pixel p, steady[p * step + c] + tilt[p * step + c] * (x - pivot).
template <typename T>
struct Image {
    const T* pixels;
    int pitch, channels;
    bool together;  // whether one access may move two channels
    Units units;
    const float *steady, *tilt;
    int step;

    __device__ unsigned in_units(int pixel, int channel) const {
        float x[2];
        centred(pixel, channel, x);
        return pack_units(x[0] * units.units[channel], x[1] * units.units[channel + 1]);
    }

    __device__ void write(T* out, int pixel, int channel, const float* sums) const {
        const int count = channels - channel;
        if (count <= 0) return;
        float gradient[2];
        load<2>(units.units + channel, gradient);
#pragma unroll
        for (int e = 0; e < 2; ++e) gradient[e] *= sums[e];
        if (steady) {
            float x[2], offsets[2], slopes[2];
            const long long from = static_cast<long long>(pixel) * step + channel;
            centred(pixel, channel, x);
            load_two(steady + from, count, channels % 2 == 0, offsets);
            load_two(tilt + from, count, channels % 2 == 0, slopes);
#pragma unroll
            for (int e = 0; e < 2; ++e) gradient[e] -= offsets[e] + slopes[e] * x[e];
        }
        T* to = out + static_cast<long long>(pixel) * channels + channel;
        if (channels % 2 == 0) return store<2>(to, gradient);
        to[0] = narrow<T>(gradient[0]);
        if (count > 1) to[1] = narrow<T>(gradient[1]);
    }

  private:
    // Less the pivots, which are zero for channels that there are not.
    __device__ void centred(int pixel, int channel, float (&x)[2]) const {
        float pivots[2];
        load_two(pixels + static_cast<long long>(pixel) * pitch + channel, channels - channel,
                 together, x);
        load<2>(units.pivots + channel, pivots);
#pragma unroll
        for (int e = 0; e < 2; ++e) x[e] -= pivots[e];
    }
};

// The products of one warp: the first one's number, and where its rows and channels lie for a lane.
template <typename T, int WT>
struct Products {
    static constexpr int M = TOGETHER<WT>, N = AT_ONCE<WT>;
    const Shape& shape;
    const Tile& tile;
    int first, channel;

    // The pixel of the image that is row l / 4 + 8 * half of product m; false where there is no such one.
    __device__ bool pixel(int m, int half, int& pixel) const {
        const int i = (first + m) * PIXELS + half * 8 + threadIdx.x % 32 / 4;
        pixel = tile.pixel(shape, i);
        return i < tile.count();
    }

    __device__ void begin(const Image<T>& image, Related<WT> (&related)[M]) const {
#pragma unroll
        for (int k = 0; k < 2 * M * N; ++k) {
            auto& own = related[k / 2 / N];
            const int half = k % 2, r = k / 2 % N;
            int from;
            pixel(k / 2 / N, half, from);
            own.units[r][half] = image.in_units(from, channel + r * 8);
            own.sums[r][2 * half] = own.sums[r][2 * half + 1] = 0;
        }
    }

    __device__ void write(const Image<T>& image, const Related<WT> (&related)[M], float factor,
                          T* out) const {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int to;
                if (!pixel(m, half, to)) continue;
#pragma unroll
                for (int r = 0; r < N; ++r) {
                    const float* from = related[m].sums[r] + 2 * half;
                    const float sums[2] = {from[0] * factor, from[1] * factor};
                    image.write(out, to, channel + r * 8, sums);
                }
            }
    }
};

// A block takes AT_ONCE * 8 channels (part blockIdx.x % parts) of a tile, all warps at once. `taken` holds
// what statistics take back, if `closed`: 2 x HW x relation for the key, then 2 x relation for the query.
// `out` and `out_query` are dense.
template <typename T, int K, int WT>
__global__ void __launch_bounds__(THREADS, WT == 1 ? 3 : 2)
    patchwise_relation_gradient(const T* query, const T* key, const float* units, const Half* affine,
                                const Half* weights, const Half* gradient, const float* scales,
                                const float* taken, T* out_query, T* out, Shape shape, int parts,
                                int closed) {
    using Lines = FoldedLines<K>;
    constexpr int M = TOGETHER<WT>, WIDTH = WT * CHANNELS;
    constexpr int PITCH = HIDDEN_PITCH<WT> * static_cast<int>(sizeof(Half));
    extern __shared__ double shared[];
    Half* staged = reinterpret_cast<Half*>(shared);
    const int lane = threadIdx.x % 32, tiles = shape.relation_tiles, plane = shape.pixels();
    const int first = blockIdx.x % parts * AT_ONCE<WT>;
    const Tile tile(shape, blockIdx.x / parts);
    const FoldedTile<K> folded(shape, tile);
    const long long before = static_cast<long long>(tile.n) * plane;
    const float* none = nullptr;
    const Image<T> keys{key + before * shape.key_pitch,
                        shape.key_pitch,
                        shape.relation,
                        shape.relation_vector > 1,
                        Units(units, false, tiles),
                        closed ? taken : none,
                        taken + plane * shape.relation,
                        shape.relation};
    const float* of_query = taken + 2 * plane * shape.relation;
    const Image<T> queries{query + before * shape.query_pitch,
                           shape.query_pitch,
                           shape.relation,
                           shape.relation_vector > 1,
                           Units(units, true, tiles),
                           closed ? of_query : none,
                           of_query + shape.relation,
                           0};
    const Products<T, WT> products{shape, tile, static_cast<int>(threadIdx.x) / 32 * M,
                                   first * 8 + lane % 4 * 2};
    Convolution<WT> convolution(affine, weights, tiles, first, lane);
    Related<WT> related[M];
    products.begin(keys, related);
    stage_folded<K, WT>(staged, gradient + before * WIDTH, folded);
    const int line = folded.columns.count() * PITCH;
    const unsigned start = shared_address(staged + channel_of_lane<WT>(lane));
    int row[M], column[M], across[M][K];
#pragma unroll
    for (int m = 0; m < M; ++m) {
        const int i = min((products.first + m) * PIXELS + row_of_lane(lane), tile.count() - 1);
        row[m] = i / tile.columns;
        column[m] = i % tile.columns;
#pragma unroll
        for (int dx = 0; dx < K; ++dx) across[m][dx] = folded.columns.place(column[m], dx) * PITCH;
    }
    Rows<WT> rows[M];
#pragma unroll 1
    for (int dy = 0; dy < K; ++dy) {
        unsigned from[M];
#pragma unroll
        for (int m = 0; m < M; ++m) from[m] = start + folded.rows.place(row[m], dy) * line;
#pragma unroll
        for (int dx = 0; dx < K; ++dx) {
#pragma unroll
            for (int m = 0; m < M; ++m) rows[m].load(from[m] + across[m][dx]);
            convolution.add(rows, related, false);
        }
    }
    products.write(keys, related, scales[1], out + before * shape.relation);
    products.begin(queries, related);
#pragma unroll
    for (int m = 0; m < M; ++m)
        rows[m].load(start + (Lines::BESIDE + row[m]) * line + (Lines::BESIDE + column[m]) * PITCH);
    convolution.add(rows, related, true);
    products.write(queries, related, scales[1], out_query + before * shape.relation);
}
