// The gradient of patchwise attention's values: a pixel gathers the gradients of the outputs whose windows
// read it, each times the weight of the tap that reads it, which is made again.
#include "patchwise_regions.cuh"
#include "patchwise_values.cuh"

constexpr int THREADS = 256;

// The arrays of a block in shared memory, and this lane's parts.
template <typename T, int WT>
struct Gathering {
    T* gradients;
    Half* hidden;
    const Half* second;
    const float* bias;
    int lane;

    // Adds up what 16 positions of a region get.
    template <int K>
    __device__ void gather(const Region& region, int product, Held& held) const {
        const int i = product * PIXELS + lane / 4, columns = region.staged_columns;
        const int from = region.first_dy * columns + region.first_dx;
        const T* corner = gradients + lane % 4 * 2 * SHARE;
        const T* first = corner + (region.window(i) - from) * VALUE_PITCH;
        const T* other = corner + (region.window(i + 8) - from) * VALUE_PITCH;
        unsigned rows = shared_address(
            hidden + channel_of_lane<WT>(lane) +
            (region.window(product * PIXELS + row_of_lane(lane)) - from) * HIDDEN_PITCH<WT>);
        for (int dy = region.first_dy; dy <= region.last_dy; ++dy) {
            const auto tap = [&](int dx) {
                const int back = dx - region.first_dx;
                Rows<WT> held_rows;
                held_rows.load(rows - back * HIDDEN_PITCH<WT> * static_cast<int>(sizeof(Half)));
                float weights[4];
                make_weights(held_rows, second, bias, dy * K + dx, lane, weights);
                weigh(weights, first - back * VALUE_PITCH, other - back * VALUE_PITCH, held);
            };
            if (region.last_dx - region.first_dx == K - 1) {
#pragma unroll
                for (int dx = 0; dx < K; ++dx) tap(dx);
            } else {
#pragma unroll 1
                for (int dx = region.first_dx; dx <= region.last_dx; ++dx) tap(dx);
            }
            first -= columns * VALUE_PITCH;
            other -= columns * VALUE_PITCH;
            rows -= columns * HIDDEN_PITCH<WT> * sizeof(Half);
        }
    }
};

// A block takes the tiles blockIdx.x / WT, that plus `blocks`, and so on, of 8 weight channels. What
// positions beyond the image get lies at mirrors[blockIdx.x * mirror_pitch]. `out` is dense.
template <typename T, int K, int WT>
__global__ void __launch_bounds__(THREADS, 2)
    patchwise_value_gradient(const T* grad, const Half* rectified, const Half* second,
                             const float* bias, float* mirrors, T* out, Shape shape, int blocks,
                             int mirror_pitch) {
    constexpr int RADIUS = K / 2, WIDTH = WT * CHANNELS;
    extern __shared__ double shared[];
    const int part = blockIdx.x % WT, lane = threadIdx.x % 32;
    const int own = lane % 4 * 2 * SHARE;
    const int rows = (shape.height + shape.down - 1) / shape.down + 2 * RADIUS;
    const int columns = (shape.width + shape.across - 1) / shape.across + 2 * RADIUS;
    T* staged = reinterpret_cast<T*>(shared);
    Half* hidden = reinterpret_cast<Half*>(staged + rows * columns * VALUE_PITCH);
    const Gathering<T, WT> gathering{staged, hidden, second + part * K * K * 32 * WT * 2,
                                     bias + part * K * K * CHANNELS, lane};
    mirrors += static_cast<long long>(blockIdx.x) * mirror_pitch;
    for (int number = blockIdx.x / WT; number < shape.images * shape.tiles(); number += blocks) {
        const Tile tile(shape, number);
        const long long before = static_cast<long long>(tile.n) * shape.pixels();
        __syncthreads();
        stage_values<T, false>(staged, grad + before * shape.grad_pitch, shape.grad_pitch, shape,
                               tile, RADIUS, part * CHANNELS);
        stage_halves(hidden, HIDDEN_PITCH<WT>, rectified + before * WIDTH, WIDTH, shape, tile,
                     RADIUS);
        __syncthreads();
        compute_mirrors(shape, tile, RADIUS, [&](const Region& region, int product) {
            Held held = {};
            gathering.template gather<K>(region, product, held);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int i = product * PIXELS + half * 8 + lane / 4;
                if (i >= region.count()) continue;
                float* to = mirrors + region.place(i) * VALUES + own;
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    store<4>(to + e * SHARE, held[half][e]);
                    store<4>(to + e * SHARE + 4, held[half][e] + 4);
                }
            }
        });
        const Region middle(shape, tile, Region::MIDDLE, RADIUS);
        for (int m = threadIdx.x / 32; m < tile.products(); m += blockDim.x / 32) {
            Held held = {};
            gathering.template gather<K>(middle, m, held);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int i = m * PIXELS + half * 8 + lane / 4;
                if (i >= tile.count()) continue;
                visit_mirrored(shape, tile, RADIUS, i, [&](int place) {
#pragma unroll
                    for (int e = 0; e < 2; ++e)
#pragma unroll
                        for (int g = 0; g < SHARE; ++g)
                            held[half][e][g] += mirrors[place * VALUES + own + e * SHARE + g];
                });
                write_values(held[half],
                             out + (before + tile.pixel(shape, i)) * shape.hidden * shape.share,
                             part * CHANNELS + lane % 4 * 2, shape);
            }
        }
    }
}
