// The gradients of patchwise attention's query and key. A key gathers from all pixels whose windows read
// it: for every tap a product of the hidden values' gradients with the first convolution, cut off where
// the relation was. What the batch's statistics take back is added at the end, once for a pixel.
#include "patchwise_regions.cuh"

constexpr int THREADS = 256;

// Relation channels, 8 each, that a block computes at once.
template <int WT>
constexpr int AT_ONCE = WT == 1 ? 2 : WT == 2 ? 4 : 8;

// What a lane holds of 16 pixels: pixels l / 4 and l / 4 + 8, and of every 8 channels 2 * (l % 4) and the
// next one: the relation in units, and its gradient.
template <int WT>
struct Related {
    unsigned units[AT_ONCE<WT>][2];
    float sums[AT_ONCE<WT>][4];
};

// The relation's signs and thresholds, and the first convolution's transpose (see patchwise_fold.cu), of
// the channels that a block computes, as a lane holds them.
template <int WT>
struct Convolution {
    const Vector<unsigned, 2>* lines;
    const Vector<unsigned, WT>* weights;
    int tiles;  // of 16 relation channels

    // `first` counts 8 channels each.
    __device__ Convolution(const Half* affine, const Half* turned, int tiles, int first, int lane)
        : lines(reinterpret_cast<const Vector<unsigned, 2>*>(affine) + first * 4 + lane % 4 * 2),
          weights(reinterpret_cast<const Vector<unsigned, WT>*>(turned) + first * 32 + lane),
          tiles(tiles) {}

    // Adds one tap's share.
    __device__ void add(const Rows<WT>& rows, int tap, Related<WT>& related) const {
        const auto line = lines + tap * tiles * 8;
        const auto weight = weights + tap * tiles * 64;
#pragma unroll
        for (int r = 0; r < AT_ONCE<WT>; ++r) {
            const Vector<unsigned, 2> factors = line[r / 2 * 8 + r % 2];
            float slopes[4] = {};
            rows.multiply(slopes, weight[r * 32]);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const unsigned kept =
                    fma_relu_halves(factors.at[0], related.units[r][half], factors.at[1]);
                add_where(kept, slopes[2 * half], slopes[2 * half + 1],
                          related.sums[r][2 * half], related.sums[r][2 * half + 1]);
            }
        }
    }
};

// Two channels of one pixel: zeros where it has none.
template <typename T>
__device__ inline void load_two(const T* pixel, int channel, int channels, float (&values)[2]) {
    values[0] = channel < channels ? widen(pixel[channel]) : 0.0f;
    values[1] = channel + 1 < channels ? widen(pixel[channel + 1]) : 0.0f;
}

// An image, what it is measured in, and what statistics take back from a gradient: for channel c of
// pixel p, steady[p * step + c] + tilt[p * step + c] * (x - pivot).
template <typename T>
struct Image {
    const T* pixels;
    int pitch, channels;
    Units units;
    const float *steady, *tilt;
    int step;

    __device__ unsigned in_units(int pixel, int channel) const {
        float x[2];
        load_two(pixels + static_cast<long long>(pixel) * pitch, channel, channels, x);
#pragma unroll
        for (int e = 0; e < 2; ++e)
            x[e] = channel + e < channels
                       ? (x[e] - units.pivots[channel + e]) * units.units[channel + e]
                       : 0;
        return pack_halves(x[0], x[1]);
    }

    __device__ void write(T* out, int pixel, int channel, const float* sums) const {
        float x[2];
        load_two(pixels + static_cast<long long>(pixel) * pitch, channel, channels, x);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int c = channel + e;
            if (c >= channels) break;
            float gradient = sums[e] * units.units[c];
            if (steady)
                gradient -= steady[static_cast<long long>(pixel) * step + c] +
                            tilt[static_cast<long long>(pixel) * step + c] *
                                (x[e] - units.pivots[c]);
            out[static_cast<long long>(pixel) * channels + c] = narrow<T>(gradient);
        }
    }
};

