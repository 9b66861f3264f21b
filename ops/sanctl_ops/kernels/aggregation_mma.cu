// aggregation and its gradients for 16-bit values, windows of stride 1 and padding K / 2, contiguous
// weights and at most 8 channels to a weight: see banded_mma.cuh.
//
// Blocks run over (image, weight channel, tile of rows). A warp takes 64 pixels of one row, or whole
// rows of up to 32 or 16 pixels, tap row by tap row; its weights, which lie in one piece, pass through
// shared memory of its own, copied ahead of use.
#include "banded_mma.cuh"

constexpr int STAGES = 3;           // rows of taps under way or in use
constexpr int WEIGHT_PITCH = 72;    // 36 words: the diagonals of a band lie in different banks
// A lane's share of a row of taps of a warp's pixels, of which there are at most 64.
template <int V>
constexpr int VECTORS_OF_LANE = V == 8 ? 2 : 4;
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
// shared memory, dealt out to a warp: at most MOST to a lane.
template <int K, int V, int PITCH, int MOST>
struct Vectors {
    bool mine[MOST];
    int column[MOST], there[MOST], here[MOST];

    __device__ Vectors(unsigned lane, int count, int plane) {
        const unsigned vectors = count / V;
#pragma unroll
        for (int k = 0; k < MOST; ++k) {
            const unsigned i = lane + k * 32, row = i / max(vectors, 1u);
            mine[k] = i < K * vectors;
            column[k] = (i - row * vectors) * V;
            there[k] = row * plane + column[k];
            here[k] = row * PITCH + column[k];
        }
    }

