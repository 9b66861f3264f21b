// The gradient behind the first normalisation, summed over the taps of every query or, in a walk over
// keys, over the queries of every padded key: see pairwise.cuh.
#include "pairwise.cuh"

// Taps that a warp takes at once, where weights do not fit into registers and are read once for them.
template <int REL>
constexpr int TOGETHER = REL > 32 ? 2 : 1;

// Turns of a round, which are rows of taps if they are unrolled, and rounds.
template <int REL, int K>
constexpr int UNROLLED = REL <= 16 ? K : 1;
template <int REL, int K>
constexpr int ROUNDS =
    (K * K + UNROLLED<REL, K> * TOGETHER<REL> - 1) / (UNROLLED<REL, K> * TOGETHER<REL>);

// One step of a walk over a window: number v of those taken at once, in turn u of a round.
template <int REL, int K>
struct Step {
    int i, j;

    __device__ Step(int round, int u, int v) {
        const int number = round * TOGETHER<REL> + v;
        i = UNROLLED<REL, K> == K ? round : number / K;
        j = UNROLLED<REL, K> == K ? u : number % K;
    }
};

// Writes (N, H * W, REL + 8) or, over KEYS, (N, padded pixels, REL + 8), multiplied by *unscale. Rows
// of blocks of weights1 and of weights2, transposed, are hidden channels; those of `back` are channels
// of z: what the gradient behind the second normalisation is multiplied by and, after that, z itself.
template <int REL, int K, bool KEYS>
__global__ void __launch_bounds__(RELATION_THREADS<REL>, RELATION_BLOCKS<REL>)
    pairwise_relation_gradient(const Half* query, const Half* key, const Half* affine,
                               const Half* weights1, const Half* weights2, const Half* back,
                               const Half* grad_logits, const float* unscale, float* grad,
                               Tiling tiling, int slots) {
    constexpr int SIZE = REL + TAIL, HIDDEN_CHUNKS = HIDDEN<REL> / 8;
    extern __shared__ double shared[];
    Half* staged = reinterpret_cast<Half*>(shared);
    const int lane = threadIdx.x % 32, plane = tiling.height * tiling.width;
    const int pixels = tiling.rows * tiling.columns.divisor;
    const Place place(blockIdx.x, tiling);
    const Weights1<REL> first_weights(weights1, lane);
    using SecondWeights = Blocks<HIDDEN_CHUNKS, SLABS<REL>, (REL <= 32)>;
    const SecondWeights second_weights(weights2, lane);
    using Back = Blocks<CHUNKS<REL>, HIDDEN_CHUNKS + CHUNKS<REL>, (REL <= 32)>;
    const Back back_weights(back, lane);
    stage_relation<REL, K, KEYS>(KEYS ? query : key, staged, place, tiling);
    const Half* centres = (KEYS ? key : query) + static_cast<long long>(place.n) * plane * SIZE;
#pragma unroll 1
    for (int first = threadIdx.x / 32 * GROUP; first < pixels; first += blockDim.x / 32 * GROUP) {
        const Pixel<K, KEYS> row(first + lane % 16, place, tiling);
        Relation<REL, KEYS, false> relation(centres, affine, staged, lane, row, tiling);
        const Pixel<K, KEYS> pixel[2] = {{first + lane / 4u, place, tiling},
                                         {first + 8 + lane / 4u, place, tiling}};
        unsigned at[2], columns[2];
        bool mine[2];
        const Walk<K, KEYS> walk(tiling, slots);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            relation.take_centre(h, centres + pixel[h].number(tiling) * SIZE, lane);
            mine[h] = pixel[h].exists && lane % 4 * 2 < slots;
            at[h] = walk.first(pixel[h], tiling, slots);
            columns[h] = KEYS ? pixel[h].columns_of_queries(tiling) : 0;
        }
        const Half* image = grad_logits +
                            static_cast<long long>(place.n) * SLABS<REL> * K * K * plane * slots +
                            lane % 4 * 2;
        const unsigned slab = K * K * plane * slots;
        // Bit j tells whether step (i, j) has a query.
        const auto queries = [&](int h, int i) {
            const bool in_row = i < K && (!KEYS || pixel[h].row_of_queries(i, tiling));
            return in_row ? KEYS ? columns[h] : (1u << K) - 1 : 0u;
        };
        using Slopes = unsigned[TOGETHER<REL>][SLABS<REL>][2];
        Slopes next;
        // Reads the slopes of the steps taken together from turn u of a round on.
        const auto fetch = [&](int round, int u, const unsigned (&of_row)[2]) {
#pragma unroll
            for (int v = 0; v < TOGETHER<REL>; ++v) {
                const Step<REL, K> step(round, u, v);
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const unsigned exist = UNROLLED<REL, K> == K ? of_row[h] : queries(h, step.i);
                    const bool read = mine[h] && exist >> step.j & 1;
#pragma unroll
                    for (int s = 0; s < SLABS<REL>; ++s)
                        next[v][s][h] =
                            read ? pair_at(image + (at[h] + walk.step(step.i, step.j) + s * slab)) : 0;
                }
            }
        };
        unsigned of_row[2] = {queries(0, 0), queries(1, 0)};
        fetch(0, 0, of_row);
        float sums[CHUNKS<REL>][4] = {};
