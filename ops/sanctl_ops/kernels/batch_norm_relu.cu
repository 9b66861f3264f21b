// max(0, batch normalisation) of contiguous (N, C, S) tensors with few channels and large planes.
//
// A channel's elements, V at a time, are dealt out to `parts` blocks, so that one channel keeps the
// whole chip busy; the blocks' results meet in double precision, in a fixed order.
#include "elements.cuh"

constexpr int THREADS = 256;
constexpr int IN_FLIGHT = 4;

// Count, mean and summed squares of deviations from the mean; joined as Chan, Golub and LeVeque
// (1979) do, which never subtracts large squares from each other.
struct Moments {
    double count, mean, squares;

    __device__ void join(const Moments& other) {
        const double total = count + other.count;
        if (total == 0) return;
        const double apart = other.mean - mean;
        mean += apart * (other.count / total);
        squares += other.squares + apart * apart * (count * other.count / total);
        count = total;
    }

    __device__ Moments from_lane(int distance) const {
        return {__shfl_down_sync(~0u, count, distance), __shfl_down_sync(~0u, mean, distance),
                __shfl_down_sync(~0u, squares, distance)};
    }
};

struct Sums {
    double slopes, products;  // of the output's gradient; of that times the normalised input

    __device__ void join(const Sums& other) {
        slopes += other.slopes;
        products += other.products;
    }

    __device__ Sums from_lane(int distance) const {
        return {__shfl_down_sync(~0u, slopes, distance), __shfl_down_sync(~0u, products, distance)};
    }
};

template <typename Partial>
__device__ inline Partial join_lanes(Partial own) {
    for (int distance = 16; distance > 0; distance /= 2) own.join(own.from_lane(distance));
    return own;
}

// Joins what the block's threads hold; the result is the first thread's.
template <typename Partial>
__device__ inline Partial join_block(Partial own) {
    __shared__ Partial warps[32];
    own = join_lanes(own);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = own;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int warp = 1; warp < blockDim.x / 32; ++warp) own.join(warps[warp]);
    return own;
}

// Joins the parts of one channel, with one warp.
template <typename Partial>
__device__ inline Partial join_parts(const Partial* partials, int parts) {
    Partial own = {};
    for (int part = threadIdx.x; part < parts; part += 32) own.join(partials[part]);
    return join_lanes(own);
}

// Hands the offset of every vector that this thread is dealt to visit(); blocks are (channel, part).
template <int V, typename Visit>
__device__ inline void visit_channel(int images, int channels, unsigned vectors, int parts,
                                     Visit visit) {
    const int channel = blockIdx.x / parts;
    const unsigned step = parts * blockDim.x, all = images * vectors;
#pragma unroll 4
    for (unsigned i = blockIdx.x % parts * blockDim.x + threadIdx.x; i < all; i += step) {
        const unsigned n = i / vectors;
        const long long plane = static_cast<long long>(n) * channels + channel;
        visit((plane * vectors + (i - n * vectors)) * V);
    }
}

// What turns an element into the output, for one channel.
template <typename A>
struct Normalisation {
    A mean, deviation, weight, bias;  // `deviation` is the inverse of the standard deviation

    __device__ A normalised(A x) const { return (x - mean) * deviation; }

    __device__ A output(A x) const { return normalised(x) * weight + bias; }
};

template <typename A>
__device__ inline Normalisation<A> of_channel(int c, const A* mean, const A* deviation,
                                              const A* weight, const A* bias) {
    return {mean[c], deviation[c], weight[c], bias[c]};
}

template <typename T, int V>
__global__ void moments(const T* x, Moments* partials, int images, int channels, unsigned vectors,
                        int parts) {
    using A = computed_t<T>;
    // Sums of deviations from the thread's first element stay exact where the mean is far from 0.
    A first = 0, deviations = 0, squares = 0;
    int count = 0;
    visit_channel<V>(images, channels, vectors, parts, [&](long long at) {
        A values[V];
        load<V>(x + at, values);
        if (count == 0) first = values[0];
#pragma unroll
        for (int e = 0; e < V; ++e) {
            const A deviation = values[e] - first;
            deviations += deviation;
            squares += deviation * deviation;
        }
        count += V;
    });
    Moments own = {};
    if (count > 0) {
        const double mean = static_cast<double>(deviations) / count;
        own = {static_cast<double>(count), first + mean, squares - mean * deviations};
    }
    own = join_block(own);
    if (threadIdx.x == 0) partials[blockIdx.x] = own;
}

