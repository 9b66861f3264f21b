// aggregation and its gradients for 16-bit values, windows of stride 1 and padding K / 2, contiguous
// weights and at most 8 channels to a weight: see banded_mma.cuh.
//
// Blocks run over (image, weight channel, tile of rows). A warp takes 64 pixels of one row, or whole
// rows of up to 32 or 16 pixels, tap row by tap row; its weights, which lie in one piece, pass through
// shared memory of its own, copied ahead of use.
#include "banded_mma.cuh"

constexpr int STAGES = 3;           // rows of taps under way or in use
constexpr int WEIGHT_PITCH = 72;    // 36 words: the diagonals of a band lie in different banks
constexpr int GRADIENT_PITCH = 88;  // the same where a segment reads K - 1 more columns
constexpr int WINDOW_MARGIN = 4;    // columns staged before the first pixel
constexpr int GRADIENT_MARGIN = 8;

// A warp's share of a tile.
struct Task {
    int lane, warp;
    int n, weight_channel;
    int top;         // the first row of the block's tile
    int row, begin;  // this warp's first row and column
    int rows;        // how many rows, of `width` pixels if there are several
    int per_row;     // log2 of the products of a row: 0, 1 or 2
    bool active;

    // `rows` of a tile; `columns` of sums in a row of the plane; `together`: rows that a warp takes.
    __device__ Task(int weight_channels, int tiles, int tile_rows, int height, int columns,
                    int together) {
        const unsigned segments = (columns + SEGMENT - 1) / SEGMENT;
        const unsigned part = blockIdx.x / static_cast<unsigned>(tiles);
        lane = threadIdx.x % 32;
        warp = threadIdx.x / 32;
        n = part / static_cast<unsigned>(weight_channels);
        weight_channel = part - n * weight_channels;
        top = (blockIdx.x - part * tiles) * tile_rows;
        row = top + warp / segments * together;
        begin = warp % segments * SEGMENT;
        rows = min(together, min(top + tile_rows, height) - row);
        per_row = together == 4 ? 0 : together == 2 ? 1 : 2;
        active = rows > 0;
    }

    // Of product b: its row, counted from the warp's first, and its first column.
    __device__ int row_of(int b) const { return b >> per_row; }

    __device__ int column_of(int b) const { return begin + (b & ((1 << per_row) - 1)) * PIXELS; }

    __device__ bool has(int b, int columns) const { return row_of(b) < rows && column_of(b) < columns; }

    // Products that do not exist repeat the first, and are dropped in the end: branches would keep
    // the loads of one product from being started while another is computed.
    __device__ int or_first(int b, int columns) const { return has(b, columns) ? b : 0; }

    // Where this lane's row of matrix l / 8 begins in a staged line: 8 columns of channel l % 8.
    __device__ int matrix_row(int plane_pitch) const {
        return lane % 8 * plane_pitch + lane / 8 * 8;
    }
};

// The vectors of K rows of `count` elements, `plane` elements apart in global memory and PITCH in
// shared memory, dealt out to a warp: at most two to a lane.
template <typename T, int K, int V, int PITCH>
struct Vectors {
    unsigned lane, vectors;
    int plane, there[2], here[2];

    __device__ Vectors(unsigned lane, int count, int plane)
        : lane(lane), vectors(count / V), plane(plane) {
#pragma unroll
        for (int k = 0; k < 2; ++k) place(lane + k * 32, there[k], here[k]);
    }

    // Hands the places of this lane's vectors to visit(in global memory, in shared memory).
    template <typename Visit>
    __device__ void visit(Visit visit) const {
#pragma unroll
        for (int k = 0; k < 2; ++k)
            if (lane + k * 32 < K * vectors) visit(there[k], here[k]);
    }

  private:
    __device__ void place(unsigned i, int& global, int& shared) const {
        const unsigned row = i / max(vectors, 1u), column = (i - row * vectors) * V;
        global = row * plane + column;
        shared = row * PITCH + column;
    }
};

