// The gradient of patchwise attention's values: a pixel gathers the gradients of the outputs whose windows
// read it, each times the weight of the tap that reads it, which is made again.
#include "patchwise_regions.cuh"
#include "patchwise_values.cuh"

constexpr int THREADS = 256;

// Rectified hidden values of a tile and the pixels around, zeros beyond the image. Those at even places
// come first, then those at odd ones: products take every second place, which then lie in different banks.
template <int WT>
struct Hidden {
    static constexpr int PITCH = HIDDEN_PITCH<WT>;
    Half* staged;
    int places;

    __device__ int offset(int place) const {
        return (place % 2 * (places / 2) + place / 2) * PITCH;
    }

    __device__ void stage(const Half* image, const Shape& shape, const Tile& tile, int halo) const {
        const int columns = tile.filled + 2 * halo;
#pragma unroll 4
        for (int i = threadIdx.x; i < places * WT; i += blockDim.x) {
            const int place = i / WT, chunk = i % WT * CHANNELS;
            const int y = source<false>(tile.top - halo + place / columns, shape.height);
            const int x = source<false>(tile.left - halo + place % columns, shape.width);
            Vector<unsigned, 4> values{};
            if (y >= 0 && x >= 0)
                values = *reinterpret_cast<const Vector<unsigned, 4>*>(
                    image + static_cast<long long>(y * shape.width + x) * WT * CHANNELS + chunk);
            *reinterpret_cast<Vector<unsigned, 4>*>(staged + offset(place) + chunk) = values;
        }
    }
};

// What the products of a block have in common.
template <int K, int WT>
struct Gathering {
    const Half* gradients;  // staged
    Hidden<WT> hidden;
    const Half* second;
    const float* bias;
    int lane;

    // Adds up what 16 positions of a region get: by all taps, where the region is the MIDDLE.
    template <bool MIDDLE>
    __device__ void gather(const Region& region, int product, Held& held) const {
        const int first_dy = MIDDLE ? 0 : region.first_dy, last_dy = MIDDLE ? K - 1 : region.last_dy;
        const int last_dx = MIDDLE ? K - 1 : region.last_dx;
        const int count = MIDDLE ? K : last_dx - region.first_dx + 1;
        const int back = first_dy * region.staged_columns + last_dx;
        int window = region.window(product * PIXELS + lane / 4 * 2) - back;
        const int row = region.window(product * PIXELS + in_pairs(row_of_lane(lane))) - back;
        constexpr int PITCH = HIDDEN_PITCH<WT> * static_cast<int>(sizeof(Half));
        // From the first place on, and from the next one on, by two places each.
        unsigned rows[2];
#pragma unroll
        for (int k = 0; k < 2; ++k)
            rows[k] = shared_address(hidden.staged + channel_of_lane<WT>(lane) +
                                     hidden.offset(row + k));
#pragma unroll 1
        for (int dy = first_dy; dy <= last_dy; ++dy) {
            const int tap = dy * K + last_dx;
            const auto make = [&](int k, float (&weights)[4]) {
                Rows<WT> of_tap;
                of_tap.load(rows[k % 2] + k / 2 * PITCH);
                make_weights(of_tap, second, bias, tap - k, lane, weights);
            };
            weigh_row<K>(Row(gradients, window, lane), count, make, held);
            window -= region.staged_columns;
#pragma unroll
            for (int k = 0; k < 2; ++k) rows[k] -= region.staged_columns / 2 * PITCH;
        }
    }
};

// What a position beyond the image gets, as halves.
__device__ inline void keep(Half* to, const float (&held)[2][SHARE]) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        Vector<unsigned, 4> halves;
#pragma unroll
        for (int g = 0; g < 4; ++g)
            halves.at[g] = pack_finite(held[e][2 * g], held[e][2 * g + 1]);
        *reinterpret_cast<Vector<unsigned, 4>*>(to + e * SHARE) = halves;
    }
}

