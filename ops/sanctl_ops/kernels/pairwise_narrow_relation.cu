// What pairwise_gram.cu, pairwise_logits.cu and pairwise_weights_gradient.cu have for others, for at most
// four channels of the relation, two weight channels and 3 x 3 taps: the Gram matrix of z, logits and the
// logarithms of their sums of powers, and sums for the gradients of both convolutions' weights. `A` is
// what sums are kept in.
#include "pairwise_narrow.cuh"

constexpr int FEW = 4;  // channels of the relation, and between the convolutions
constexpr int Z = FEW + 3;  // channels of the relation, of positions, and the constant one
constexpr int PITCH = 16;   // rows and columns of the sums that are written

// The relation of a pixel to its neighbours.
struct NarrowRelation {
    using Pairs = Vector<unsigned, 4>;
    Pairs centre, scale, shift;
    const Pairs* keys;  // of the image

    // `affine` holds 8 factors and 8 summands.
    __device__ NarrowRelation(const Half* query, const Half* key, const Half* affine, const Own& own)
        : centre(reinterpret_cast<const Pairs*>(own.image(query, own.plane * TAIL))[own.pixel]),
          scale(reinterpret_cast<const Pairs*>(affine)[0]),
          shift(reinterpret_cast<const Pairs*>(affine)[1]),
          keys(reinterpret_cast<const Pairs*>(own.image(key, own.plane * TAIL))) {}

    __device__ void compute(int neighbour, float (&z)[Z]) const {
        const Pairs other = keys[neighbour];
#pragma unroll
        for (int c = 0; c < Z; c += 2) {
            const unsigned apart = subtract_pairs(centre.at[c / 2], other.at[c / 2]);
            const unsigned pair = multiply_add_relu_pairs(apart, scale.at[c / 2], shift.at[c / 2]);
            z[c] = first_of(pair);
            if (c + 1 < Z) z[c + 1] = second_of(pair);
        }
    }
};

// Weights by hidden channels: of the first convolution, and of the second one.
struct Convolutions {
    float first[FEW][Z], second[FEW][SLOTS];

    // An element of a matrix of 8 columns as pairwise_weights.cu packs it.
    __device__ static float element(const Half* packed, int row, int column) {
        return widen(packed[(row * 4 + column / 2) * 8 + column % 2]);
    }

    // `packed2` has hidden channels in its rows if BY_HIDDEN, else in its columns.
    template <bool BY_HIDDEN>
    __device__ void take(const Half* packed1, const Half* packed2) {
#pragma unroll
        for (int o = 0; o < FEW; ++o) {
#pragma unroll
            for (int c = 0; c < Z; ++c) first[o][c] = element(packed1, o, c);
#pragma unroll
            for (int s = 0; s < SLOTS; ++s)
                second[o][s] = BY_HIDDEN ? element(packed2, o, s) : element(packed2, s, o);
        }
    }

    // Hidden channel o before its ReLU.
    __device__ float hidden(int o, const float (&z)[Z]) const {
        float sum = 0;
#pragma unroll
        for (int c = 0; c < Z; ++c) sum += first[o][c] * z[c];
        return sum;
    }
};

// Adds up what the threads of a block have, in a fixed order, into the first lanes' `joined`, COUNT
// floats of shared memory for each warp.
template <int COUNT>
__device__ inline void join_block(float (&sums)[COUNT], float* joined) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
#pragma unroll
        for (int apart = 16; apart > 0; apart /= 2)
            sums[i] += __shfl_xor_sync(0xffffffff, sums[i], apart);
        if (threadIdx.x % 32 == 0) joined[threadIdx.x / 32 * COUNT + i] = sums[i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < COUNT; i += THREADS) {
        float sum = 0;
        for (int warp = 0; warp < THREADS / 32; ++warp) sum += joined[warp * COUNT + i];
        joined[i] = sum;
    }
    __syncthreads();
}

// Hands the thread's pixels of the `each` squares that a block takes, of `all`, to visit(own).
template <typename Visit>
__device__ inline void visit_share(const Squares& squares, int each, int all, Visit visit) {
    const int end = min(static_cast<int>(blockIdx.x) * each + each, all);
#pragma unroll 1
    for (int square = blockIdx.x * each; square < end; ++square) {
        const Own own(square, squares);
        if (own.exists) visit(own);
    }
}

// Where the product of z's channels i and j, i <= j, is among those of the upper half.
__device__ inline constexpr int upper(int i, int j) { return i * Z - i * (i - 1) / 2 + j - i; }

// `partials` are (blocks, 8, 8), zero but for the upper half of the matrix; a block takes `each` squares.
template <typename A>
__global__ void __launch_bounds__(THREADS, 3)
    pairwise_gram_narrow(const Half* query, const Half* key, const Half* affine, A* partials,
                         Squares squares, int each, int all) {
    extern __shared__ double shared[];
    constexpr int COUNT = Z * (Z + 1) / 2;
    A sums[COUNT] = {};
    visit_share(squares, each, all, [&](const Own& own) {
        const NarrowRelation relation(query, key, affine, own);
        visit_neighbours(own, squares, [&](int, int neighbour) {
            float z[Z];
            relation.compute(neighbour, z);
#pragma unroll
            for (int i = 0; i < Z; ++i)
#pragma unroll
                for (int j = i; j < Z; ++j) sums[upper(i, j)] += z[i] * z[j];
        });
    });
    A* const joined = reinterpret_cast<A*>(shared);
    join_block(sums, joined);
    if (threadIdx.x >= TAIL * TAIL) return;
    const int i = threadIdx.x / TAIL, j = threadIdx.x % TAIL;
    partials[blockIdx.x * TAIL * TAIL + threadIdx.x] = i <= j && j < Z ? joined[upper(i, j)] : 0;
}

