// Backward through the values' sums: the slopes of the weights exist in registers and, for one row of
// taps, in shared memory. From them come the gradients of rectified hidden values and of the second
// convolution. They are halves, scaled by a power of two that a tile chooses for itself.
#include "patchwise_values.cuh"

constexpr int THREADS = 256;

// Pixels that the largest tile's products have.
__device__ inline int most_pixels(const Shape& shape) {
    const int rows = (shape.height + shape.down - 1) / shape.down;
    const int columns = (shape.width + shape.across - 1) / shape.across;
    return (rows * columns + PIXELS - 1) / PIXELS * PIXELS;
}

// Products that a warp makes in turn.
template <int WT>
constexpr int TOGETHER = WT == 8 ? 1 : 2;

// Products of 16 rows that a tap's part of the second convolution's gradient takes: hidden channels,
// and a row of ones for the bias, which for 8 channels fits in beside them.
template <int WT>
constexpr int ROWS_OF_SECOND = WT == 1 ? 1 : WT / 2 + 1;

// The gradient of the values that a lane holds of one pixel; zeros where it does not exist.
template <typename T>
__device__ inline void load_gradient(float (&held)[2][SHARE], const T* pixel, int channel,
                                     bool exists, const Shape& shape) {
#pragma unroll
    for (int g = 0; g < SHARE; ++g) {
        const T* from = pixel + g * shape.hidden + channel;
        const bool first = exists && g < shape.share && channel < shape.hidden;
        unsigned pair = 0;
        if (first && shape.hidden % 2 == 0) pair = *reinterpret_cast<const unsigned*>(from);
        else if (first)
            pair = from[0].bits |
                   (channel + 1 < shape.hidden ? static_cast<unsigned>(from[1].bits) << 16 : 0);
        held[0][g] = first_of<T>(pair);
        held[1][g] = second_of<T>(pair);
    }
}

// Slopes of a lane's four weights: sums over the values that share them.
template <typename T>
__device__ inline void add_up(const Held& gradient, const T* first, const T* second,
                              float (&slopes)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const auto values = *reinterpret_cast<const Vector<unsigned, 4>*>(
                (half == 0 ? first : second) + e * SHARE);
            float sum = 0;
#pragma unroll
            for (int g = 0; g < SHARE; g += 2) {
                sum += gradient[half][e][g] * first_of<T>(values.at[g / 2]);
                sum += gradient[half][e][g + 1] * second_of<T>(values.at[g / 2]);
            }
            slopes[2 * half + e] = sum;
        }
}

// The largest of all threads' values.
__device__ inline float most_of_block(float own, float* shared) {
    for (int apart = 16; apart > 0; apart /= 2)
        own = fmaxf(own, __shfl_xor_sync(~0u, own, apart));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = own;
    __syncthreads();
    for (int warp = 0; warp < blockDim.x / 32; ++warp) own = fmaxf(own, shared[warp]);
    __syncthreads();
    return own;
}

template <typename T>
__device__ inline float most_staged(const T* staged, int pixels) {
    float most = 0;
    for (int i = threadIdx.x; i < pixels * CHANNELS; i += blockDim.x) {
        const auto values = *reinterpret_cast<const Vector<unsigned, 4>*>(
            staged + i / CHANNELS * VALUE_PITCH + i % CHANNELS * SHARE);
#pragma unroll
        for (int e = 0; e < 4; ++e)
            most = fmaxf(most, fmaxf(fabsf(first_of<T>(values.at[e])),
                                     fabsf(second_of<T>(values.at[e]))));
    }
    return most;
}

// sums += (rectified hidden values, and ones)^T * slopes of one tap, over 16 pixels of a tile.
template <int WT>
__device__ inline void add_product(const Half* hidden, const Half* slopes, int lane,
                                   float (&sums)[ROWS_OF_SECOND<WT>][4]) {
    const unsigned ones = lane < 4 ? 0x3c003c00 : 0;
    unsigned a[4], b[4];
    const unsigned of_slopes = shared_address(slopes + lane % 16 * CHANNELS);
    if constexpr (WT == 1) {
        load_matrices<true>(
            lane < 16 ? shared_address(hidden + lane * HIDDEN_PITCH<WT>) : of_slopes, a);
        Mma<Half>::k16(sums[0], a[0], ones, a[1], ones, a[2], a[3]);
    } else {
        load_matrices<true>(of_slopes, b);
        const Half* row = hidden + (lane % 8 + lane / 16 * 8) * HIDDEN_PITCH<WT> + lane / 8 % 2 * 8;
#pragma unroll
        for (int r = 0; r < WT / 2; ++r) {
            load_matrices<true>(shared_address(row + r * PIXELS), a);
            Mma<Half>::k16(sums[r], a[0], a[1], a[2], a[3], b[0], b[1]);
        }
        Mma<Half>::k16(sums[WT / 2], ones, 0, ones, 0, b[0], b[1]);
    }
}

// The arrays of a block in shared memory.
template <typename T, int WT>
struct Arrays {
    T* values;
    Half *slopes, *hidden;
    float* most;
    int pixels;

    __device__ Arrays(void* shared, const Shape& shape, int K)
        : values(static_cast<T*>(shared)), pixels(most_pixels(shape)) {
        const int rows = (shape.height + shape.down - 1) / shape.down + K - 1;
        const int columns = (shape.width + shape.across - 1) / shape.across + K - 1;
        slopes = reinterpret_cast<Half*>(values + rows * columns * VALUE_PITCH);
        hidden = slopes + K * pixels * CHANNELS;
        most = reinterpret_cast<float*>(hidden + pixels * HIDDEN_PITCH<WT>);
    }
};

