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

// The vectors of K rows of `count` columns, dealt out to a warp.
template <int K, int V>
struct Vectors {
    int lane, vectors;
    unsigned inverse;  // i / vectors == i * inverse >> 16 for i below 7 * 88

    __device__ Vectors(int lane, int count)
        : lane(lane), vectors(count / V), inverse(65536 / (count / V) + 1) {}

    // Hands this lane's vectors to visit(row, column); most lanes have one or two.
    template <typename Visit>
    __device__ void visit(Visit visit) const {
#pragma unroll
        for (int k = 0; k < 2; ++k) visit_one(lane + k * 32, visit);
        for (int i = lane + 64; i < K * vectors; i += 32) visit_one(i, visit);
    }

    template <typename Visit>
    __device__ void visit_one(int i, Visit visit) const {
        const int row = i * inverse >> 16;
        if (i < K * vectors) visit(row, (i - row * vectors) * V);
    }
};

template <typename T, bool REFLECT, int K, int V>
__global__ void __launch_bounds__(256, 4)
    aggregation_mma(const T* x, Strides sx, const T* w, T* out, Strides so, Window window,
                    int weight_channels, int group, int tiles, int rows, int pitch,
                    int plane_pitch) {
    extern __shared__ double shared[];
    T* staged = reinterpret_cast<T*>(shared);
    const int width = window.width, plane = window.height * width, lines = rows + K - 1;
    const Task task(weight_channels, tiles, rows, window.height, width);
    const Vectors<K, V> vectors(task.lane, min(SEGMENT, width - task.begin));
    T* ring = staged + CHANNELS * plane_pitch + task.warp * (STAGES * K * WEIGHT_PITCH);
    const T* weights = w + (task.n * weight_channels + task.weight_channel) * K * K * plane +
                       task.row * width + task.begin;
    const auto fetch = [&](int ky) {
        if (ky < K && task.active)
            vectors.visit([&](int kx, int column) {
                copy_async<V>(ring + (ky % STAGES * K + kx) * WEIGHT_PITCH + column,
                              weights + (kx * plane + column) + ky * K * plane);
            });
        end_group();
    };
#pragma unroll
    for (int ky = 0; ky < STAGES - 1; ++ky) fetch(ky);
    stage_planes<REFLECT, K / 2, V>(x + task.n * sx.n + task.weight_channel * sx.c,
                                    weight_channels * sx.c, sx, window, group, task.top - K / 2,
                                    lines, K / 2, pitch, plane_pitch, staged);
    if (!task.active) return;
    const Band<K> band(task.lane);
    const T* low = ring + band.row + band.diagonal[0] * WEIGHT_PITCH;
    const T* high = ring + band.row + band.diagonal[1] * WEIGHT_PITCH;
    const T* columns = staged + task.matrix_row(plane_pitch) + (task.row - task.top) * pitch +
                       task.begin;
    float sums[PRODUCTS][4] = {};
#pragma unroll
    for (int ky = 0; ky < K; ++ky) {
        fetch(ky + STAGES - 1);
        wait_for_groups<STAGES - 1>();
        __syncwarp();
        const int slot = ky % STAGES * K * WEIGHT_PITCH;
#pragma unroll
        for (int b = 0; b < PRODUCTS; ++b) {
            if (b >= task.products) break;
            const int at = slot + b * PIXELS;
            unsigned matrices[4];
            load_matrices<false>(columns + ky * pitch + b * PIXELS, matrices);
            band.template multiply<T>(sums[b], pair(low[at], high[at]),
                                      pair(low[at + 8], high[at + 8]), matrices);
        }
        __syncwarp();
    }
    // The lane holds two pixels, 8 columns apart, of two channels.
    const int g = task.lane % 4 * 2;
    T* to = out + task.n * so.n + (task.weight_channel + g * weight_channels) * so.c +
            task.row * so.h + (task.begin + band.row) * so.w;
    const long long next_channel = weight_channels * so.c;
#pragma unroll
    for (int half = 0; half < 2 * PRODUCTS; ++half) {
        if (task.begin + band.row + half * 8 >= width) break;
#pragma unroll
        for (int c = 0; c < 2; ++c)
            if (g + c < group)
                to[half * 8 * so.w + c * next_channel] = narrow<T>(sums[half / 2][half % 2 * 2 + c]);
    }
}

