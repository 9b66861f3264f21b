// Instructions that CUDA C++ has no name for without headers of the CUDA toolkit: conversions of 16-bit
// values, copies to shared memory ahead of use, and products of small matrices. Nothing else in this
// folder holds PTX.
#pragma once

struct Half {
    unsigned short bits;
};

struct BFloat16 {
    unsigned short bits;
};

__device__ inline float to_float(Half x) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
}

__device__ inline float to_float(BFloat16 x) {
    return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}

// To nearest, ties to even.
__device__ inline Half to_half(float x) {
    Half narrowed;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrowed.bits) : "f"(x));
    return narrowed;
}

__device__ inline BFloat16 to_bfloat16(float x) {
    BFloat16 narrowed;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrowed.bits) : "f"(x));
    return narrowed;
}

// Two neighbours in memory, rounded by one instruction; `first` takes the lower half.
template <typename T>
__device__ inline unsigned pack(float first, float second);

template <>
__device__ inline unsigned pack<Half>(float first, float second) {
    unsigned packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
    return packed;
}

template <>
__device__ inline unsigned pack<BFloat16>(float first, float second) {
    unsigned packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
    return packed;
}

// Two halves as near to these as finite ones can be; a NaN stays one.
__device__ inline unsigned pack_finite(float first, float second) {
    unsigned packed;
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
    return packed;
}

// Arithmetic on two halves in a word, each product and sum rounded once.
__device__ inline unsigned fma_halves(unsigned a, unsigned x, unsigned b) {
    unsigned sum;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(x), "r"(b));
    return sum;
}

// max(0, a * x + b); of a NaN, NaN.
__device__ inline unsigned fma_relu_halves(unsigned a, unsigned x, unsigned b) {
    unsigned sum;
    asm("fma.rn.relu.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(x), "r"(b));
    return sum;
}

__device__ inline unsigned add_halves(unsigned a, unsigned b) {
    unsigned sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
}

__device__ inline unsigned multiply_halves(unsigned a, unsigned b) {
    unsigned product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

// Adds `first` to `sum` if the lower one of two halves is not zero, and `second` to `other` if the upper
// one is not.
__device__ inline void add_where(unsigned halves, float first, float second, float& sum,
                                 float& other) {
    asm("{.reg .pred p, q; setp.neu.f16x2 p|q, %2, %3; @p add.f32 %0, %0, %4; @q add.f32 %1, %1, %5;}"
        : "+f"(sum), "+f"(other)
        : "r"(halves), "r"(0), "f"(first), "f"(second));
}

// The larger ones of two pairs; of a NaN and a number, the number.
template <typename T>
__device__ inline unsigned larger(unsigned a, unsigned b);

template <>
__device__ inline unsigned larger<Half>(unsigned a, unsigned b) {
    unsigned most;
    asm("max.f16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
    return most;
}

template <>
__device__ inline unsigned larger<BFloat16>(unsigned a, unsigned b) {
    unsigned most;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
    return most;
}

// The larger one; a NaN if either is one.
__device__ inline float larger_or_nan(float a, float b) {
    float most;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
    return most;
}

// 1 for a half above zero, 0 for any other.
__device__ inline unsigned above_zero(unsigned halves) {
    unsigned ones;
    asm("set.gt.f16x2.f16x2 %0, %1, %2;" : "=r"(ones) : "r"(halves), "r"(0));
    return ones;
}

// Makes the compiler forget how a value came about, so that it neither works it out anew where it is
// used, nor works out ahead of a loop, in registers that there are not, all that is added to it there.
__device__ inline void forget_origin(unsigned& value) { asm volatile("" : "+r"(value)); }

__device__ inline void forget_origin(int& value) { asm volatile("" : "+r"(value)); }

template <typename T>
__device__ inline void forget_origin(const T*& pointer) {
    asm volatile("" : "+l"(pointer));
    __builtin_assume(__isGlobal(pointer));
}

__device__ inline unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Stores a half of a pair at each of two shared addresses, unless told not to. Without the branches
// that a compiler makes of such conditions.
__device__ inline void store_pair(unsigned first, unsigned second, unsigned pair, bool store_first,
                                  bool store_second) {
    asm volatile(
        "{.reg .pred p, q; .reg .b16 low, high;"
        "mov.b32 {low, high}, %2; setp.ne.u32 p, %3, 0; setp.ne.u32 q, %4, 0;"
        "@p st.shared.b16 [%0], low; @q st.shared.b16 [%1], high;}" ::"r"(first),
        "r"(second), "r"(pair), "r"(static_cast<unsigned>(store_first)),
        "r"(static_cast<unsigned>(store_second))
        : "memory");
}

// Copies V elements, at least 4 bytes, to a shared address, not waiting for them.
template <int V, typename T>
__device__ inline void copy_async(unsigned to, const T* from) {
    if (V * sizeof(T) == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from),
                     "n"(V * sizeof(T))
                     : "memory");
}

// The same, waiting for less than 4 bytes.
template <int V, typename T>
__device__ inline void copy_async(T* to, const T* from) {
    if constexpr (V * sizeof(T) >= 4) copy_async<V>(shared_address(to), from);
    else *to = *from;
}

// The same, or zeros where nothing `exists` to be copied.
template <int V, typename T>
__device__ inline void copy_or_clear(T* to, const T* from, bool exists) {
    constexpr int BYTES = V * sizeof(T);
    const int bytes = exists ? BYTES : 0;
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                     "l"(from), "r"(bytes)
                     : "memory");
    else if constexpr (BYTES >= 4)
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)),
                     "l"(from), "n"(BYTES), "r"(bytes)
                     : "memory");
    else
        *to = exists ? *from : T{};
}

