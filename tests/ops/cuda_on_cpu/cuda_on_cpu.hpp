// What CUDA kernels need of CUDA C++, on a CPU: every thread of a block is a thread, a block at a time.
#pragma once

#include <algorithm>
#include <array>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __launch_bounds__(...)

using std::max;
using std::min;

struct Index {
    unsigned x;
};

inline thread_local Index threadIdx, blockIdx;
inline Index blockDim, gridDim;

// As much as a block may have; filled with NaN before each block.
constexpr size_t SHARED_BYTES = 96 * 1024;
alignas(128) double shared[SHARED_BYTES / sizeof(double)];

[[noreturn]] inline void fail(const char* message) {
    fprintf(stderr, "%s (block %u, thread %u)\n", message, blockIdx.x, threadIdx.x);
    abort();
}

struct Warp {
    std::barrier<> barrier{32};
    std::array<unsigned, 8> registers[32];
};

inline std::unique_ptr<std::barrier<>> block_barrier;
inline std::vector<std::unique_ptr<Warp>> warps;

inline void __syncthreads() { block_barrier->arrive_and_wait(); }

inline void __syncwarp() { warps[threadIdx.x / 32]->barrier.arrive_and_wait(); }

// Gives every lane the registers of all lanes of its warp.
template <size_t N>
inline std::array<std::array<unsigned, N>, 32> exchange(const std::array<unsigned, N>& own) {
    Warp& warp = *warps[threadIdx.x / 32];
    std::copy(own.begin(), own.end(), warp.registers[threadIdx.x % 32].begin());
    warp.barrier.arrive_and_wait();
    std::array<std::array<unsigned, N>, 32> all;
    for (int lane = 0; lane < 32; ++lane)
        std::copy_n(warp.registers[lane].begin(), N, all[lane].begin());
    warp.barrier.arrive_and_wait();
    return all;
}

template <typename T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
    static_assert(sizeof(T) == sizeof(unsigned));
    const unsigned other = exchange(std::array{std::bit_cast<unsigned>(value)})
        [(threadIdx.x % 32) ^ mask][0];
    return std::bit_cast<T>(other);
}

inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned long long>(a) * b >> 32;
}

// Of the bytes of `high` and `low`, numbered 7 to 0, those that the digits of `selector` name.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const unsigned long long bytes = static_cast<unsigned long long>(high) << 32 | low;
    unsigned chosen = 0;
    for (int i = 0; i < 4; ++i)
        chosen |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return chosen;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

template <typename Kernel>
inline void run(unsigned blocks, unsigned threads, Kernel kernel) {
    blockDim.x = threads;
    gridDim.x = blocks;
    for (unsigned block = 0; block < blocks; ++block) {
        std::fill(std::begin(shared), std::end(shared), std::numeric_limits<double>::quiet_NaN());
        block_barrier = std::make_unique<std::barrier<>>(threads);
        warps.clear();
        for (unsigned warp = 0; warp < threads / 32; ++warp) warps.push_back(std::make_unique<Warp>());
        std::vector<std::thread> running;
        for (unsigned thread = 0; thread < threads; ++thread)
            running.emplace_back([=] {
                threadIdx.x = thread;
                blockIdx.x = block;
                kernel();
                block_barrier->arrive_and_drop();
            });
        for (std::thread& each : running) each.join();
    }
}
