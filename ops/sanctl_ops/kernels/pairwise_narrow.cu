// Sums of values weighted by the softmax of stored logits, and their gradients, for two weight channels
// of 8 values each and 3 x 3 taps: what pairwise_sums.cuh has for others. Channel c goes with weight
// channel c % 2.
#include "pairwise_narrow.cuh"

constexpr int CHANNELS = 16;

using Values = float[CHANNELS];

template <typename T>
__device__ inline void load_values(const T* from, Values& values) {
    load<8>(from, *reinterpret_cast<float(*)[8]>(values));
    load<8>(from + 8, *reinterpret_cast<float(*)[8]>(values + 8));
}

template <typename T>
__device__ inline void store_values(T* to, const Values& values) {
    store<8>(to, values);
    store<8>(to + 8, values + 8);
}

// The weights of an image's pixels.
struct Weights {
    const Half* logits;     // (TAPS, pixels, SLOTS)
    const float* log_sums;  // (pixels, SLOTS)
    int plane;

    __device__ Weights(const Half* all_logits, const float* all_sums, const Own& own)
        : logits(own.image(all_logits, TAPS * own.plane * SLOTS)),
          log_sums(own.image(all_sums, own.plane * SLOTS)),
          plane(own.plane) {}

    __device__ void read(int pixel, int tap, float (&weights)[SLOTS]) const {
        float sums[SLOTS];
        load<SLOTS>(log_sums + pixel * SLOTS, sums);
        load<SLOTS>(logits + (tap * plane + pixel) * SLOTS, weights);
#pragma unroll
        for (int s = 0; s < SLOTS; ++s) weights[s] = power_of_two(weights[s] - sums[s]);
    }
};

// `out` is (N, H * W, CHANNELS), `value` likewise with `pitch` elements from pixel to pixel.
template <typename T>
__global__ void __launch_bounds__(THREADS, 3)
    pairwise_aggregate_narrow(const Half* logits, const float* log_sums, const T* value, T* out,
                              Squares squares, int pitch) {
    const Own own(blockIdx.x, squares);
    if (!own.exists) return;
    const Weights weights(logits, log_sums, own);
    const T* const image = own.image(value, own.plane * pitch);
    Values sums = {};
    visit_neighbours(own, squares, [&](int tap, int neighbour) {
        float weight[SLOTS];
        Values values;
        weights.read(own.pixel, tap, weight);
        load_values(image + neighbour * pitch, values);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) sums[c] += weight[c % SLOTS] * values[c];
    });
    store_values(own.image(out, own.plane * CHANNELS) + own.pixel * CHANNELS, sums);
}

// Writes the gradients of the (natural) logits, scaled as pairwise_logits_gradient does; laid out as
// logits.
template <typename T>
__global__ void __launch_bounds__(THREADS, 3)
    pairwise_logits_gradient_narrow(const T* grad, const Half* logits, const float* log_sums,
                                    const T* value, const T* out, Half* grad_logits,
                                    const float* most_value, const float* most_slope,
                                    Squares squares, int pitch) {
    const Own own(blockIdx.x, squares);
    if (!own.exists) return;
    const Weights weights(logits, log_sums, own);
    const T* const image = own.image(value, own.plane * pitch);
    const long long at = own.n * static_cast<long long>(own.plane) + own.pixel;
    const float scale = value_scale(most_value) * slope_scale(most_slope);
    Values slopes, sums;
    load_values(grad + at * CHANNELS, slopes);
    load_values(out + at * CHANNELS, sums);
    float delta[SLOTS] = {};
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) delta[c % SLOTS] += slopes[c] * sums[c];
    // Written at last: what is read may not be read ahead of a store.
    unsigned written[TAPS];
    visit_neighbours(own, squares, [&](int tap, int neighbour) {
        float gradients[SLOTS], products[SLOTS] = {};
        Values values;
        weights.read(own.pixel, tap, gradients);
        load_values(image + neighbour * pitch, values);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) products[c % SLOTS] += slopes[c] * values[c];
#pragma unroll
        for (int s = 0; s < SLOTS; ++s) gradients[s] *= (products[s] - delta[s]) * scale;
        written[tap] = pack<Half>(gradients[0], gradients[1]);
    });
    Half* const to = own.image(grad_logits, TAPS * own.plane * SLOTS) + own.pixel * SLOTS;
#pragma unroll
    for (int tap = 0; tap < TAPS; ++tap)
        *reinterpret_cast<unsigned*>(to + tap * own.plane * SLOTS) = written[tap];
}

// Writes the gradient of the values, (N, H * W, CHANNELS): all windows that read a pixel, at its place
// or at one in the padding that mirrors it, have a share.
template <typename T>
__global__ void __launch_bounds__(THREADS, 3)
    pairwise_value_gradient_narrow(const T* grad, const Half* logits, const float* log_sums,
                                   T* grad_value, Squares squares) {
    const Own own(blockIdx.x, squares);
    if (!own.exists) return;
    const Weights weights(logits, log_sums, own);
    const T* const image = own.image(grad, own.plane * CHANNELS);
    Values sums = {};
    // Without branches, lest every tap wait for the one before: a window that does not exist has no
    // weight at the thread's pixel, whose own window counts anyway.
    const auto gather = [&](int shown_y, int shown_x) {
#pragma unroll
        for (int tap = 0; tap < TAPS; ++tap) {
            const int y = shown_y + RADIUS - tap / K, x = shown_x + RADIUS - tap % K;
            const bool exists = y >= 0 && y < squares.height && x >= 0 && x < squares.width;
            const int query = exists ? y * squares.width + x : own.pixel;
            float weight[SLOTS];
            Values slopes;
            weights.read(query, tap, weight);
            load_values(image + query * CHANNELS, slopes);
#pragma unroll
            for (int s = 0; s < SLOTS; ++s) weight[s] = exists ? weight[s] : 0;
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) sums[c] += weight[c % SLOTS] * slopes[c];
        }
    };
    gather(own.y, own.x);
#pragma unroll 1
    for (int which = 1; which < IMAGES<true> * IMAGES<true>; ++which) {
        int y, x;
        if (::image<true>(own.y, squares.height, RADIUS, which / IMAGES<true>, y) &&
            ::image<true>(own.x, squares.width, RADIUS, which % IMAGES<true>, x))
            gather(y, x);
    }
    store_values(own.image(grad_value, own.plane * CHANNELS) + own.pixel * CHANNELS, sums);
}
