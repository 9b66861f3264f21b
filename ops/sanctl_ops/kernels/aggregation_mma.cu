// aggregation and its gradients for 16-bit values, windows of stride 1 and padding K / 2, contiguous
// weights and at most 8 channels to a weight: see banded_mma.cuh.
//
// Blocks run over (image, weight channel, tile of rows). A warp takes a segment of 64 pixels of one
// row, tap row by tap row; its weights pass through shared memory of its own, copied ahead of use.
#include "banded_mma.cuh"

constexpr int STAGES = 3;          // rows of taps under way or in use
constexpr int WEIGHT_PITCH = 72;   // 36 words: the diagonals of a band lie in different banks
constexpr int GRADIENT_PITCH = 88; // the same where a segment reads K - 1 more columns

struct Task {
    int lane, warp;
    long long n;
    int weight_channel, top;  // `top` is the first row of the block's tile
    int row, begin;           // this warp's row and first column
    int products;             // how many products of 16 pixels the segment takes
    bool active;

    // `columns` is how many columns of sums there are.
    __device__ Task(int weight_channels, int tiles, int rows, int height, int columns) {
        const int segments = (columns + SEGMENT - 1) / SEGMENT;
        const long long part = blockIdx.x / tiles;
        lane = threadIdx.x % 32;
        warp = threadIdx.x / 32;
        n = part / weight_channels;
        weight_channel = part % weight_channels;
        top = blockIdx.x % tiles * rows;
        row = top + warp / segments;
        begin = warp % segments * SEGMENT;
        products = min(PRODUCTS, (columns - begin + PIXELS - 1) / PIXELS);
        active = row < height;
    }

    // Where this lane's row of matrix l / 8 begins in a staged line: 8 columns of channel l % 8.
    __device__ int matrix_row(int plane_pitch) const {
        return lane % 8 * plane_pitch + lane / 8 * 8;
    }
};

// Deals the vectors of K rows of `count` columns out to a warp: visit(row, column).
template <int K, int V, typename Visit>
__device__ inline void visit_vectors(int lane, int count, Visit visit) {
    const int vectors = count / V;
    const unsigned inverse = 65536 / vectors + 1;  // i / vectors for i below 7 * 64
    for (int i = lane; i < K * vectors; i += 32) {
        const int row = i * inverse >> 16;
        visit(row, (i - row * vectors) * V);
    }
}

template <typename T, bool REFLECT, int K, int V>
__global__ void aggregation_mma(const T* x, Strides sx, const T* w, T* out, Strides so,
                                Window window, int weight_channels, int group, int tiles, int rows,
                                int pitch, int plane_pitch) {
    extern __shared__ double shared[];
    T* staged = reinterpret_cast<T*>(shared);
    const int width = window.width, plane = window.height * width, lines = rows + K - 1;
    const Task task(weight_channels, tiles, rows, window.height, width);
    stage_planes<REFLECT, K / 2, V>(x + task.n * sx.n + task.weight_channel * sx.c,
                                    weight_channels * sx.c, sx, window, group, task.top - K / 2,
                                    lines, K / 2, pitch, plane_pitch, staged);
    if (!task.active) return;
    T* ring = staged + CHANNELS * plane_pitch + task.warp * (STAGES * K * WEIGHT_PITCH);
    const T* weights = w + (task.n * weight_channels + task.weight_channel) * K * K * plane +
                       task.row * width + task.begin;
    const auto fetch = [&](int ky) {
        if (ky < K)
            visit_vectors<K, V>(task.lane, min(SEGMENT, width - task.begin), [&](int kx, int column) {
                copy_async<V>(ring + (ky % STAGES * K + kx) * WEIGHT_PITCH + column,
                              weights + static_cast<long long>(ky * K + kx) * plane + column);
            });
        end_group();
    };
    const Band<K> band(task.lane);
    float sums[PRODUCTS][4] = {};
#pragma unroll
    for (int ky = 0; ky < STAGES - 1; ++ky) fetch(ky);
#pragma unroll 1
    for (int ky = 0; ky < K; ++ky) {
        fetch(ky + STAGES - 1);
        wait_for_groups<STAGES - 1>();
        __syncwarp();
        const T* taps = ring + ky % STAGES * K * WEIGHT_PITCH + band.row;
        const T* low = taps + band.diagonal[0] * WEIGHT_PITCH;
        const T* high = taps + band.diagonal[1] * WEIGHT_PITCH;
        const T* columns = staged + task.matrix_row(plane_pitch) +
                           (task.row - task.top + ky) * pitch + task.begin;
#pragma unroll
        for (int b = 0; b < PRODUCTS; ++b) {
            if (b >= task.products) break;
            unsigned matrices[4];
            load_matrices<false>(columns + b * PIXELS, matrices);
            band.template multiply<T>(sums[b], pair(low[b * PIXELS], high[b * PIXELS]),
                                      pair(low[b * PIXELS + 8], high[b * PIXELS + 8]), matrices);
        }
        __syncwarp();
    }
#pragma unroll
    for (int b = 0; b < PRODUCTS; ++b) {
        if (b >= task.products) break;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int column = task.begin + b * PIXELS + band.row + i / 2 * 8;
            const int g = task.lane % 4 * 2 + i % 2;
            if (column < width && g < group)
                out[task.n * so.n + (task.weight_channel + g * weight_channels) * so.c +
                    task.row * so.h + column * so.w] = narrow<T>(sums[b][i]);
        }
    }
}

