// How values are stored (16, 32 or 64 bits) and how they are computed with (float or double).
#pragma once

#include "ptx.cuh"

template <typename T>
struct Computed {
    using type = float;
};

template <>
struct Computed<double> {
    using type = double;
};

// Sums of T are kept in this type: double for double, float for all others.
template <typename T>
using computed_t = typename Computed<T>::type;

__device__ inline double widen(double x) { return x; }

__device__ inline float widen(float x) { return x; }

__device__ inline float widen(Half x) { return to_float(x); }

__device__ inline float widen(BFloat16 x) { return to_float(x); }

// Rounds to nearest, ties to even.
template <typename T>
__device__ inline T narrow(computed_t<T> x) {
    return x;
}

template <>
__device__ inline Half narrow<Half>(float x) {
    return to_half(x);
}

template <>
__device__ inline BFloat16 narrow<BFloat16>(float x) {
    return to_bfloat16(x);
}

// Whether ReLU lets a value through; a NaN it does, unlike max(), which would hide it.
template <typename A>
__device__ inline bool passes(A output) {
    return !(output <= 0);
}

// V neighbours in memory, moved by one instruction where they take 16 bytes or fewer, else by several.
template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Vector {
    T at[V];
};

template <int V, typename T>
__device__ inline void load(const T* from, computed_t<T> (&values)[V]) {
    const auto vector = *reinterpret_cast<const Vector<T, V>*>(from);
#pragma unroll
    for (int e = 0; e < V; ++e) values[e] = widen(vector.at[e]);
}

template <int V, typename T>
__device__ inline void store(T* to, const computed_t<T>* values) {
    Vector<T, V> vector;
#pragma unroll
    for (int e = 0; e < V; ++e) vector.at[e] = narrow<T>(values[e]);
    *reinterpret_cast<Vector<T, V>*>(to) = vector;
}

// V pixels of a row that lie `stride` elements apart.
template <int V, typename T>
__device__ inline void load_row(const T* from, long long stride, computed_t<T> (&values)[V]) {
    if (V > 1 && stride == 1) return load<V>(from, values);
#pragma unroll
    for (int e = 0; e < V; ++e) values[e] = widen(from[e * stride]);
}

template <int V, typename T>
__device__ inline void store_row(T* to, long long stride, const computed_t<T>* values) {
    if (V > 1 && stride == 1) return store<V>(to, values);
#pragma unroll
    for (int e = 0; e < V; ++e) to[e * stride] = narrow<T>(values[e]);
}