template <typename T, bool REFLECT, int K, int V>
__global__ void __launch_bounds__(256, 4)
    aggregation_weight_gradient_mma(const T* grad, Strides sg, const T* x, Strides sx, T* grad_w,
                                    Window window, int weight_channels, int group, int tiles,
                                    int rows, int pitch, int plane_pitch) {
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
    const Vectors<K, V> vectors(task.lane, min(SEGMENT, width - task.begin));
    const int line = task.matrix_row(plane_pitch) + (task.row - task.top) * pitch + task.begin;
    const T* columns = staged + line;
    // Transposed, pairs of channels are neighbours: 16 pixels x 8, and below 8 x 24 columns.
    unsigned pixels[PRODUCTS][4];
#pragma unroll
    for (int b = 0; b < PRODUCTS; ++b)
        if (b < task.products) load_matrices<true>(slopes + line + b * PIXELS, pixels[b]);
#pragma unroll 1
    for (int ky = 0; ky < K; ++ky) {
#pragma unroll
        for (int b = 0; b < PRODUCTS; ++b) {
            if (b >= task.products) break;
            unsigned matrices[4];
            load_matrices<true>(columns + b * PIXELS, matrices);
            float products[3][4] = {};
#pragma unroll
            for (int m = 0; m < 3; ++m)
                Mma<T>::k8(products[m], pixels[b][0], pixels[b][1], matrices[m]);
#pragma unroll
            for (int p = 0; p < 2; ++p) {
                if (!band.inside[p]) continue;
                T* tap = taps + band.diagonal[p] * WEIGHT_PITCH + b * PIXELS + band.row;
                tap[0] = narrow<T>(band.block[p] ? products[1][p] : products[0][p]);
                tap[8] = narrow<T>(band.block[p] ? products[2][2 + p] : products[1][2 + p]);
            }
        }
        __syncwarp();
        vectors.visit([&](int kx, int column) {
            *reinterpret_cast<Vector<T, V>*>(to + (kx * plane + column)) =
                *reinterpret_cast<const Vector<T, V>*>(taps + kx * WEIGHT_PITCH + column);
        });
        __syncwarp();
        to += K * plane;
        columns += pitch;
    }
}

// Sums of padded columns, 16 * (products so far) - K / 2 being the first; their reflections are
// added at the end. The row of windows whose tap row ky lies on position y is y + K / 2 - ky.
template <typename T, bool REFLECT, int K, int V>
__global__ void __launch_bounds__(256, 3)
    aggregation_input_gradient_mma(const T* grad, Strides sg, const T* w, T* grad_x, Strides sx,
                                   Window window, int weight_channels, int group, int tiles,
                                   int rows, int pitch, int plane_pitch) {
    constexpr int R = K / 2;
    constexpr int SHIFT = (8 - 2 * R % 8) % 8;  // makes the weights' copies aligned
    extern __shared__ double shared[];
    T* staged = reinterpret_cast<T*>(shared);
    const int width = window.width, height = window.height, plane = height * width;
    const int lines = rows + K - 1, padded = width + 2 * R;
    const int segments = (padded + SEGMENT - 1) / SEGMENT;
    const Task task(weight_channels, tiles, rows, height, padded);
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
    const Vectors<K, V> vectors(task.lane, (last - first + V - 1) / V * V);
    const auto fetch = [&](int slot) {
        const int from = ky * K * plane + row_of() * width;
        vectors.visit([&](int kx, int column) {
            copy_async<V>(to_ring + (slot * K + kx) * GRADIENT_PITCH + column,
                          weights + (kx * plane + column) + from);
        });
    };
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
    stage_planes<false, 0, V>(grad + task.n * sg.n + task.weight_channel * sg.c,
                              weight_channels * sg.c, sg, window, group, task.top - R, lines, 2 * R,
                              pitch, plane_pitch, staged);
    const Band<K> band(task.lane);
    float sums[PRODUCTS][4] = {};
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