template <typename T, bool REFLECT, int K, int V>
__global__ void __launch_bounds__(256, 4)
    aggregation_mma(const T* x, Strides sx, const T* w, T* out, Strides so, Window window,
                    int weight_channels, int group, int tiles, int rows, int together, int vector,
                    int pitch, int plane_pitch) {
    extern __shared__ double shared[];
    const Staged<T> staged = {reinterpret_cast<T*>(shared), WINDOW_MARGIN, pitch, plane_pitch};
    const int width = window.width, plane = window.height * width, lines = rows + K - 1;
    const Task task(weight_channels, tiles, rows, window.height, width, together);
    const int count = together > 1 ? task.rows * width : min(SEGMENT, width - task.begin);
    const Vectors<T, K, V, WEIGHT_PITCH> vectors(task.lane, task.active ? count : 0, plane);
    T* ring = staged.data + CHANNELS * plane_pitch + task.warp * (STAGES * K * WEIGHT_PITCH);
    const T* weights =
        w + (static_cast<long long>(task.n) * weight_channels + task.weight_channel) * K * K * plane +
        task.row * width + task.begin;
    const auto fetch = [&](int ky) {
        if (ky < K)
            vectors.visit([&](int there, int here) {
                copy_async<V>(ring + ky % STAGES * K * WEIGHT_PITCH + here, weights + there);
            });
        weights += K * plane;
        end_group();
    };
#pragma unroll
    for (int ky = 0; ky < STAGES - 1; ++ky) fetch(ky);
    stage_planes<REFLECT, K / 2>(vector, x + task.n * sx.n + task.weight_channel * sx.c,
                                 weight_channels * sx.c, sx, window, group, task.top - K / 2, lines,
                                 staged);
    if (!task.active) return;
    const Band<K, WINDOW_MARGIN - K / 2> band(task.lane);
    const T* low = ring + band.row + band.diagonal[0] * WEIGHT_PITCH;
    const T* high = ring + band.row + band.diagonal[1] * WEIGHT_PITCH;
    unsigned columns[PRODUCTS];  // addresses of this lane's row of the matrices
    int pixels[PRODUCTS];        // first pixels of the products, in the ring
#pragma unroll
    for (int b = 0; b < PRODUCTS; ++b) {
        const int p = task.or_first(b, width);
        columns[b] = shared_address(staged.data + task.matrix_row(plane_pitch) + task.column_of(p) +
                                    (task.row - task.top + task.row_of(p)) * pitch);
        pixels[b] = task.row_of(p) * width + task.column_of(p) - task.begin;
    }
    float sums[PRODUCTS][4] = {};
#pragma unroll
    for (int ky = 0; ky < K; ++ky) {
        fetch(ky + STAGES - 1);
        wait_for_groups<STAGES - 1>();
        __syncwarp();
#pragma unroll
        for (int b = 0; b < PRODUCTS; ++b) {
            const int at = ky % STAGES * K * WEIGHT_PITCH + pixels[b];
            unsigned matrices[4];
            load_matrices<false>(columns[b], matrices);
            band.template multiply<T>(sums[b], pair(low[at], high[at]),
                                      pair(low[at + 8], high[at + 8]), matrices);
            columns[b] += pitch * sizeof(T);
        }
        __syncwarp();
    }
    // The lane holds two pixels, 8 columns apart, of two channels.
    const int g = task.lane % 4 * 2;
    const long long channel = weight_channels * so.c;
    T* to = out + task.n * so.n + (task.weight_channel + g * weight_channels) * so.c;
#pragma unroll
    for (int b = 0; b < PRODUCTS; ++b) {
        if (!task.has(b, width)) continue;
        const int column = task.column_of(b) + band.row;
        T* pixel = to + (task.row + task.row_of(b)) * so.h + column * so.w;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (column + half * 8 < width && g < group) *pixel = narrow<T>(sums[b][half * 2]);
            if (column + half * 8 < width && g + 1 < group)
                pixel[channel] = narrow<T>(sums[b][half * 2 + 1]);
            pixel += 8 * so.w;
        }
    }
}

template <typename T, bool REFLECT, int K, int V>
__global__ void __launch_bounds__(256, 4)
    aggregation_weight_gradient_mma(const T* grad, Strides sg, const T* x, Strides sx, T* grad_w,
                                    Window window, int weight_channels, int group, int tiles,
                                    int rows, int together, int vector, int pitch,
                                    int plane_pitch) {
    extern __shared__ double shared[];
    const Staged<T> staged = {reinterpret_cast<T*>(shared), WINDOW_MARGIN, pitch, plane_pitch};
    const int width = window.width, plane = window.height * width, lines = rows + K - 1;
    const Task task(weight_channels, tiles, rows, window.height, width, together);
    const Band<K, WINDOW_MARGIN - K / 2> band(task.lane);
    // 16 pixels x 8 channels of each product: two pixels, 8 columns apart, of two channels.
    unsigned pixels[PRODUCTS][2] = {};
    const int g = task.lane % 4 * 2;
    const T* slopes = grad + task.n * sg.n + (task.weight_channel + g * weight_channels) * sg.c;
#pragma unroll
    for (int b = 0; b < PRODUCTS; ++b)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int column = task.column_of(b) + band.row + half * 8;
            if (!task.has(b, width) || column >= width) continue;
            const T* from = slopes + (task.row + task.row_of(b)) * sg.h + column * sg.w;
            const T zero = {};
            pixels[b][half] = pair(g < group ? *from : zero,
                                   g + 1 < group ? from[weight_channels * sg.c] : zero);
        }
    stage_planes<REFLECT, K / 2>(vector, x + task.n * sx.n + task.weight_channel * sx.c,
                                 weight_channels * sx.c, sx, window, group, task.top - K / 2, lines,
                                 staged);
    if (!task.active) return;
    const int count = together > 1 ? task.rows * width : min(SEGMENT, width - task.begin);
    const Vectors<T, K, V, WEIGHT_PITCH> vectors(task.lane, count, plane);
    T* taps = staged.data + CHANNELS * plane_pitch + task.warp * (K * WEIGHT_PITCH);
    T* to = grad_w +
            (static_cast<long long>(task.n) * weight_channels + task.weight_channel) * K * K * plane +
            task.row * width + task.begin;
    const int own = task.matrix_row(plane_pitch) + (task.row - task.top) * pitch;
    unsigned columns[PRODUCTS];  // addresses of this lane's row of the matrices
    int own_taps[PRODUCTS];      // of this lane's upper pixels
    unsigned kept = 0;           // a bit for each of its pixels that exists