// A block of one warp for every channel.
template <typename A>
__global__ void join_moments(const Moments* partials, A* mean, A* variance, A* deviation, double eps,
                             int parts) {
    const Moments all = join_parts(partials + blockIdx.x * parts, parts);
    if (threadIdx.x > 0) return;
    // Rounding may leave less than 0; a NaN is to stay one.
    const double biased = (all.squares < 0 ? 0 : all.squares) / all.count;
    mean[blockIdx.x] = all.mean;
    variance[blockIdx.x] = biased;
    deviation[blockIdx.x] = rsqrt(biased + eps);
}

template <typename T, int V, typename Visit>
__device__ inline void visit_all(int channels, unsigned vectors, unsigned all, Visit visit) {
    const unsigned begin = blockIdx.x * (THREADS * IN_FLIGHT) + threadIdx.x;
#pragma unroll
    for (int k = 0; k < IN_FLIGHT; ++k) {
        const unsigned i = begin + k * THREADS;
        if (i < all) visit(static_cast<long long>(i) * V, i / vectors % channels);
    }
}

template <typename T, int V>
__global__ void normalise(const T* x, T* out, const computed_t<T>* mean,
                          const computed_t<T>* deviation, const computed_t<T>* weight,
                          const computed_t<T>* bias, int channels, unsigned vectors, unsigned all) {
    using A = computed_t<T>;
    visit_all<T, V>(channels, vectors, all, [&](long long at, int c) {
        const auto channel = of_channel(c, mean, deviation, weight, bias);
        A values[V];
        load<V>(x + at, values);
#pragma unroll
        for (int e = 0; e < V; ++e) {
            const A output = channel.output(values[e]);
            values[e] = passes(output) ? output : A(0);
        }
        store<V>(out + at, values);
    });
}

template <typename T, int V>
__global__ void slope_sums(const T* grad, const T* x, const computed_t<T>* mean,
                           const computed_t<T>* deviation, const computed_t<T>* weight,
                           const computed_t<T>* bias, Sums* partials, int images, int channels,
                           unsigned vectors, int parts) {
    using A = computed_t<T>;
    const auto channel = of_channel(blockIdx.x / parts, mean, deviation, weight, bias);
    A slopes = 0, products = 0;
    visit_channel<V>(images, channels, vectors, parts, [&](long long at) {
        A values[V], gradients[V];
        load<V>(x + at, values);
        load<V>(grad + at, gradients);
#pragma unroll
        for (int e = 0; e < V; ++e) {
            const A slope = passes(channel.output(values[e])) ? gradients[e] : A(0);
            slopes += slope;
            products += slope * channel.normalised(values[e]);
        }
    });
    const Sums own = join_block(Sums{slopes, products});
    if (threadIdx.x == 0) partials[blockIdx.x] = own;
}

// A block of one warp for every channel.
template <typename A>
__global__ void join_sums(const Sums* partials, A* grad_weight, A* grad_bias, int parts) {
    const Sums all = join_parts(partials + blockIdx.x * parts, parts);
    if (threadIdx.x > 0) return;
    grad_weight[blockIdx.x] = all.products;
    grad_bias[blockIdx.x] = all.slopes;
}

template <typename T, int V>
__global__ void input_gradient(const T* grad, const T* x, T* grad_x, const computed_t<T>* mean,
                               const computed_t<T>* deviation, const computed_t<T>* weight,
                               const computed_t<T>* bias, const computed_t<T>* grad_weight,
                               const computed_t<T>* grad_bias, double count, int channels,
                               unsigned vectors, unsigned all) {
    using A = computed_t<T>;
    const A share = 1 / count;
    visit_all<T, V>(channels, vectors, all, [&](long long at, int c) {
        const auto channel = of_channel(c, mean, deviation, weight, bias);
        const A scale = channel.weight * channel.deviation;
        const A mean_slope = grad_bias[c] * share, mean_product = grad_weight[c] * share;
        A values[V], gradients[V];
        load<V>(x + at, values);
        load<V>(grad + at, gradients);
#pragma unroll
        for (int e = 0; e < V; ++e) {
            const A slope = passes(channel.output(values[e])) ? gradients[e] : A(0);
            values[e] = scale * (slope - mean_slope - channel.normalised(values[e]) * mean_product);
        }
        store<V>(grad_x + at, values);
    });
}
