// Values two by two, as they lie in memory, whether these have 16 bits or 32: how they are loaded, and how
// they become halves.
#pragma once

#include "elements.cuh"

// Two neighbours as they lie in memory: those of 16 bits in a word.
template <typename T>
struct Neighbours {
    using type = unsigned;
};

template <>
struct Neighbours<float> {
    using type = Vector<float, 2>;
};

template <typename T>
using pair_t = typename Neighbours<T>::type;

template <typename T>
__device__ inline pair_t<T> paired(float first, float second) {
    return pack<T>(first, second);
}

template <>
__device__ inline Vector<float, 2> paired<float>(float first, float second) {
    return {first, second};
}

// The first `count` of two neighbours; zeros beyond.
template <typename T>
__device__ inline unsigned load_pair(const T* from, int count) {
    const unsigned low = count > 0 ? from[0].bits : 0, high = count > 1 ? from[1].bits : 0;
    return low | high << 16;
}

__device__ inline Vector<float, 2> load_pair(const float* from, int count) {
    return {count > 0 ? from[0] : 0, count > 1 ? from[1] : 0};
}

// A pixel's first 8 channels, of which `count` exist; zeros beyond.
template <typename T>
__device__ inline Vector<pair_t<T>, 4> load_pairs(const T* pixel, int count, int vector) {
    if (vector == 8 && count > 0)
        return *reinterpret_cast<const Vector<pair_t<T>, 4>*>(pixel);
    Vector<pair_t<T>, 4> pairs;
#pragma unroll
    for (int e = 0; e < 4; ++e) pairs.at[e] = load_pair(pixel + 2 * e, count - 2 * e);
    return pairs;
}

template <typename T>
__device__ inline float first_of(unsigned pair) {
    return to_float(T{static_cast<unsigned short>(pair)});
}

template <typename T>
__device__ inline float second_of(unsigned pair) {
    return to_float(T{static_cast<unsigned short>(pair >> 16)});
}

template <>
__device__ inline float second_of<BFloat16>(unsigned pair) {
    return __uint_as_float(pair & 0xffff0000);
}

// Two values, scaled, as halves.
template <typename T>
__device__ inline unsigned scaled(unsigned pair, float scale) {
    return pack<Half>(first_of<T>(pair) * scale, second_of<T>(pair) * scale);
}

template <typename T>
__device__ inline unsigned scaled(const Vector<float, 2>& pair, float scale) {
    return pack<Half>(pair.at[0] * scale, pair.at[1] * scale);
}

// The largest of values without their sign.
template <typename T>
struct Largest {
    unsigned most = 0;

    __device__ void add(unsigned pair) { most = larger<T>(most, pair & 0x7fff7fff); }
    __device__ float value() const { return fmaxf(first_of<T>(most), second_of<T>(most)); }
};

template <>
struct Largest<float> {
    float most = 0;

    __device__ void add(const Vector<float, 2>& pair) {
        most = fmaxf(most, fmaxf(fabsf(pair.at[0]), fabsf(pair.at[1])));
    }
    __device__ float value() const { return most; }
};