#pragma unroll
    for (int b = 0; b < PRODUCTS; ++b) {
        const int p = task.or_first(b, width);
        columns[b] = shared_address(staged.data + own + task.row_of(p) * pitch + task.column_of(p));
        own_taps[b] = task.row_of(p) * width + task.column_of(p) - task.begin + band.row;
        const int left = task.has(b, width) ? width - task.column_of(b) - band.row : 0;
        kept |= (left > 0) << 2 * b | (left > 8) << (2 * b + 1);
    }
#pragma unroll 1
    for (int ky = 0; ky < K; ++ky) {
#pragma unroll
        for (int b = 0; b < PRODUCTS; ++b) {
            unsigned matrices[4];  // transposed, pairs of channels being neighbours
            load_matrices<true>(columns[b], matrices);
            columns[b] += pitch * sizeof(T);
            float products[3][4] = {};
#pragma unroll
            for (int m = 0; m < 3; ++m)
                Mma<T>::k8(products[m], pixels[b][0], pixels[b][1], matrices[m]);
#pragma unroll
            for (int p = 0; p < 2; ++p) {
                T* tap = taps + own_taps[b] + band.diagonal[p] * WEIGHT_PITCH;
                if (band.inside[p] && kept >> 2 * b & 1)
                    tap[0] = narrow<T>(band.block[p] ? products[1][p] : products[0][p]);
                if (band.inside[p] && kept >> (2 * b + 1) & 1)
                    tap[8] = narrow<T>(band.block[p] ? products[2][2 + p] : products[1][2 + p]);
            }
        }
        __syncwarp();
        vectors.visit([&](int there, int here) {
            *reinterpret_cast<Vector<T, V>*>(to + there) =
                *reinterpret_cast<const Vector<T, V>*>(taps + here);
        });
        __syncwarp();
        to += K * plane;
    }
}