// Writes what pairwise_logits does. `weights1` is by hidden channels, `weights2` by weight channels.
template <typename A>
__global__ void __launch_bounds__(THREADS, 3)
    pairwise_logits_narrow(const Half* query, const Half* key, const Half* affine,
                           const Half* weights1, const Half* weights2, Half* logits, A* log_sums,
                           Squares squares) {
    const Own own(blockIdx.x, squares);
    if (!own.exists) return;
    Convolutions weights;
    weights.take<false>(weights1, weights2);
    const NarrowRelation relation(query, key, affine, own);
    unsigned written[TAPS];  // at last: what is read may not be read ahead of a store
    visit_neighbours(own, squares, [&](int tap, int neighbour) {
        float z[Z], sums[SLOTS] = {};
        relation.compute(neighbour, z);
#pragma unroll
        for (int o = 0; o < FEW; ++o) {
            const float hidden = weights.hidden(o, z);
            const float positive = passes(hidden) ? hidden : 0;
#pragma unroll
            for (int s = 0; s < SLOTS; ++s) sums[s] += weights.second[o][s] * positive;
        }
        written[tap] = pack<Half>(sums[0], sums[1]);
    });
    Half* const to = own.image(logits, TAPS * own.plane * SLOTS) + own.pixel * SLOTS;
    float most[SLOTS], sums[SLOTS] = {};
#pragma unroll
    for (int tap = 0; tap < TAPS; ++tap) {
        *reinterpret_cast<unsigned*>(to + tap * own.plane * SLOTS) = written[tap];
        const float pair[SLOTS] = {first_of(written[tap]), second_of(written[tap])};
#pragma unroll
        for (int s = 0; s < SLOTS; ++s) most[s] = tap == 0 ? pair[s] : max(most[s], pair[s]);
    }
#pragma unroll
    for (int tap = 0; tap < TAPS; ++tap) {
        sums[0] += power_of_two(first_of(written[tap]) - most[0]);
        sums[1] += power_of_two(second_of(written[tap]) - most[1]);
    }
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) sums[s] = most[s] + logarithm(sums[s]);
    store<SLOTS>(own.image(log_sums, own.plane * SLOTS) + own.pixel * SLOTS, sums);
}

// `partials` are (blocks, PITCH, PITCH), as pairwise_weights_gradient writes them: of hidden channels,
// those of z and, from TAIL on, of weights. `weights1` and `weights2` are by hidden channels; a block
// takes `each` squares.
template <typename A>
__global__ void __launch_bounds__(THREADS, 2)
    pairwise_weights_gradient_narrow(const Half* query, const Half* key, const Half* affine,
                                     const Half* weights1, const Half* weights2,
                                     const Half* grad_logits, A* partials, Squares squares, int each,
                                     int all) {
    extern __shared__ double shared[];
    constexpr int OF_HIDDEN = Z + SLOTS;
    Convolutions weights;
    weights.take<true>(weights1, weights2);
    A sums[FEW * OF_HIDDEN] = {};
    visit_share(squares, each, all, [&](const Own& own) {
        const NarrowRelation relation(query, key, affine, own);
        const Half* const slopes =
            own.image(grad_logits, TAPS * own.plane * SLOTS) + own.pixel * SLOTS;
        visit_neighbours(own, squares, [&](int tap, int neighbour) {
            float z[Z], slope[SLOTS];
            relation.compute(neighbour, z);
            load<SLOTS>(slopes + tap * own.plane * SLOTS, slope);
#pragma unroll
            for (int o = 0; o < FEW; ++o) {
                const float hidden = weights.hidden(o, z);
                float of_hidden = 0;
#pragma unroll
                for (int s = 0; s < SLOTS; ++s) {
                    of_hidden += weights.second[o][s] * slope[s];
                    sums[o * OF_HIDDEN + Z + s] += passes(hidden) ? hidden * slope[s] : 0;
                }
                of_hidden = passes(hidden) ? of_hidden : 0;
#pragma unroll
                for (int c = 0; c < Z; ++c) sums[o * OF_HIDDEN + c] += of_hidden * z[c];
            }
        });
    });
    A* const joined = reinterpret_cast<A*>(shared);
    join_block(sums, joined);
    const int o = threadIdx.x / PITCH, c = threadIdx.x % PITCH;
    A sum = 0;
    if (o < FEW && c < Z) sum = joined[o * OF_HIDDEN + c];
    if (o < FEW && c >= TAIL && c < TAIL + SLOTS) sum = joined[o * OF_HIDDEN + Z + c - TAIL];
    partials[blockIdx.x * PITCH * PITCH + threadIdx.x] = sum;
}
