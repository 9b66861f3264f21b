// The instructions of kernels/ptx.cuh in plain C++, for kernels that run on a CPU.
#pragma once

#include "cuda_on_cpu.hpp"

struct Half {
    unsigned short bits;
};

struct BFloat16 {
    unsigned short bits;
};

inline float to_float(Half x) {
    _Float16 value;
    memcpy(&value, &x.bits, sizeof value);
    return value;
}

inline float to_float(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

inline Half to_half(float x) {
    const _Float16 value = x;
    Half narrowed;
    memcpy(&narrowed.bits, &value, sizeof value);
    return narrowed;
}

inline Half to_half_once(double x) {
    const _Float16 value = x;
    Half narrowed;
    memcpy(&narrowed.bits, &value, sizeof value);
    return narrowed;
}

inline BFloat16 to_bfloat16(float x) {
    if (std::isnan(x)) return {0x7fff};
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline unsigned pack_finite(float first, float second) {
    const auto within = [](float x) { return std::isnan(x) ? x : std::clamp(x, -65504.0f, 65504.0f); };
    return to_half(within(first)).bits | static_cast<unsigned>(to_half(within(second)).bits) << 16;
}

template <typename T>
inline unsigned pack(float first, float second) {
    if constexpr (std::is_same_v<T, Half>)
        return to_half(first).bits | static_cast<unsigned>(to_half(second).bits) << 16;
    else
        return to_bfloat16(first).bits | static_cast<unsigned>(to_bfloat16(second).bits) << 16;
}

// Two halves in a word, each handed to `compute` with its likes.
template <typename Compute, typename... Words>
inline unsigned by_halves(Compute compute, Words... words) {
    unsigned result = 0;
    for (int shift = 0; shift < 32; shift += 16)
        result |= static_cast<unsigned>(
                      to_half(compute(to_float(
                                  Half{static_cast<unsigned short>(words >> shift)})...))
                          .bits)
                  << shift;
    return result;
}

inline unsigned fma_halves(unsigned a, unsigned x, unsigned b) {
    return by_halves([](double a, double x, double b) { return a * x + b; }, a, x, b);
}

inline unsigned fma_relu_halves(unsigned a, unsigned x, unsigned b) {
    return by_halves(
        [](double a, double x, double b) { return a * x + b < 0 ? 0.0 : a * x + b; }, a, x, b);
}

inline unsigned add_halves(unsigned a, unsigned b) {
    return by_halves([](float a, float b) { return a + b; }, a, b);
}

inline unsigned multiply_halves(unsigned a, unsigned b) {
    return by_halves([](float a, float b) { return a * b; }, a, b);
}

inline void add_where(unsigned halves, float first, float second, float& sum, float& other) {
    if (halves & 0xffff) sum += first;
    if (halves >> 16) other += second;
}

template <typename T>
inline unsigned larger(unsigned a, unsigned b) {
    const auto half = [](unsigned a, unsigned b) {
        return static_cast<unsigned>(
            pack<T>(fmaxf(to_float(T{static_cast<unsigned short>(a)}),
                          to_float(T{static_cast<unsigned short>(b)})), 0) & 0xffff);
    };
    return half(a, b) | half(a >> 16, b >> 16) << 16;
}

inline float larger_or_nan(float a, float b) { return a > b || a != a ? a : b; }

inline unsigned above_zero(unsigned halves) {
    return by_halves([](float x) { return x > 0 ? 1.0f : 0.0f; }, halves);
}

template <typename T>
inline void forget_origin(T&) {}

inline unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(static_cast<const char*>(pointer) -
                                 reinterpret_cast<const char*>(shared));
}

inline void store_pair(unsigned first, unsigned second, unsigned pair, bool store_first,
                       bool store_second) {
    char* memory = reinterpret_cast<char*>(shared);
    const unsigned short halves[2] = {static_cast<unsigned short>(pair),
                                      static_cast<unsigned short>(pair >> 16)};
    if (store_first) memcpy(memory + first, &halves[0], 2);
    if (store_second) memcpy(memory + second, &halves[1], 2);
}

// Copies arrive when they are waited for, not before: a kernel that reads too early reads NaN.
inline std::vector<std::vector<Copy>>& groups() { return threads[threadIdx.x].groups; }

template <int V, typename T>
inline void copy_async(T* to, const T* from) {
    constexpr size_t BYTES = V * sizeof(T);
    if (BYTES < 4) {
        memcpy(to, from, BYTES);
        return;
    }
    if (reinterpret_cast<size_t>(to) % BYTES || reinterpret_cast<size_t>(from) % BYTES)
        fail("a copy is not aligned");
    groups().back().push_back({to, from, BYTES});
}

template <int V, typename T>
inline void copy_async(unsigned to, const T* from) {
    copy_async<V>(reinterpret_cast<T*>(reinterpret_cast<char*>(shared) + to), from);
}

template <int V, typename T>
inline void copy_or_clear(T* to, const T* from, bool exists) {
    alignas(16) static const T zeros[V] = {};
    copy_async<V>(to, exists ? from : zeros);
}

inline void end_group() { groups().emplace_back(); }

template <int PENDING>
inline void wait_for_groups() {
    auto& own = groups();
    while (own.size() > PENDING + 1) {
        for (const Copy& copy : own.front()) memcpy(copy.to, copy.from, copy.bytes);
        own.erase(own.begin());
    }
}

template <bool TRANSPOSED>
inline void load_matrices(unsigned row, unsigned (&matrices)[4]) {
    if (row % 16) fail("a row of a matrix is not aligned");
    const auto rows = exchange(std::array{row});
    const int lane = threadIdx.x % 32;
    for (int m = 0; m < 4; ++m) {
        unsigned short pair[2];
        for (int p = 0; p < 2; ++p) {
            const int in_row = lane / 4, in_pair = lane % 4 * 2 + p;
            const unsigned address = rows[m * 8 + (TRANSPOSED ? in_pair : in_row)][0];
            const char* from = reinterpret_cast<const char*>(shared) + address;
            memcpy(&pair[p], from + 2 * (TRANSPOSED ? in_row : in_pair), 2);
        }
        matrices[m] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
    }
}

template <bool TRANSPOSED>
inline void load_matrices(unsigned row, unsigned (&matrices)[2]) {
    unsigned four[4];
    const auto rows = exchange(std::array{row});
    load_matrices<TRANSPOSED>(rows[threadIdx.x % 16][0], four);
    matrices[0] = four[0];
    matrices[1] = four[1];
}

inline unsigned transpose(unsigned matrix) {
    const auto pairs = exchange(std::array{matrix});
    const int lane = threadIdx.x % 32;
    unsigned transposed = 0;
    for (int p = 0; p < 2; ++p) {
        const int row = lane % 4 * 2 + p, column = lane / 4;
        const unsigned pair = pairs[row * 4 + column / 2][0];
        transposed |= (column % 2 ? pair >> 16 : pair & 0xffff) << 16 * p;
    }
    return transposed;
}

inline float first_of(unsigned pair) { return to_float(Half{static_cast<unsigned short>(pair)}); }

inline float second_of(unsigned pair) {
    return to_float(Half{static_cast<unsigned short>(pair >> 16)});
}

// Products of halves are exact in double, and so is nearly every sum.
template <typename Compute>
inline unsigned of_pairs(unsigned a, unsigned b, unsigned c, Compute compute) {
    const double first = compute(first_of(a), first_of(b), first_of(c));
    const double second = compute(second_of(a), second_of(b), second_of(c));
    return to_half_once(first).bits | static_cast<unsigned>(to_half_once(second).bits) << 16;
}

inline unsigned add_pairs(unsigned a, unsigned b) {
    return of_pairs(a, b, 0, [](double x, double y, double) { return x + y; });
}

inline unsigned subtract_pairs(unsigned a, unsigned b) {
    return of_pairs(a, b, 0, [](double x, double y, double) { return x - y; });
}

inline unsigned multiply_add_pairs(unsigned a, unsigned b, unsigned c) {
    return of_pairs(a, b, c, [](double x, double y, double z) { return x * y + z; });
}

inline unsigned multiply_add_relu_pairs(unsigned a, unsigned b, unsigned c) {
    return of_pairs(a, b, c, [](double x, double y, double z) {
        const double sum = x * y + z;
        return sum < 0 ? 0 : sum;
    });
}

inline unsigned pack_relu(float first, float second) {
    return pack<Half>(first < 0 ? 0 : first, second < 0 ? 0 : second);
}

inline unsigned where_positive(unsigned values, unsigned pair) {
    return (first_of(values) > 0 ? pair & 0xffff : 0) | (second_of(values) > 0 ? pair & 0xffff0000 : 0);
}

inline void add_where_positive(unsigned values, float first, float second, float& first_sum,
                               float& second_sum, float& first_other, float& second_other) {
    if (first_of(values) > 0) {
        first_sum += first;
        first_other += first;
    }
    if (second_of(values) > 0) {
        second_sum += second;
        second_other += second;
    }
}

inline float power_of_two(float x) { return std::exp2(x); }

inline float logarithm(float x) { return std::log2(x); }

// Element k of the row that lane `row * 4` to `row * 4 + 3` hold pairs of, in register `which`.
template <typename T, size_t N>
inline float element(const std::array<std::array<unsigned, N>, 32>& registers, int row, int k,
                     int which) {
    const unsigned pair = registers[row % 8 * 4 + k % 8 / 2][which];
    return to_float(T{static_cast<unsigned short>(k % 2 ? pair >> 16 : pair)});
}

template <typename T>
struct Mma {
    static void k16(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                    unsigned b1) {
        const auto registers = exchange(std::array{a0, a1, a2, a3, b0, b1});
        multiply(d, 16, [&](int row, int column, int k) {
            return element<T>(registers, row, k, row / 8 + k / 8 * 2) *
                   element<T>(registers, column, k, 4 + k / 8);
        });
    }

    static void k8(float (&d)[4], unsigned a0, unsigned a1, unsigned b0) {
        const auto registers = exchange(std::array{a0, a1, b0});
        multiply(d, 8, [&](int row, int column, int k) {
            return element<T>(registers, row, k, row / 8) * element<T>(registers, column, k, 2);
        });
    }

  private:
    template <typename Product>
    static void multiply(float (&d)[4], int depth, Product product) {
        const int lane = threadIdx.x % 32;
        for (int i = 0; i < 4; ++i)
            for (int k = 0; k < depth; ++k)
                d[i] += product(lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2, k);
    }
};