template <typename T, bool REFLECT, int K, int V>
__global__ void aggregation_weight_gradient_mma(const T* grad, Strides sg, const T* x, Strides sx,
                                                T* grad_w, Window window, int weight_channels,
                                                int group, int tiles, int rows, int pitch,
                                                int plane_pitch) {
    extern __shared__ double shared[];
    T* staged = reinterpret_cast<T*>(shared);
    T* slopes = staged + CHANNELS * plane_pitch;
    const int width = window.width, plane = window.height * width, lines = rows + K - 1;
    const Task task(weight_channels, tiles, rows, window.height, width);
    stage_planes<REFLECT, K / 2, V>(x + task.n * sx.n + task.weight_channel * sx.c,
                                    weight_channels * sx.c, sx, window, group, task.top - K / 2,
                                    lines, K / 2, pitch, plane_pitch, staged);
    stage_planes<false, 0, V>(grad + task.n * sg.n + task.weight_channel * sg.c,
                              weight_channels * sg.c, sg, window, group, task.top, rows, 0, pitch,
                              plane_pitch, slopes);
    if (!task.active) return;
    T* taps = slopes + CHANNELS * plane_pitch + task.warp * (K * WEIGHT_PITCH);
    T* to = grad_w + (task.n * weight_channels + task.weight_channel) * K * K * plane +
            task.row * width + task.begin;
    const Band<K> band(task.lane);
    const int own_line = task.row - task.top;
#pragma unroll 1
    for (int ky = 0; ky < K; ++ky) {
        const T* columns = staged + task.matrix_row(plane_pitch) + (own_line + ky) * pitch + task.begin;
        const T* pixels = slopes + task.matrix_row(plane_pitch) + own_line * pitch + task.begin;
#pragma unroll
        for (int b = 0; b < PRODUCTS; ++b) {
            if (b >= task.products) break;
            // Transposed, pairs of channels are neighbours: 16 pixels x 8 and 8 x 24 columns.
            unsigned a[4], matrices[4];
            load_matrices<true>(pixels + b * PIXELS, a);
            load_matrices<true>(columns + b * PIXELS, matrices);
            float products[3][4] = {};
#pragma unroll
            for (int m = 0; m < 3; ++m) Mma<T>::k8(products[m], a[0], a[1], matrices[m]);
#pragma unroll
            for (int p = 0; p < 2; ++p) {
                if (!band.inside[p]) continue;
                T* tap = taps + band.diagonal[p] * WEIGHT_PITCH + b * PIXELS + band.row;
                tap[0] = narrow<T>(band.block[p] ? products[1][p] : products[0][p]);
                tap[8] = narrow<T>(band.block[p] ? products[2][2 + p] : products[1][2 + p]);
            }
        }
        __syncwarp();
        visit_vectors<K, V>(task.lane, min(SEGMENT, width - task.begin), [&](int kx, int column) {
            *reinterpret_cast<Vector<T, V>*>(to + static_cast<long long>(ky * K + kx) * plane + column) =
                *reinterpret_cast<const Vector<T, V>*>(taps + kx * WEIGHT_PITCH + column);
        });
        __syncwarp();
    }
}