// A block takes AT_ONCE * 8 channels (part blockIdx.x % parts) of the tiles blockIdx.x / parts, that plus
// `blocks`, and so on. What positions beyond the image get lies at mirrors[blockIdx.x * mirror_pitch].
// `taken` holds what statistics take back, if `closed`: 2 x HW x relation for the key, then 2 x relation
// for the query. `out` and `out_query` are dense.
template <typename T, int K, int WT>
__global__ void __launch_bounds__(THREADS, WT == 1 ? 3 : 2)
    patchwise_relation_gradient(const T* query, const T* key, const float* units, const Half* affine,
                                const Half* weights, const Half* gradient, const float* scales,
                                const float* taken, float* mirrors, T* out_query, T* out,
                                Shape shape, int parts, int blocks, int mirror_pitch, int closed) {
    constexpr int RADIUS = K / 2, WIDTH = WT * CHANNELS, N = AT_ONCE<WT>;
    extern __shared__ double shared[];
    Half* staged = reinterpret_cast<Half*>(shared);
    const int lane = threadIdx.x % 32, tiles = shape.relation_tiles;
    const int first = blockIdx.x % parts * N;
    const Convolution<WT> convolution(affine, weights, tiles, first, lane);
    const int channel = first * 8 + lane % 4 * 2, plane = shape.pixels();
    const float* none = nullptr;
    const float inverse = scales[1];
    mirrors += static_cast<long long>(blockIdx.x) * mirror_pitch;
    for (int number = blockIdx.x / parts; number < shape.images * shape.tiles(); number += blocks) {
        const Tile tile(shape, number);
        const long long before = static_cast<long long>(tile.n) * plane;
        const Image<T> keys{key + before * shape.key_pitch, shape.key_pitch, shape.relation,
                            Units(units, false, tiles), closed ? taken : none,
                            taken + plane * shape.relation, shape.relation};
        const float* taken_from_query = taken + 2 * plane * shape.relation;
        const Image<T> queries{query + before * shape.query_pitch, shape.query_pitch, shape.relation,
                               Units(units, true, tiles), closed ? taken_from_query : none,
                               taken_from_query + shape.relation, 0};
        __syncthreads();
        stage_halves(staged, HIDDEN_PITCH<WT>, gradient + before * WIDTH, WIDTH, shape, tile, RADIUS);
        __syncthreads();
        const auto gather = [&](const Region& region, int product, Related<WT>& related) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int i = min(product * PIXELS + half * 8 + lane / 4, region.count() - 1);
                const int y = source<true>(tile.top + region.top + i / region.columns, shape.height);
                const int x = source<true>(tile.left + region.left + i % region.columns, shape.width);
#pragma unroll
                for (int r = 0; r < N; ++r) {
                    related.units[r][half] = keys.in_units(y * shape.width + x, channel + r * 8);
                    related.sums[r][2 * half] = related.sums[r][2 * half + 1] = 0;
                }
            }
            const unsigned window = shared_address(
                staged + channel_of_lane<WT>(lane) +
                region.window(product * PIXELS + row_of_lane(lane)) * HIDDEN_PITCH<WT>);
            for (int dy = region.first_dy; dy <= region.last_dy; ++dy)
                for (int dx = region.first_dx; dx <= region.last_dx; ++dx) {
                    Rows<WT> rows;
                    rows.load(window - (dy * region.staged_columns + dx) * HIDDEN_PITCH<WT> *
                                           static_cast<int>(sizeof(Half)));
                    convolution.add(rows, dy * K + dx, related);
                }
        };
        compute_mirrors(shape, tile, RADIUS, false, [&](const Region& region, int product) {
            Related<WT> related;
            gather(region, product, related);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int i = product * PIXELS + half * 8 + lane / 4;
                if (i >= region.count()) continue;
                float* to = mirrors + region.place(i) * N * 8 + lane % 4 * 2;
#pragma unroll
                for (int r = 0; r < N; ++r) store<2>(to + r * 8, related.sums[r] + 2 * half);
            }
        });
        const Region middle(shape, tile, Region::MIDDLE, RADIUS);
        for (int m = threadIdx.x / 32; m < tile.products(); m += blockDim.x / 32) {
            Related<WT> related;
            gather(middle, m, related);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int i = m * PIXELS + half * 8 + lane / 4;
                if (i >= tile.count()) continue;
                visit_mirrored(shape, tile, RADIUS, i, [&](int place) {
#pragma unroll
                    for (int r = 0; r < N; ++r)
#pragma unroll
                        for (int e = 0; e < 2; ++e)
                            related.sums[r][2 * half + e] +=
                                mirrors[(place * N + r) * 8 + lane % 4 * 2 + e];
                });
                const int pixel = tile.pixel(shape, i);
#pragma unroll
                for (int r = 0; r < N; ++r) {
                    const float sums[2] = {related.sums[r][2 * half] * inverse,
                                           related.sums[r][2 * half + 1] * inverse};
                    keys.write(out + before * shape.relation, pixel, channel + r * 8, sums);
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int pixel = tile.pixel(shape, m * PIXELS + half * 8 + lane / 4);
#pragma unroll
                for (int r = 0; r < N; ++r) {
                    related.units[r][half] = queries.in_units(pixel, channel + r * 8);
                    related.sums[r][2 * half] = related.sums[r][2 * half + 1] = 0;
                }
            }
            Rows<WT> rows;
            rows.load(shared_address(
                staged + channel_of_lane<WT>(lane) +
                tile.place(m * PIXELS + row_of_lane(lane), RADIUS) * HIDDEN_PITCH<WT>));
            convolution.add(rows, K * K, related);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int i = m * PIXELS + half * 8 + lane / 4;
                if (i >= tile.count()) continue;
#pragma unroll
                for (int r = 0; r < N; ++r) {
                    const float sums[2] = {related.sums[r][2 * half] * inverse,
                                           related.sums[r][2 * half + 1] * inverse};
                    queries.write(out_query + before * shape.relation, tile.pixel(shape, i),
                                  channel + r * 8, sums);
                }
            }
        }
    }
}