// Adds what was kept for all positions that mirror pixels i and i + 1 of the tile. Of a row of positions
// all is loaded before any is needed.
__device__ inline void add_kept(const Shape& shape, const Tile& tile, int radius, int i,
                                const Half* mirrors, Held& held) {
    constexpr int COUNT = IMAGES<true>;
#pragma unroll 1
    for (int down = 0; down < COUNT; ++down) {
        int numbers[2][COUNT];
        if (!find_mirrored(shape, tile, radius, i, down, numbers[0])) continue;
        find_mirrored(shape, tile, radius, i + 1, down, numbers[1]);
        int last = -1;
#pragma unroll
        for (int k = 0; k < 2 * COUNT; ++k) last = max(last, numbers[k % 2][k / 2]);
        if (last < 0) continue;
        Vector<unsigned, 4> kept[2][COUNT][2];
#pragma unroll
        for (int k = 0; k < 4 * COUNT; ++k) {
            const int next = k / 2 / COUNT, across = k / 2 % COUNT, e = k % 2;
            const int number = numbers[next][across];
            kept[next][across][e] = Vector<unsigned, 4>{};
            if (number >= 0 && tile.exists(i + next))
                kept[next][across][e] = *reinterpret_cast<const Vector<unsigned, 4>*>(
                    mirrors + number * VALUES + e * SHARE);
        }
        // At most one of them is not zero, where images are larger than windows.
#pragma unroll
        for (int k = 0; k < 16; ++k) {
            const int next = k / 8, e = k / 4 % 2;
            unsigned sum = kept[next][0][e].at[k % 4];
#pragma unroll
            for (int across = 1; across < COUNT; ++across)
                sum = add_halves(sum, kept[next][across][e].at[k % 4]);
            held[next][e][k % 4 * 2] += first_of<Half>(sum);
            held[next][e][k % 4 * 2 + 1] += second_of<Half>(sum);
        }
    }
}

// A block takes the tiles blockIdx.x / WT, that plus `blocks`, and so on, of 8 weight channels. What
// positions beyond the image get lies at mirrors[blockIdx.x * mirror_pitch]. `out` is dense.
template <typename T, int K, int WT>
__global__ void __launch_bounds__(THREADS, 2)
    patchwise_value_gradient(const T* grad, const Half* rectified, const Half* second,
                             const float* bias, Half* mirrors, T* out, Shape shape, int blocks,
                             int mirror_pitch) {
    constexpr int RADIUS = K / 2, WIDTH = WT * CHANNELS;
    extern __shared__ double shared[];
    const int part = blockIdx.x % WT, lane = threadIdx.x % 32;
    const int rows = (shape.height + shape.down - 1) / shape.down + 2 * RADIUS;
    const int columns = (shape.width + shape.across - 1) / shape.across;
    float* most = reinterpret_cast<float*>(shared);
    Half* staged = reinterpret_cast<Half*>(most + 32);
    Half* rest = staged + rows * (columns + columns % 2 + 2 * RADIUS) * VALUES;
    second += part * K * K * 32 * WT * 2;
    bias += part * K * K * CHANNELS;
    mirrors += static_cast<long long>(blockIdx.x) * mirror_pitch + lane % 4 * 2 * SHARE;
    for (int number = blockIdx.x / WT; number < shape.images * shape.tiles(); number += blocks) {
        const Tile tile(shape, number, true);
        const long long before = static_cast<long long>(tile.n) * shape.pixels();
        __syncthreads();
        const float factor = stage_values<T, false, -3>(
            staged, most, grad + before * shape.grad_pitch, shape.grad_pitch, shape, tile, RADIUS,
            part * CHANNELS);
        const Hidden<WT> hidden{
            rest, (tile.rows + 2 * RADIUS) * (tile.filled + 2 * RADIUS)};
        const Gathering<K, WT> gathering{staged, hidden, second, bias, lane};
        hidden.stage(rectified + before * WIDTH, shape, tile, RADIUS);
        __syncthreads();
        compute_mirrors(shape, tile, RADIUS, true, [&](const Region& region, int product) {
            Held held = {};
            gathering.template gather<false>(region, product, held);
#pragma unroll
            for (int next = 0; next < 2; ++next) {
                const int i = product * PIXELS + lane / 4 * 2 + next;
                if (region.exists(i)) keep(mirrors + region.beyond(tile, i) * VALUES, held[next]);
            }
        });
        const Region middle(shape, tile, Region::MIDDLE, RADIUS, true);
        for (int m = threadIdx.x / 32; m < tile.products(); m += blockDim.x / 32) {
            const int i = m * PIXELS + lane / 4 * 2;
            Held held = {};
            if (i < tile.count()) add_kept(shape, tile, RADIUS, i, mirrors, held);
            gathering.template gather<true>(middle, m, held);
#pragma unroll
            for (int next = 0; next < 2; ++next)
                if (tile.exists(i + next))
                    write_values(held[next], factor,
                                 out + (before + tile.pixel(shape, i + next)) * shape.hidden *
                                           shape.share,
                                 part * CHANNELS + lane % 4 * 2, shape);
        }
    }
}
