// The largest value of planes, disregarding signs.
#include "ptx.cuh"
#include "window.cuh"

constexpr int THREADS = 256;
constexpr int TOGETHER = 16;  // values that a thread joins

// partials[block]; `rows` are `count` vectors of V channels, `apart` elements from pixel to pixel. A NaN
// is larger than anything.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS)
    pairwise_largest(const T* rows, float* partials, unsigned count, Divisor per_pixel, int apart) {
    extern __shared__ double shared[];
    float* const all = reinterpret_cast<float*>(shared);
    float most = 0;
#pragma unroll 4
    for (unsigned i = blockIdx.x * THREADS + threadIdx.x; i < count; i += gridDim.x * THREADS) {
        unsigned pixel = i;
        const int vector = per_pixel.divide(pixel);
        float values[V];
        load<V>(rows + static_cast<long long>(pixel) * apart + vector * V, values);
#pragma unroll
        for (int v = 0; v < V; ++v) most = larger_or_nan(most, fabsf(values[v]));
    }
    all[threadIdx.x] = most;
    for (int threads = THREADS / TOGETHER; threads > 0; threads /= TOGETHER) {
        __syncthreads();
        if (threadIdx.x < threads)
            for (int t = threadIdx.x; t < threads * TOGETHER; t += threads)
                most = larger_or_nan(most, all[t]);
        __syncthreads();
        if (threadIdx.x < threads) all[threadIdx.x] = most;
    }
    if (threadIdx.x == 0) partials[blockIdx.x] = most;
}
