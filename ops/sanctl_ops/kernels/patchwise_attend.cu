// The values that patchwise attention weighs.
#include "patchwise_values.cuh"

constexpr int THREADS = 256;

// A block computes the values of 8 weight channels for a tile of an image. `out` is dense.
template <typename T, int K, int WT>
__global__ void __launch_bounds__(THREADS, WT == 8 ? 2 : 3)
    patchwise_attend(const T* value, const Half* rectified, const Half* second, const float* bias,
                     T* out, Shape shape) {
    constexpr int RADIUS = K / 2, WIDTH = WT * CHANNELS;
    extern __shared__ double shared[];
    float* most = reinterpret_cast<float*>(shared);
    Half* staged = reinterpret_cast<Half*>(most + 32);
    const int part = blockIdx.x % WT, lane = threadIdx.x % 32;
    const Tile tile(shape, blockIdx.x / WT, true);
    const long long before = static_cast<long long>(tile.n) * shape.pixels();
    // No halves as weights take the sum of a row of taps beyond all halves.
    const float factor = stage_values<T, true, -3>(
        staged, most, value + before * shape.value_pitch, shape.value_pitch, shape, tile, RADIUS,
        part * CHANNELS);
    __syncthreads();
    second += part * K * K * 32 * WT * 2;
    bias += part * K * K * CHANNELS;
    const int columns = tile.filled + 2 * RADIUS;
    for (int m = threadIdx.x / 32; m < tile.products(); m += blockDim.x / 32) {
        const int i = m * PIXELS + lane / 4 * 2;
        const Half* hidden = rectified + before * WIDTH;
        Rows<WT> rows;
        rows.load(hidden + tile.pixel(shape, i) * WIDTH, hidden + tile.pixel(shape, i + 1) * WIDTH,
                  lane);
        const int corner = tile.place(i, RADIUS) - RADIUS * columns - RADIUS;
        Held held = {};
#pragma unroll 1
        for (int dy = 0; dy < K; ++dy) {
            const auto make = [&](int dx, float (&weights)[4]) {
                make_weights(rows, second, bias, dy * K + dx, lane, weights);
            };
            weigh_row<K>(Row(staged, corner + dy * columns, lane), K, make, held);
        }
#pragma unroll
        for (int next = 0; next < 2; ++next)
            if (tile.exists(i + next))
                write_values(held[next], factor,
                             out + (before + tile.pixel(shape, i + next)) * shape.hidden *
                                       shape.share,
                             part * CHANNELS + lane % 4 * 2, shape);
    }
}