__device__ inline void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of the thread's groups of copies are under way.
template <int PENDING>
__device__ inline void wait_for_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices; lane l gives the shared address of 8 elements, row l % 8 of matrix l / 8.
// Volatile, so that it stays behind the barrier that completes what it reads.
template <bool TRANSPOSED>
__device__ inline void load_matrices(unsigned row, unsigned (&matrices)[4]) {
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                     : "r"(row));
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                     : "r"(row));
}

// Two of them; lanes 0 to 15 give the addresses.
template <bool TRANSPOSED>
__device__ inline void load_matrices(unsigned row, unsigned (&matrices)[2]) {
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                     : "=r"(matrices[0]), "=r"(matrices[1])
                     : "r"(row));
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                     : "=r"(matrices[0]), "=r"(matrices[1])
                     : "r"(row));
}

// The transpose of an 8 x 8 matrix.
__device__ inline unsigned transpose(unsigned matrix) {
    unsigned transposed;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(matrix));
    return transposed;
}

// Pairs of halves, as `pack` makes them.
__device__ inline float first_of(unsigned pair) {
    float value;
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(value) : "r"(pair));
    return value;
}

__device__ inline float second_of(unsigned pair) {
    float value;
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}" : "=f"(value) : "r"(pair));
    return value;
}

__device__ inline unsigned add_pairs(unsigned a, unsigned b) {
    unsigned sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
}

__device__ inline unsigned subtract_pairs(unsigned a, unsigned b) {
    unsigned difference;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
    return difference;
}

// a * b + c
__device__ inline unsigned multiply_add_pairs(unsigned a, unsigned b, unsigned c) {
    unsigned sum;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
}

// max(a * b + c, 0)
__device__ inline unsigned multiply_add_relu_pairs(unsigned a, unsigned b, unsigned c) {
    unsigned sum;
    asm("fma.rn.relu.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
}

// Rounds max(first, 0) and max(second, 0).
__device__ inline unsigned pack_relu(float first, float second) {
    unsigned packed;
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
    return packed;
}

// The elements of `pair` where `values` are positive, and zeros.
__device__ inline unsigned where_positive(unsigned values, unsigned pair) {
    unsigned mask;
    asm("set.gt.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(values), "r"(0));
    return mask & pair;
}

// Adds to two sums, and to two others, where `values` are positive.
__device__ inline void add_where_positive(unsigned values, float first, float second,
                                          float& first_sum, float& second_sum, float& first_other,
                                          float& second_other) {
    asm("{.reg .pred p, q; setp.gt.f16x2 p|q, %4, %5; @p add.f32 %0, %0, %6; @q add.f32 %1, %1, %7;"
        "@p add.f32 %2, %2, %6; @q add.f32 %3, %3, %7;}"
        : "+f"(first_sum), "+f"(second_sum), "+f"(first_other), "+f"(second_other)
        : "r"(values), "r"(0), "f"(first), "f"(second));
}

// 2 to the power of x, within 2 units in the last place.
__device__ inline float power_of_two(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}

// The logarithm of x to base 2, within 2^-22.
__device__ inline float logarithm(float x) {
    float exponent;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(exponent) : "f"(x));
    return exponent;
}

// d += a * b, as the PTX manual lays out the fragments of mma.m16n8k16 and mma.m16n8k8.
template <typename T>
struct Mma;

#define DEFINE_MMA(T, NAME)                                                                       \
    template <>                                                                                   \
    struct Mma<T> {                                                                               \
        static __device__ void k16(float (&d)[4], unsigned a0, unsigned a1, unsigned a2,          \
                                   unsigned a3, unsigned b0, unsigned b1) {                       \
            asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                            \
                ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                      \
                : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                  \
                : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                          \
        }                                                                                         \
        static __device__ void k8(float (&d)[4], unsigned a0, unsigned a1, unsigned b0) {         \
            asm("mma.sync.aligned.m16n8k8.row.col.f32." NAME "." NAME                             \
                ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"                               \
                : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                  \
                : "r"(a0), "r"(a1), "r"(b0));                                                     \
        }                                                                                         \
    };

DEFINE_MMA(Half, "f16")
DEFINE_MMA(BFloat16, "bf16")
#undef DEFINE_MMA