// A block takes the tiles blockIdx.x / WT, that plus `blocks`, and so on, of 8 weight channels. Its sums
// for the second convolution lie at partials[blockIdx.x * K * K * ROWS_OF_SECOND * 128].
template <typename T, int K, int WT>
__global__ void __launch_bounds__(THREADS, 2)
    patchwise_slopes(const T* grad, const T* value, const Half* rectified, const Half* turned,
                     float* gradients, float* partials, Shape shape, int blocks) {
    constexpr int RADIUS = K / 2, WIDTH = WT * CHANNELS, M = TOGETHER<WT>, R = ROWS_OF_SECOND<WT>;
    extern __shared__ double shared[];
    const Arrays<T, WT> arrays(shared, shape, K);
    const int part = blockIdx.x % WT, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int channel = part * CHANNELS + lane % 4 * 2;
    turned += part * K * K * 32 * WT * 2;
    partials += static_cast<long long>(blockIdx.x) * K * K * R * 128 + lane * 4;
    gradients += static_cast<long long>(part) * shape.images * shape.pixels() * shape.hidden;
    for (int number = blockIdx.x / WT; number < shape.images * shape.tiles(); number += blocks) {
        const bool anew = number < blocks;
        const Tile tile(shape, number);
        const long long before = static_cast<long long>(tile.n) * shape.pixels();
        const int columns = tile.columns + 2 * RADIUS;
        __syncthreads();
        stage_values<T, true>(arrays.values, value + before * shape.value_pitch, shape.value_pitch,
                              shape, tile, RADIUS, part * CHANNELS);
        for (int i = threadIdx.x; i < arrays.pixels * WT; i += blockDim.x)
            *reinterpret_cast<Vector<unsigned, 4>*>(arrays.hidden + i / WT * HIDDEN_PITCH<WT> +
                                                    i % WT * 8) =
                *reinterpret_cast<const Vector<unsigned, 4>*>(
                    rectified + (before + tile.pixel(shape, i / WT)) * WIDTH + i % WT * 8);
        __syncthreads();
        const auto load = [&](int i, float (&held)[2][SHARE]) {
            load_gradient(held, grad + (before + tile.pixel(shape, i)) * shape.grad_pitch, channel,
                          i < tile.count(), shape);
        };
        float most = 0;
        for (int i = warp * M * PIXELS + lane / 4; i < (warp + 1) * M * PIXELS; i += 8) {
            float held[2][SHARE];
            load(i, held);
#pragma unroll
            for (int g = 0; g < SHARE; ++g)
                most = fmaxf(most, fmaxf(fabsf(held[0][g]), fabsf(held[1][g])));
        }
        most = most_of_block(most, arrays.most);
        most *= most_of_block(most_staged(arrays.values, (tile.rows + 2 * RADIUS) * columns),
                              arrays.most);
        float scale, inverse;
        scale_of(most * SHARE, scale, inverse);
        float sums[M][WT][4] = {};
        for (int dy = 0; dy < K; ++dy) {
#pragma unroll
            for (int m = 0; m < M; ++m) {
                const int i = (warp * M + m) * PIXELS + lane / 4;
                if (i - lane / 4 >= arrays.pixels) break;
                Held held;
                load(i, held[0]);
                load(i + 8, held[1]);
                const T* corner = arrays.values + lane % 4 * 2 * SHARE;
                const int above = (dy - RADIUS) * columns - RADIUS;
                const T* first = corner + (tile.place(i, RADIUS) + above) * VALUE_PITCH;
                const T* second = corner + (tile.place(i + 8, RADIUS) + above) * VALUE_PITCH;
                Half* to = arrays.slopes + i * CHANNELS + lane % 4 * 2;
#pragma unroll
                for (int dx = 0; dx < K; ++dx, to += arrays.pixels * CHANNELS) {
                    float slopes[4];
                    add_up(held, first + dx * VALUE_PITCH, second + dx * VALUE_PITCH, slopes);
                    const unsigned a0 = pack<Half>(slopes[0] * scale, slopes[1] * scale);
                    const unsigned a1 = pack<Half>(slopes[2] * scale, slopes[3] * scale);
                    const auto b = fragment<WT>(turned, dy * K + dx, lane);
#pragma unroll
                    for (int w = 0; w < WT; ++w) Mma<Half>::k8(sums[m][w], a0, a1, b.at[w]);
                    *reinterpret_cast<unsigned*>(to) = a0;
                    *reinterpret_cast<unsigned*>(to + 8 * CHANNELS) = a1;
                }
            }
            __syncthreads();
            for (int dx = warp; dx < K; dx += blockDim.x / 32) {
                float* to = partials + (dy * K + dx) * R * 128;
                float added[R][4] = {};
                for (int s = 0; s < arrays.pixels; s += PIXELS)
                    add_product<WT>(arrays.hidden + s * HIDDEN_PITCH<WT>,
                                    arrays.slopes + (dx * arrays.pixels + s) * CHANNELS, lane,
                                    added);
#pragma unroll
                for (int r = 0; r < R; ++r) {
                    auto& kept = *reinterpret_cast<Vector<float, 4>*>(to + r * 128);
                    Vector<float, 4> total = anew ? Vector<float, 4>{} : kept;
#pragma unroll
                    for (int e = 0; e < 4; ++e) total.at[e] += added[r][e] * inverse;
                    kept = total;
                }
            }
            __syncthreads();
        }
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int i = (warp * M + m) * PIXELS + half * 8 + lane / 4;
                if (i >= tile.count()) continue;
                float* to = gradients + (before + tile.pixel(shape, i)) * shape.hidden;
#pragma unroll
                for (int w = 0; w < WT; ++w)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int own = w * CHANNELS + lane % 4 * 2 + e;
                        if (own < shape.hidden) to[own] = sums[m][w][2 * half + e] * inverse;
                    }
            }
    }
}
