// Backward through the weights, where there are one or two weight channels and 3 x 3 taps: the gradients of
// rectified hidden values and of the second convolution.
#include "patchwise_narrow.cuh"

constexpr int MOST = 6;  // of values and gradients, as a power of two

// A block takes the tiles blockIdx.x, that plus `blocks`, and so on. A warp's sums for the second
// convolution lie at partials[its number * TAPS * TERMS], in the order of Arrays::stage_terms.
template <typename T>
__global__ void __launch_bounds__(THREADS, 2)
    patchwise_slopes_narrow(const T* grad, const T* value, const Half* rectified,
                            const float* weight, const float* bias, float* gradients,
                            float* partials, Shape shape, int blocks) {
    extern __shared__ double shared[];
    const Arrays arrays(shared, shape);
    const int i = threadIdx.x * 2, lane = threadIdx.x % 32;
    arrays.stage_terms(weight, bias, shape.hidden);
    float added[TAPS][TERMS] = {};
    for (int number = blockIdx.x; number < shape.images * shape.tiles(); number += blocks) {
        const Tile tile(shape, number, true);
        const long long before = static_cast<long long>(tile.n) * shape.pixels();
        const int columns = tile.filled + 2 * RADIUS;
        // Loaded with what is staged.
        pair_t<T> pairs[2][SHARE];
        unsigned own[2];
#pragma unroll
        for (int next = 0; next < 2; ++next) {
            const long long pixel = before + tile.pixel(shape, i + next);
            load_pixel(pairs[next], grad + pixel * shape.grad_pitch, tile.exists(i + next), shape);
            own[next] = reinterpret_cast<const unsigned*>(rectified)[pixel];
        }
        __syncthreads();
        float factor = stage_pixels<T, true, MOST>(arrays.values, arrays.most,
                                                   value + before * shape.value_pitch,
                                                   shape.value_pitch, shape, tile);
        Largest<T> largest;
#pragma unroll
        for (int g = 0; g < 2 * SHARE; ++g) largest.add(pairs[g / SHARE][g % SHARE]);
        float scale, inverse;
        scale_of<MOST>(most_of_block(largest.value(), arrays.most), scale, inverse);
        factor *= inverse;
        const int corner = tile.place(i, RADIUS) - RADIUS * columns - RADIUS;
#pragma unroll 1
        for (int next = 0; next < 2; ++next) {
            const float hidden[2] = {first_of<Half>(own[0]), second_of<Half>(own[0])};
            unsigned halves[SHARE];
            Vector<unsigned, 4> slopes[WIDE];
#pragma unroll
            for (int g = 0; g < SHARE; ++g) halves[g] = scaled<T>(pairs[0][g], scale);
            part(halves, slopes);
            // A loop of two rounds keeps the code short, and arrays in registers have no index.
            own[0] = own[1];
#pragma unroll
            for (int g = 0; g < SHARE; ++g) pairs[0][g] = pairs[1][g];
            float sums[2] = {};
#pragma unroll
            for (int tap = 0; tap < TAPS; ++tap) {
                const int place = corner + tap / K * columns + tap % K + next;
#pragma unroll
                for (int w = 0; w < WIDE; ++w) {
                    const auto values = staged_values(arrays.values, place, w);
                    unsigned products = multiply_halves(slopes[w].at[0], values.at[0]);
#pragma unroll
                    for (int g = 1; g < SHARE / 2; ++g)
                        products = fma_halves(slopes[w].at[g], values.at[g], products);
                    const float slope =
                        (first_of<Half>(products) + second_of<Half>(products)) * factor;
#pragma unroll
                    for (int in = 0; in < 2; ++in) {
                        sums[in] += slope * arrays.terms[tap * TERMS + w * 3 + in];
                        added[tap][w * 3 + in] += slope * hidden[in];
                    }
                    added[tap][w * 3 + 2] += slope;
                }
            }
            if (!tile.exists(i + next)) continue;
            float* to = gradients + (before + tile.pixel(shape, i + next)) * shape.hidden;
            to[0] = sums[0];
            if (shape.hidden == WIDE) to[1] = sums[1];
        }
    }
    partials += static_cast<long long>(blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * TAPS * TERMS;
#pragma unroll
    for (int t = 0; t < TAPS * TERMS; ++t) {
        float sum = added[t / TERMS][t % TERMS];
        for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
        if (lane == t % 32) partials[t] = sum;
    }
}
