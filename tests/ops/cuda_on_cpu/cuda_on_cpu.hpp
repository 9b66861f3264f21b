// What CUDA kernels need of CUDA C++, on a CPU, a block at a time. Every thread of a block has a stack of
// its own and runs until it waits for others, then the next one does: who reads what another thread has
// not written yet, or writes what it has not read, is found out.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

using std::max;
using std::min;

struct Index {
    unsigned x;
};

inline Index threadIdx, blockIdx, blockDim, gridDim;

// As much as a block may have; filled with NaN before each block, unlike what kernels give a size.
constexpr size_t SHARED_BYTES = 96 * 1024;
alignas(128) double shared[SHARED_BYTES / sizeof(double)];

[[noreturn]] inline void fail(const char* message) {
    fprintf(stderr, "%s (block %u, thread %u)\n", message, blockIdx.x, threadIdx.x);
    abort();
}

// A copy that has been asked for.
struct Copy {
    void* to;
    const void* from;
    size_t bytes;
};

struct Thread {
    static constexpr size_t STACK_BYTES = 256 * 1024;
    std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
    ucontext_t context;
    bool runs;
    std::vector<std::vector<Copy>> groups;  // of copies under way
};

inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline std::function<void()> entry;

// Lets the other threads run.
inline void yield() {
    const unsigned own = threadIdx.x;
    swapcontext(&threads[own].context, &scheduler);
    threadIdx.x = own;
}

class Barrier {
  public:
    explicit Barrier(unsigned expected) : expected_(expected) {}

    void wait() {
        const unsigned before = opened_;
        if (++arrived_ == expected_) open();
        while (opened_ == before) yield();
    }

    // One thread fewer will arrive from now on.
    void drop() {
        if (arrived_ == --expected_) open();
    }

  private:
    void open() {
        arrived_ = 0;
        ++opened_;
    }

    unsigned expected_, arrived_ = 0, opened_ = 0;
};

struct Warp {
    Barrier barrier{32};
    std::array<unsigned, 8> registers[32];
};

inline std::unique_ptr<Barrier> block_barrier;
inline std::vector<Warp> warps;

inline void __syncthreads() { block_barrier->wait(); }

inline void __syncwarp() { warps[threadIdx.x / 32].barrier.wait(); }

// Gives every lane the registers of all lanes of its warp.
template <size_t N>
inline std::array<std::array<unsigned, N>, 32> exchange(const std::array<unsigned, N>& own) {
    Warp& warp = warps[threadIdx.x / 32];
    std::copy(own.begin(), own.end(), warp.registers[threadIdx.x % 32].begin());
    warp.barrier.wait();
    std::array<std::array<unsigned, N>, 32> all;
    for (int lane = 0; lane < 32; ++lane)
        std::copy_n(warp.registers[lane].begin(), N, all[lane].begin());
    warp.barrier.wait();
    return all;
}

// The value of another lane of the warp, or a lane's own where there is no such lane.
template <typename T>
inline T of_lane(T value, unsigned lane) {
    const auto all = exchange(std::bit_cast<std::array<unsigned, sizeof(T) / sizeof(unsigned)>>(value));
    return std::bit_cast<T>(all[lane < 32 ? lane : threadIdx.x % 32]);
}

template <typename T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
    return of_lane(value, (threadIdx.x % 32) ^ mask);
}

template <typename T>
inline T __shfl_down_sync(unsigned, T value, unsigned distance) {
    return of_lane(value, threadIdx.x % 32 + distance);
}

inline double rsqrt(double value) { return 1 / std::sqrt(value); }

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

inline void run_thread() {
    entry();
    block_barrier->drop();
    threads[threadIdx.x].runs = false;
    setcontext(&scheduler);
}

inline void begin(Thread& thread) {
    getcontext(&thread.context);
    thread.context.uc_stack = {.ss_sp = thread.stack.get(), .ss_size = Thread::STACK_BYTES};
    makecontext(&thread.context, run_thread, 0);
    thread.runs = true;
    thread.groups.assign(1, {});
}

template <typename Kernel>
inline void run(unsigned blocks, unsigned count, Kernel kernel) {
    blockDim.x = count;
    gridDim.x = blocks;
    entry = kernel;
    threads.resize(count);
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        std::fill(std::begin(shared), std::end(shared), std::numeric_limits<double>::quiet_NaN());
        block_barrier = std::make_unique<Barrier>(count);
        warps.assign(count / 32, {});
        std::for_each(threads.begin(), threads.end(), begin);
        for (bool any = true; any;) {
            any = false;
            // From one end in one block, from the other in the next.
            for (unsigned i = 0; i < count; ++i) {
                threadIdx.x = blockIdx.x % 2 ? count - 1 - i : i;
                if (!threads[threadIdx.x].runs) continue;
                any = true;
                swapcontext(&scheduler, &threads[threadIdx.x].context);
            }
        }
    }
}