#pragma unroll 1
        for (int round = 0; round < ROUNDS<REL, K>; ++round) {
            unsigned of_next[2] = {queries(0, round + 1), queries(1, round + 1)};
            if (KEYS && UNROLLED<REL, K> == K) {
                forget_origin(of_next[0]);
                forget_origin(of_next[1]);
            }
#pragma unroll
            for (int u = 0; u < UNROLLED<REL, K>; ++u) {
                Slopes slopes;
                unsigned z[TOGETHER<REL>][CHUNKS<REL>][2];
#pragma unroll
                for (int v = 0; v < TOGETHER<REL>; ++v) {
                    const Step<REL, K> step(round, u, v);
#pragma unroll
                    for (int s = 0; s < SLABS<REL>; ++s)
#pragma unroll
                        for (int h = 0; h < 2; ++h) slopes[v][s][h] = next[v][s][h];
                    // Behind the last step there is nothing; its place is read, but does not count.
                    const int row = step.i < K ? step.i : 0;
                    relation.compute((row * tiling.staged.divisor + step.j) * SIZE * 2, z[v]);
                    if (KEYS || TOGETHER<REL> > 1)
#pragma unroll
                        for (int h = 0; h < 2; ++h) {
                            const unsigned exist =
                                UNROLLED<REL, K> == K ? of_row[h] : queries(h, step.i);
                            const bool counts = exist >> step.j & 1;
#pragma unroll
                            for (int c = 0; c < CHUNKS<REL>; ++c) z[v][c][h] = counts ? z[v][c][h] : 0;
                        }
                }
                if (u + 1 < UNROLLED<REL, K>) fetch(round, u + 1, of_row);
                else fetch(round + 1, 0, of_next);
                unsigned hidden[TOGETHER<REL>][HIDDEN_CHUNKS][2];
#pragma unroll
                for (int c = 0; c < HIDDEN_CHUNKS; ++c) {
                    unsigned weights[Weights1<REL>::FOURS * 4], weights_back[SecondWeights::FOURS * 4];
                    first_weights.read(c, weights);
                    second_weights.read(c, weights_back);
#pragma unroll
                    for (int v = 0; v < TOGETHER<REL>; ++v) {
                        float values[4] = {}, slope[4] = {};
                        multiply<CHUNKS<REL>, 0>(values, z[v], weights);
                        multiply<SLABS<REL>, 0>(slope, slopes[v], weights_back);
#pragma unroll
                        for (int h = 0; h < 2; ++h)
                            hidden[v][c][h] =
                                where_positive(pack_relu(values[h * 2], values[h * 2 + 1]),
                                               pack<Half>(slope[h * 2], slope[h * 2 + 1]));
                    }
                }
#pragma unroll
                for (int c = 0; c < CHUNKS<REL>; ++c) {
                    unsigned weights[Back::FOURS * 4];
                    back_weights.read(c, weights);
#pragma unroll
                    for (int v = 0; v < TOGETHER<REL>; ++v) {
                        float slope[4] = {};
                        multiply<HIDDEN_CHUNKS, 0>(slope, hidden[v], weights);
                        multiply<CHUNKS<REL>, HIDDEN_CHUNKS>(slope, z[v], weights);
#pragma unroll
                        for (int h = 0; h < 2; ++h)
                            add_where_positive(z[v][c][h], slope[h * 2], slope[h * 2 + 1],
                                               sums[c][h * 2], sums[c][h * 2 + 1]);
                    }
                }
            }
            of_row[0] = of_next[0];
            of_row[1] = of_next[1];
        }
        const float factor = KEYS ? -*unscale : *unscale;
        const int all = KEYS ? (tiling.height + K - 1) * (tiling.width + K - 1) : plane;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (!pixel[h].exists) continue;
            const int number = KEYS ? pixel[h].padded_number(tiling) : pixel[h].number(tiling);
            float* to = grad + (static_cast<long long>(place.n) * all + number) * SIZE + lane % 4 * 2;
#pragma unroll
            for (int c = 0; c < CHUNKS<REL>; ++c) {
                const float pair[2] = {sums[c][h * 2] * factor, sums[c][h * 2 + 1] * factor};
                store<2>(to + c * 8, pair);
            }
        }
    }
}
