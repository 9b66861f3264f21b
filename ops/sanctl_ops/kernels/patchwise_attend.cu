// The values that patchwise attention weighs.
#include "patchwise_values.cuh"

constexpr int THREADS = 256;

// A block computes the values of 8 weight channels for a tile of an image. `out` is dense.
template <typename T, int K, int WT>
__global__ void __launch_bounds__(THREADS, 2)
    patchwise_attend(const T* value, const Half* rectified, const Half* second, const float* bias,
                     T* out, Shape shape) {
    constexpr int RADIUS = K / 2, WIDTH = WT * CHANNELS;
    extern __shared__ double shared[];
    T* staged = reinterpret_cast<T*>(shared);
    const int part = blockIdx.x % WT, lane = threadIdx.x % 32;
    const Tile tile(shape, blockIdx.x / WT);
    const long long before = static_cast<long long>(tile.n) * shape.pixels();
    stage_values<T, true>(staged, value + before * shape.value_pitch, shape.value_pitch, shape, tile,
                          RADIUS, part * CHANNELS);
    __syncthreads();
    second += part * K * K * 32 * WT * 2;
    bias += part * K * K * CHANNELS;
    const int columns = tile.columns + 2 * RADIUS;
    for (int m = threadIdx.x / 32; m < tile.products(); m += blockDim.x / 32) {
        const int i = m * PIXELS + lane / 4;
        const Half* hidden = rectified + before * WIDTH;
        Rows<WT> rows;
        rows.load(hidden + tile.pixel(shape, i) * WIDTH, hidden + tile.pixel(shape, i + 8) * WIDTH,
                  lane);
        const T* corner = staged - (RADIUS * columns + RADIUS) * VALUE_PITCH + lane % 4 * 2 * SHARE;
        const T* first = corner + tile.place(i, RADIUS) * VALUE_PITCH;
        const T* other = corner + tile.place(i + 8, RADIUS) * VALUE_PITCH;
        Held held = {};
        for (int dy = 0; dy < K; ++dy) {
#pragma unroll
            for (int dx = 0; dx < K; ++dx) {
                float weights[4];
                make_weights(rows, second, bias, dy * K + dx, lane, weights);
                weigh(weights, first + dx * VALUE_PITCH, other + dx * VALUE_PITCH, held);
            }
            first += columns * VALUE_PITCH;
            other += columns * VALUE_PITCH;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (i + half * 8 < tile.count())
                write_values(held[half],
                             out + (before + tile.pixel(shape, i + half * 8)) * shape.hidden *
                                       shape.share,
                             part * CHANNELS + lane % 4 * 2, shape);
    }
}
