// The gradient of patchwise attention's values: a pixel gathers the gradients of the outputs whose windows
// read it, each times the weight of the tap that reads it, which is made again.
#include "patchwise_regions.cuh"
#include "patchwise_values.cuh"

constexpr int THREADS = 256;

// What the products of a block have in common.
template <int K, int WT>
struct Gathering {
    const Half *gradients, *hidden;  // staged
    const Half* second;
    const float* bias;
    int lane;

    // Adds up what 16 positions of a region get.
    __device__ void gather(const Region& region, int product, Held& held) const {
        const int back = region.first_dy * region.staged_columns + region.last_dx;
        int window = region.window(product * PIXELS + lane / 4 * 2) - back;
        const int row = region.window(product * PIXELS + in_pairs(row_of_lane(lane))) - back;
        unsigned rows =
            shared_address(hidden + channel_of_lane<WT>(lane) + row * HIDDEN_PITCH<WT>);
#pragma unroll 1
        for (int dy = region.first_dy; dy <= region.last_dy; ++dy) {
            const int tap = dy * K + region.last_dx;
            const auto make = [&](int k, float (&weights)[4]) {
                Rows<WT> of_tap;
                of_tap.load(rows + k * HIDDEN_PITCH<WT> * static_cast<int>(sizeof(Half)));
                make_weights(of_tap, second, bias, tap - k, lane, weights);
            };
            weigh_row<K>(Row(gradients, window, lane), region.last_dx - region.first_dx + 1, make,
                         held);
            window -= region.staged_columns;
            rows -= region.staged_columns * HIDDEN_PITCH<WT> * sizeof(Half);
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
    const int columns = (shape.width + shape.across - 1) / shape.across;
    float* most = reinterpret_cast<float*>(shared);
    Half* staged = reinterpret_cast<Half*>(most + 32);
    Half* hidden = staged + rows * (columns + columns % 2 + 2 * RADIUS) * VALUES;
    const Gathering<K, WT> gathering{staged, hidden, second + part * K * K * 32 * WT * 2,
                                     bias + part * K * K * CHANNELS, lane};
    mirrors += static_cast<long long>(blockIdx.x) * mirror_pitch;
    for (int number = blockIdx.x / WT; number < shape.images * shape.tiles(); number += blocks) {
        const Tile tile(shape, number, true);
        const long long before = static_cast<long long>(tile.n) * shape.pixels();
        __syncthreads();
        const float factor = stage_values<T, false, -2>(
            staged, most, grad + before * shape.grad_pitch, shape.grad_pitch, shape, tile, RADIUS,
            part * CHANNELS);
        stage_halves(hidden, HIDDEN_PITCH<WT>, rectified + before * WIDTH, WIDTH, shape, tile,
                     RADIUS);
        __syncthreads();
        compute_mirrors(shape, tile, RADIUS, true, [&](const Region& region, int product) {
            Held held = {};
            gathering.gather(region, product, held);
#pragma unroll
            for (int next = 0; next < 2; ++next) {
                const int i = product * PIXELS + lane / 4 * 2 + next;
                if (!region.exists(i)) continue;
                float* to = mirrors + region.place(i) * VALUES + own;
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    store<4>(to + e * SHARE, held[next][e]);
                    store<4>(to + e * SHARE + 4, held[next][e] + 4);
                }
            }
        });
        const Region middle(shape, tile, Region::MIDDLE, RADIUS, true);
        for (int m = threadIdx.x / 32; m < tile.products(); m += blockDim.x / 32) {
            Held held = {};
            gathering.gather(middle, m, held);
#pragma unroll
            for (int next = 0; next < 2; ++next) {
                const int i = m * PIXELS + lane / 4 * 2 + next;
                if (!tile.exists(i)) continue;
                visit_mirrored(shape, tile, RADIUS, i, [&](int place) {
#pragma unroll
                    for (int e = 0; e < 2; ++e)
#pragma unroll
                        for (int g = 0; g < SHARE; ++g)
                            held[next][e][g] += mirrors[place * VALUES + own + e * SHARE + g];
                });
                write_values(held[next], factor,
                             out + (before + tile.pixel(shape, i)) * shape.hidden * shape.share,
                             part * CHANNELS + lane % 4 * 2, shape);
            }
        }
    }
}
