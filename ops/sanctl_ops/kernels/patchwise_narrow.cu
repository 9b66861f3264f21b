// Weighed values, and their gradient, where there are one or two weight channels and 3 x 3 taps.
#include "patchwise_narrow.cuh"

using Sums = unsigned[WIDE][SHARE / 2];

__device__ inline void add_weighed(Sums& sums, const unsigned (&weights)[WIDE],
                                   const Vector<unsigned, 4> (&values)[WIDE]) {
#pragma unroll
    for (int w = 0; w < WIDE; ++w)
#pragma unroll
        for (int g = 0; g < SHARE / 2; ++g)
            sums[w][g] = fma_halves(weights[w], values[w].at[g], sums[w][g]);
}

// Writes a pixel's sums times `factor`.
template <typename T>
__device__ inline void write_pixel(const Sums& sums, float factor, T* pixel, const Shape& shape) {
    float held[WIDE][SHARE];
#pragma unroll
    for (int g = 0; g < SHARE; ++g)
#pragma unroll
        for (int w = 0; w < WIDE; ++w)
            held[w][g] = g % 2 == 0 ? first_of<Half>(sums[w][g / 2]) : second_of<Half>(sums[w][g / 2]);
    if (shape.hidden != WIDE || shape.share != SHARE)
        return write_values(held, factor, pixel, 0, shape);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        Vector<pair_t<T>, 4> pairs;
#pragma unroll
        for (int g = 0; g < 4; ++g)
            pairs.at[g] = paired<T>(held[0][half * 4 + g] * factor, held[1][half * 4 + g] * factor);
        reinterpret_cast<Vector<pair_t<T>, 4>*>(pixel)[half] = pairs;
    }
}

// A block computes the values of a tile. `rectified` has two channels; `out` is dense.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    patchwise_attend_narrow(const T* value, const Half* rectified, const float* weight,
                            const float* bias, T* out, Shape shape) {
    extern __shared__ double shared[];
    const Arrays arrays(shared, shape);
    const Tile tile(shape, blockIdx.x, true);
    const long long before = static_cast<long long>(tile.n) * shape.pixels();
    const auto hidden = reinterpret_cast<const unsigned*>(rectified) + before;
    arrays.stage_terms(weight, bias, shape.hidden);
    const float factor =
        stage_pixels<T, true, -2>(arrays.values, arrays.most, value + before * shape.value_pitch,
                                  shape.value_pitch, shape, tile);
    __syncthreads();
    const int i = threadIdx.x * 2, columns = tile.filled + 2 * RADIUS;
    if (i >= tile.count()) return;
    const unsigned own[2] = {hidden[tile.pixel(shape, i)], hidden[tile.pixel(shape, i + 1)]};
    const int corner = tile.place(i, RADIUS) - RADIUS * columns - RADIUS;
    Sums sums[2] = {};
#pragma unroll
    for (int dy = 0; dy < K; ++dy)
#pragma unroll
        for (int k = 0; k <= K; ++k) {
            const int place = corner + dy * columns + k;
            const Vector<unsigned, 4> values[WIDE] = {staged_values(arrays.values, place, 0),
                                                      staged_values(arrays.values, place, 1)};
#pragma unroll
            for (int next = 0; next < 2; ++next) {
                const int dx = k - next;
                if (dx < 0 || dx >= K) continue;
                unsigned weights[WIDE];
                arrays.make_weights(own[next], dy * K + dx, weights);
                add_weighed(sums[next], weights, values);
            }
        }
#pragma unroll
    for (int next = 0; next < 2; ++next)
        if (tile.exists(i + next))
            write_pixel(sums[next], factor,
                        out + (before + tile.pixel(shape, i + next)) * shape.hidden * shape.share,
                        shape);
}

// Adds what the windows read that have their centres around staged place `place`, by tap (dy, dx).
__device__ inline void gather(const Arrays& arrays, int place, int columns, int dy, int dx,
                              Sums& sums) {
    const int window = place + (RADIUS - dy) * columns + RADIUS - dx;
    unsigned weights[WIDE];
    arrays.make_weights(arrays.hidden[window], dy * K + dx, weights);
    const Vector<unsigned, 4> values[WIDE] = {staged_values(arrays.values, window, 0),
                                              staged_values(arrays.values, window, 1)};
    add_weighed(sums, weights, values);
}

// A block computes the gradient of a tile's values. What lies beyond the image mirrors pixels one away
// from its border, which gather for it, too.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    patchwise_value_gradient_narrow(const T* grad, const Half* rectified, const float* weight,
                                    const float* bias, T* out, Shape shape) {
    extern __shared__ double shared[];
    const Arrays arrays(shared, shape);
    const Tile tile(shape, blockIdx.x, true);
    const long long before = static_cast<long long>(tile.n) * shape.pixels();
    const auto hidden = reinterpret_cast<const unsigned*>(rectified) + before;
    const int columns = tile.filled + 2 * RADIUS, i = threadIdx.x * 2;
    arrays.stage_terms(weight, bias, shape.hidden);
    for (int p = threadIdx.x; p < (tile.rows + 2 * RADIUS) * columns; p += blockDim.x) {
        const int y = source<false>(tile.top - RADIUS + p / columns, shape.height);
        const int x = source<false>(tile.left - RADIUS + p % columns, shape.width);
        arrays.hidden[p] = y >= 0 && x >= 0 ? hidden[y * shape.width + x] : 0;
    }
    const float factor =
        stage_pixels<T, false, -2>(arrays.values, arrays.most, grad + before * shape.grad_pitch,
                                   shape.grad_pitch, shape, tile);
    __syncthreads();
    if (i >= tile.count()) return;
    Sums sums[2] = {};
    const int own = tile.place(i, RADIUS);
#pragma unroll
    for (int dy = 0; dy < K; ++dy)
#pragma unroll
        for (int dx = 0; dx < K; ++dx) {
            gather(arrays, own, columns, dy, dx, sums[0]);
            gather(arrays, own + 1, columns, dy, dx, sums[1]);
        }
#pragma unroll
    for (int next = 0; next < 2; ++next) {
        if (!tile.exists(i + next)) continue;
        const int y = tile.top + i / tile.filled, x = tile.left + i % tile.filled + next;
#pragma unroll 1
        for (int which = reflects(y, x, shape, RADIUS) ? 1 : 9; which < 9; ++which) {
            int row, column;
            if (!image<true>(y, shape.height, RADIUS, which / 3, row) ||
                !image<true>(x, shape.width, RADIUS, which % 3, column))
                continue;
            const int place = (row - tile.top + RADIUS) * columns + column - tile.left + RADIUS;
            // The windows that read there have their centres at the border.
            for (int dy = 0; dy < K; ++dy)
                for (int dx = 0; dx < K; ++dx) {
                    const int above = row + RADIUS - dy, beside = column + RADIUS - dx;
                    if (above >= 0 && above < shape.height && beside >= 0 && beside < shape.width)
                        gather(arrays, place, columns, dy, dx, sums[next]);
                }
        }
        write_pixel(sums[next], factor,
                    out + (before + tile.pixel(shape, i + next)) * shape.hidden * shape.share, shape);
    }
}