// Sums of padded columns, 16 * (products so far) - K / 2 being the first; their reflections are
// added at the end. The row of windows whose tap row ky lies on position y is y + K / 2 - ky.
template <typename T, bool REFLECT, int K, int V>
__global__ void aggregation_input_gradient_mma(const T* grad, Strides sg, const T* w, T* grad_x,
                                               Strides sx, Window window, int weight_channels,
                                               int group, int tiles, int rows, int pitch,
                                               int plane_pitch) {
    constexpr int R = K / 2;
    constexpr int SHIFT = (8 - 2 * R % 8) % 8;  // makes the weights' copies aligned
    extern __shared__ double shared[];
    T* staged = reinterpret_cast<T*>(shared);
    const int width = window.width, height = window.height, plane = height * width;
    const int lines = rows + K - 1, padded = width + 2 * R;
    const int segments = (padded + SEGMENT - 1) / SEGMENT;
    const Task task(weight_channels, tiles, rows, height, padded);
    stage_planes<false, 0, V>(grad + task.n * sg.n + task.weight_channel * sg.c,
                              weight_channels * sg.c, sg, window, group, task.top - R, lines, 2 * R,
                              pitch, plane_pitch, staged);
    T* rings = staged + CHANNELS * plane_pitch;
    auto* all = reinterpret_cast<Vector<T, 8>*>(rings);
    for (int i = threadIdx.x; i < blockDim.x / 32 * (STAGES * K * GRADIENT_PITCH / 8); i += blockDim.x)
        all[i] = {};
    __syncthreads();
    T* ring = rings + task.warp * (STAGES * K * GRADIENT_PITCH);
    // The segment reads the weights of columns begin - 2 * R to begin - 2 * R + 71 that exist.
    const int first = max(0, (task.begin - 2 * R) / V * V);
    const int last = min(width, task.begin - 2 * R + SEGMENT + 8);
    const T* weights = w + (task.n * weight_channels + task.weight_channel) * K * K * plane + first;
    T* to_ring = ring + first - (task.begin - 2 * R) + SHIFT;
    int which = 0, ky = -1, position = task.row;
    const auto row_of = [&] { return position + R - ky; };
    const auto advance = [&] {
        do {
            if (++ky == K) {
                ky = 0;
                do ++which;
                while (which < IMAGES<REFLECT> &&
                       !image<REFLECT>(task.row, height, R, which, position));
            }
        } while (which < IMAGES<REFLECT> && (row_of() < 0 || row_of() >= height));
        return which < IMAGES<REFLECT>;
    };
    const auto fetch = [&](int slot) {
        visit_vectors<K, V>(task.lane, (last - first + V - 1) / V * V, [&](int kx, int column) {
            copy_async<V>(to_ring + (slot * K + kx) * GRADIENT_PITCH + column,
                          weights + static_cast<long long>(ky * K + kx) * plane + row_of() * width +
                              column);
        });
    };
    const Band<K> band(task.lane);
    float sums[PRODUCTS][4] = {};
    int query[STAGES];
    bool more = task.active;
#pragma unroll
    for (int slot = 0; slot < STAGES; ++slot) query[slot] = -1;
#pragma unroll
    for (int slot = 0; slot < STAGES - 1; ++slot) {
        more = more && advance();
        query[slot] = more ? row_of() : -1;
        if (more) fetch(slot);
        end_group();
    }
    bool working = task.active;
    while (working) {
#pragma unroll
        for (int slot = 0; slot < STAGES; ++slot) {
            const int next = (slot + STAGES - 1) % STAGES;
            more = more && advance();
            query[next] = more ? row_of() : -1;
            if (more) fetch(next);
            end_group();
            wait_for_groups<STAGES - 1>();
            __syncwarp();
            working = query[slot] >= 0;
            if (!working) break;
            const T* taps = ring + slot * K * GRADIENT_PITCH + SHIFT + band.row;
            const T* columns = staged + task.matrix_row(plane_pitch) +
                               (query[slot] - task.top + R) * pitch + task.begin;
            // The diagonal d of the transposed band holds tap K - 1 - d, of column row + d.
            const T* low = taps + (K - 1 - band.diagonal[0]) * GRADIENT_PITCH + band.diagonal[0];
            const T* high = taps + (K - 1 - band.diagonal[1]) * GRADIENT_PITCH + band.diagonal[1];
#pragma unroll
            for (int b = 0; b < PRODUCTS; ++b) {
                if (b >= task.products) break;
                unsigned matrices[4];
                load_matrices<false>(columns + b * PIXELS, matrices);
                band.template multiply<T>(sums[b], pair(low[b * PIXELS], high[b * PIXELS]),
                                          pair(low[b * PIXELS + 8], high[b * PIXELS + 8]), matrices);
            }
            __syncwarp();
        }
    }
    wait_for_groups<0>();
    __syncthreads();  // from here on, the rings hold the sums, 8 channels of each row
    float* joined = reinterpret_cast<float*>(rings);
    const int line = segments * SEGMENT + 4, own_line = task.row - task.top;
    if (task.active)
#pragma unroll
        for (int b = 0; b < PRODUCTS; ++b)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int g = task.lane % 4 * 2 + i % 2;
                joined[(own_line * CHANNELS + g) * line + task.begin + b * PIXELS + band.row +
                       i / 2 * 8] = sums[b][i];
            }
    __syncthreads();
    const int here = min(rows, height - task.top);
    for (int i = threadIdx.x; i < here * group * width; i += blockDim.x) {
        const int column = i % width, g = i / width % group, row = i / width / group;
        const float* from = joined + (row * CHANNELS + g) * line;
        float sum = 0;
#pragma unroll
        for (int k = 0; k < IMAGES<REFLECT>; ++k) {
            int shown;
            if (image<REFLECT>(column, width, R, k, shown)) sum += from[shown + R];
        }
        grad_x[task.n * sx.n + (task.weight_channel + g * weight_channels) * sx.c +
               (task.top + row) * sx.h + column * sx.w] = narrow<T>(sum);
    }
}