// A warp sums up 64 columns of one padded row, from column begin - K / 2 on; the reflected columns
// are added at the end. The row of windows whose tap row ky lies on position y is y + K / 2 - ky.
template <typename T, bool REFLECT, int K, int V>
__global__ void __launch_bounds__(256, 3)
    aggregation_input_gradient_mma(const T* grad, Strides sg, const T* w, T* grad_x, Strides sx,
                                   Window window, int weight_channels, int group, int tiles,
                                   int rows, int together, int vector, int pitch,
                                   int plane_pitch) {
    constexpr int R = K / 2;
    constexpr int SHIFT = GRADIENT_MARGIN - 2 * R;
    extern __shared__ double shared[];
    const Staged<T> staged = {reinterpret_cast<T*>(shared), GRADIENT_MARGIN, pitch, plane_pitch};
    const int width = window.width, height = window.height, plane = height * width;
    const int lines = rows + K - 1, padded = width + 2 * R;
    const int segments = (padded + SEGMENT - 1) / SEGMENT;
    const Task task(weight_channels, tiles, rows, height, padded, 1);
    T* rings = staged.data + CHANNELS * plane_pitch;
    T* ring = rings + task.warp * (STAGES * K * GRADIENT_PITCH);
    for (int i = task.lane; i < STAGES * K * GRADIENT_PITCH / 8; i += 32)
        reinterpret_cast<Vector<T, 8>*>(ring)[i] = {};
    __syncwarp();
    // The segment reads the weights of columns begin - 2 * R to begin - 2 * R + 71 that exist.
    const int first = max(0, (task.begin - 2 * R) / V * V);
    const int last = min(width, task.begin - 2 * R + SEGMENT + 8);
    const T* weights =
        w + (static_cast<long long>(task.n) * weight_channels + task.weight_channel) * K * K * plane +
        first;
    T* to_ring = ring + first - (task.begin - 2 * R) + SHIFT;
    int which = 0, ky = -1, position = task.row;
    bool more = task.active;
    const Vectors<T, K, V, GRADIENT_PITCH> vectors(task.lane, (last - first + V - 1) / V * V, plane);
    // Starts copying the next row of windows that has a tap on this row; returns it, or -1.
    const auto fetch_next = [&](int slot) {
        int row = -1;
        while (more && row < 0) {
            if (++ky == K) {
                ky = 0;
                do ++which;
                while (which < IMAGES<REFLECT> &&
                       !image<REFLECT>(task.row, height, R, which, position));
                more = which < IMAGES<REFLECT>;
            }
            row = position + R - ky;
            if (!more || row >= height) row = -1;
        }
        if (row >= 0) {
            const T* from = weights + (ky * K * plane + row * width);
            vectors.visit([&](int there, int here) {
                copy_async<V>(to_ring + slot * K * GRADIENT_PITCH + here, from + there);
            });
        }
        end_group();
        return row;
    };
    int queue[STAGES];
#pragma unroll
    for (int slot = 0; slot < STAGES - 1; ++slot) queue[slot] = fetch_next(slot);
    stage_planes<false, 0>(vector, grad + task.n * sg.n + task.weight_channel * sg.c,
                           weight_channels * sg.c, sg, window, group, task.top - R, lines, staged);
    const Band<K, SHIFT> band(task.lane);
    const unsigned line = shared_address(staged.data + task.matrix_row(plane_pitch) + task.begin +
                                         (R - task.top) * pitch);
    // Diagonal d of the transposed band holds tap K - 1 - d, of column row + d.
    const T* taps = ring + SHIFT + band.row;
    const T* low = taps + (K - 1 - band.diagonal[0]) * GRADIENT_PITCH + band.diagonal[0];
    const T* high = taps + (K - 1 - band.diagonal[1]) * GRADIENT_PITCH + band.diagonal[1];
    float sums[PRODUCTS][4] = {};
    for (bool working = true; working;) {
#pragma unroll
        for (int slot = 0; slot < STAGES; ++slot) {
            const int next = (slot + STAGES - 1) % STAGES;
            if (queue[slot] < 0) {
                working = false;
                break;
            }
            queue[next] = fetch_next(next);
            wait_for_groups<STAGES - 1>();
            __syncwarp();
            const unsigned columns = line + queue[slot] * pitch * static_cast<int>(sizeof(T));
#pragma unroll
            for (int b = 0; b < PRODUCTS; ++b) {
                const int at = slot * K * GRADIENT_PITCH + b * PIXELS;
                unsigned matrices[4];
                load_matrices<false>(columns + b * PIXELS * sizeof(T), matrices);
                band.template multiply<T>(sums[b], pair(low[at], high[at]),
                                          pair(low[at + 8], high[at + 8]), matrices);
            }
            __syncwarp();
        }
    }
    wait_for_groups<0>();
    __syncthreads();  // from here on, the rings hold the sums, 8 channels of each row
    const int pitch_joined = segments * SEGMENT + 4;
    float* joined =
        reinterpret_cast<float*>(rings) + (task.row - task.top) * CHANNELS * pitch_joined;
    if (task.active)
#pragma unroll
        for (int b = 0; b < PRODUCTS; ++b)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                joined[(task.lane % 4 * 2 + i % 2) * pitch_joined + task.begin + b * PIXELS +
                       band.row + i / 2 * 8] = sums[b][i];
    __syncthreads();
    if (!task.active) return;
    T* to = grad_x + task.n * sx.n + task.weight_channel * sx.c + task.row * sx.h;
    for (int column = task.begin + task.lane; column < min(width, task.begin + SEGMENT); column += 32) {
        int shown[IMAGES<REFLECT>];
        bool there[IMAGES<REFLECT>];
#pragma unroll
        for (int k = 0; k < IMAGES<REFLECT>; ++k)
            there[k] = image<REFLECT>(column, width, R, k, shown[k]);
#pragma unroll
        for (int g = 0; g < CHANNELS; ++g) {
            if (g >= group) break;
            float sum = 0;
#pragma unroll
            for (int k = 0; k < IMAGES<REFLECT>; ++k)
                if (there[k]) sum += joined[g * pitch_joined + shown[k] + R];
            to[g * weight_channels * sx.c + column * sx.w] = narrow<T>(sum);
        }
    }
}
