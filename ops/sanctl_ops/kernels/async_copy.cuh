// Copies from global to shared memory that a thread starts ahead of the use of what they bring.
#pragma once

#include "elements.cuh"

__device__ inline unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Copies V elements to shared memory, not waiting for them where the hardware can do without.
template <int V, typename T>
__device__ inline void copy_async(T* to, const T* from) {
    if (V * sizeof(T) == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
                     : "memory");
    else if (V * sizeof(T) >= 4)
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from),
                     "n"(V * sizeof(T) >= 4 ? V * sizeof(T) : 4)
                     : "memory");
    else
        *to = *from;
}

__device__ inline void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of the thread's groups of copies are under way.
template <int PENDING>
__device__ inline void wait_for_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