    // Hands the places of this lane's vectors to visit(column, in global, in shared memory).
    template <typename Visit>
    __device__ void visit(Visit visit) const {
#pragma unroll
        for (int k = 0; k < MOST; ++k)
            if (mine[k]) visit(column[k], there[k], here[k]);
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
    const Vectors<K, V, WEIGHT_PITCH, VECTORS_OF_LANE<V>> vectors(task.lane, task.active ? count : 0, plane);
    T* ring = staged.data + CHANNELS * plane_pitch + task.warp * (STAGES * K * WEIGHT_PITCH);
    const T* weights =
        w + (static_cast<long long>(task.n) * weight_channels + task.weight_channel) * K * K * plane +
        task.row * width + task.begin;
    const auto fetch = [&](int ky) {
        if (ky < K)
            vectors.visit([&](int, int there, int here) {
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
    const Vectors<K, V, WEIGHT_PITCH, VECTORS_OF_LANE<V>> vectors(task.lane, count, plane);
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
        vectors.visit([&](int, int there, int here) {
            *reinterpret_cast<Vector<T, V>*>(to + there) =
                *reinterpret_cast<const Vector<T, V>*>(taps + here);
        });
        __syncwarp();
        to += K * plane;
    }
}

// How a warp takes the padded rows of the input's gradient: 64 columns of one row, or ROWS short ones.
template <int K, int V, int ROWS>
struct Share {
    static constexpr int PER_ROW = ROWS == 1 ? PRODUCTS : ROWS == 2 ? 3 : 2;
    static constexpr int COLUMNS = PER_ROW * PIXELS;
    // Weights of one tap: of several rows at most 64, of one also those around, as whole vectors.
    static constexpr int MOST = ROWS == 1 ? SEGMENT + 16 : SEGMENT;
    static constexpr int PITCH = ROWS == 1 ? 88 : 136;
    static constexpr int VECTORS = (K * (MOST / V) + 31) / 32;
};

// A warp sums up padded columns, from column begin - K / 2 on; the reflected columns are added at the
// end. The row of windows whose tap row ky lies on position y is y + K / 2 - ky. Weights of windows
// that do not exist meet zeros: `staged` has zeros around the plane, and its last line is zero.
template <typename T, bool REFLECT, int K, int V, int ROWS>
__global__ void __launch_bounds__(256, ROWS == 1 ? 3 : 2)
    aggregation_input_gradient_mma(const T* grad, Strides sg, const T* w, T* grad_x, Strides sx,
                                   Window window, int weight_channels, int group, int tiles,
                                   int rows, int vector, int pitch, int plane_pitch) {
    using S = Share<K, V, ROWS>;
    constexpr int R = K / 2, SHIFT = GRADIENT_MARGIN - 2 * R;
    extern __shared__ double shared[];
    const Staged<T> staged = {reinterpret_cast<T*>(shared), GRADIENT_MARGIN, pitch, plane_pitch};
    const int width = window.width, height = window.height, plane = height * width;
    const int lines = rows + K - 1, padded = width + 2 * R;
    const int segments = ROWS > 1 ? 1 : (padded + SEGMENT - 1) / SEGMENT;
    const Task task(weight_channels, tiles, rows, height, segments * SEGMENT, ROWS);
    T* rings = staged.data + CHANNELS * plane_pitch;
    T* ring = rings + task.warp * (STAGES * K * S::PITCH);
    for (int i = task.lane; i < STAGES * K * S::PITCH / 8; i += 32)
        reinterpret_cast<Vector<T, 8>*>(ring)[i] = {};
    __syncwarp();
    // Of the columns begin - 2 * R to begin - 2 * R + 71 of one row, those that exist, or all rows.
    const int first = ROWS > 1 ? 0 : max(0, (task.begin - 2 * R) / V * V);
    const int last = min(width, task.begin - 2 * R + SEGMENT + 8);
    const int count = ROWS > 1 ? ROWS * width : (last - first + V - 1) / V * V;
    const T* weights =
        w + (static_cast<long long>(task.n) * weight_channels + task.weight_channel) * K * K * plane +
        first;
    T* to_ring = ring + first - (task.begin - 2 * R) + SHIFT;
    const Vectors<K, V, S::PITCH, S::VECTORS> vectors(task.lane, count, plane);
    // The steps of the sum: images of the warp's rows, and for each of these the tap rows. The windows
    // of the warp's first row are in row `query`, those of the others above or, reflected, below.
    int which = 0, ky = -1, position = task.row, query = 0;
    bool more = task.active;
    const auto next_image = [&] {
        while (++which < IMAGES<REFLECT>)
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
                int unused;
                if (image<REFLECT>(task.row + i, height, R, which, unused)) return true;
            }
        return false;
    };
    // Starts copying the weights of the next step; returns its image, or -1 after the last.
    const auto fetch_next = [&](int slot) {
        bool found = false;
        while (more && !found) {
            if (++ky == K) {
                ky = 0;
                more = next_image();
                image<REFLECT>(task.row, height, R, which, position);
            }
            query = position + R - ky;
            const int from = query - (which == 0 ? 0 : ROWS - 1);
            found = more && from < height && from + ROWS > 0;
            if (!found) continue;
            const T* source = weights + (ky * K * plane + from * width);
            const int begin = max(-from, 0) * width, end = min(height - from, ROWS) * width;
            vectors.visit([&](int column, int there, int here) {
                if (ROWS == 1 || (column >= begin && column < end))
                    copy_async<V>(to_ring + slot * K * S::PITCH + here, source + there);
            });
        }
        end_group();
        return found ? which : -1;
    };
    int images[STAGES], queries[STAGES];
#pragma unroll
    for (int slot = 0; slot < STAGES - 1; ++slot) {
        images[slot] = fetch_next(slot);
        queries[slot] = query;
    }
    stage_planes<false, 0>(vector, grad + task.n * sg.n + task.weight_channel * sg.c,
                           weight_channels * sg.c, sg, window, group, task.top - R, lines, staged);
    const Band<K, SHIFT> band(task.lane);
    const unsigned data = shared_address(staged.data + task.matrix_row(plane_pitch) + task.begin);
    // Diagonal d of the transposed band holds tap K - 1 - d, of column row + d.
    const T* taps = ring + SHIFT + band.row;
    const T* low = taps + (K - 1 - band.diagonal[0]) * S::PITCH + band.diagonal[0];
    const T* high = taps + (K - 1 - band.diagonal[1]) * S::PITCH + band.diagonal[1];
    float sums[ROWS * S::PER_ROW][4] = {};
    for (bool working = true; working;) {
#pragma unroll
        for (int slot = 0; slot < STAGES; ++slot) {
            const int next = (slot + STAGES - 1) % STAGES;
            if (images[slot] < 0) {
                working = false;
                break;
            }
            images[next] = fetch_next(next);
            queries[next] = query;
            wait_for_groups<STAGES - 1>();
            __syncwarp();
            const bool upwards = images[slot] == 0;
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
                int unused;
                const int row = queries[slot] + (upwards ? i : -i);
                const bool exists = row >= 0 && row < height &&
                                    image<REFLECT>(task.row + i, height, R, images[slot], unused);
                const unsigned line = data + (exists ? row - task.top + R : lines) * pitch *
                                                 static_cast<int>(sizeof(T));
                const int in_ring = slot * K * S::PITCH + (upwards ? i : ROWS - 1 - i) * width;
#pragma unroll
                for (int b = 0; b < S::PER_ROW; ++b) {
                    const int at = in_ring + b * PIXELS;
                    unsigned matrices[4];
                    load_matrices<false>(line + b * PIXELS * sizeof(T), matrices);
                    band.template multiply<T>(sums[i * S::PER_ROW + b], pair(low[at], high[at]),
                                              pair(low[at + 8], high[at + 8]), matrices);
                }
            }
            __syncwarp();
        }
    }
    wait_for_groups<0>();
    __syncthreads();  // from here on, the rings hold the sums, 8 channels of each row
    const int columns = ROWS > 1 ? S::COLUMNS : segments * SEGMENT, pitch_joined = columns + 4;
    float* joined =
        reinterpret_cast<float*>(rings) + (task.row - task.top) * CHANNELS * pitch_joined;
    if (task.active)
#pragma unroll
        for (int p = 0; p < ROWS * S::PER_ROW; ++p)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                joined[(p / S::PER_ROW * CHANNELS + task.lane % 4 * 2 + i % 2) * pitch_joined +
                       task.begin + p % S::PER_ROW * PIXELS + band.row + i / 2 * 8] = sums[p][i];
    __syncthreads();
    for (int i = 0; i < task.rows; ++i) {
        T* to = grad_x + task.n * sx.n + task.weight_channel * sx.c + (task.row + i) * sx.h;
        const float* from = joined + i * CHANNELS * pitch_joined + R;
        const int end = min(width, task.begin + columns);
        for (int column = task.begin + task.lane; column < end; column += 32) {
            const bool reflected = REFLECT && (column <= R || column >= width - 1 - R);
            for (int g = 0; g < group; ++g, from += pitch_joined) {
                float sum = from[column];
                if (reflected)
#pragma unroll
                    for (int k = 1; k < IMAGES<REFLECT>; ++k) {
                        int shown_at;
                        if (image<REFLECT>(column, width, R, k, shown_at)) sum += from[shown_at];
                    }
                to[g * weight_channels * sx.c + column * sx.w] = narrow<T>(sum);
            }
            from -= group * pitch_joined;
        }
    }
}
