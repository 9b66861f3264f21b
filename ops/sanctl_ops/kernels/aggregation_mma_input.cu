// The gradient of aggregation's input for 16-bit values, windows of stride 1 and padding K / 2,
// contiguous weights and at most 8 channels to a weight: see banded_mma.cuh.
//
// A warp sums up rows of the padded plane; what lies on padding is added to the pixels that it reflects
// in the end, by the block that has both, so a tile at the border has more than K rows. The window whose tap (ky, kx) lies on position (y, x) is (y + K / 2 - ky, x + K / 2 - kx): a block takes
// one row of taps after the other, of all windows that reach its tile; they pass through shared memory,
// copied ahead of use. Weights of windows that do not exist meet zeros: `staged` has zeros beside the
// plane, and its last line is zero.
#include "banded_mma.cuh"
#include "window_gradient.cuh"

constexpr int MARGIN = 8;  // columns staged before the first pixel, and free before the weights
constexpr int STAGES = 3;  // rows of taps under way or in use
constexpr int BEYOND = 72; // elements after a slot: what products beyond the last row read
constexpr int JOINED = 4;  // where a line of sums has its first pixel

// Threads of a block, at most, and blocks of a multiprocessor, at least.
template <int TOGETHER>
constexpr int THREADS = TOGETHER == 4 ? 160 : TOGETHER == 2 ? 576 : 512;
template <int TOGETHER>
constexpr int BLOCKS = TOGETHER == 4 ? 5 : 2;

// Products of one of the padded rows that a warp takes at once.
template <int TOGETHER>
constexpr int PER_ROW = TOGETHER == 1 ? PRODUCTS : TOGETHER == 2 ? 3 : 2;

// The weights that pass by: those of tap kx of rows `first(ky)` to `end(ky)` of windows in one piece.
template <int K, int V, typename T>
struct Weights {
    T* slots;  // STAGES slots, of K pieces `pitch` elements apart
    int pitch;
    const T* from;
    int height, width, top, bottom;  // of the padded rows that the block sums up, the last one excluded

    __device__ int first(int ky) const { return max(top + K / 2 - ky, 0); }

    __device__ int end(int ky) const { return min(bottom + K / 2 - ky, height); }

    __device__ T* slot(int ky) const { return slots + ky % STAGES * (K * pitch + BEYOND); }

    // Starts the block's copies.
    __device__ void fetch(int ky) const {
        const int begin = first(ky) * width, count = (end(ky) - first(ky)) * width;
        const int plane = height * width;
        for (int i = threadIdx.x * V; i < count; i += blockDim.x * V) {
            const T* weight = from + ky * K * plane + begin + i;
            unsigned to = shared_address(slot(ky) + MARGIN + i);
#pragma unroll
            for (int kx = 0; kx < K; ++kx, weight += plane, to += pitch * sizeof(T))
                copy_async<V>(to, weight);
        }
    }

    __device__ void clear(int elements) const {
        for (int i = threadIdx.x; i < elements / 8; i += blockDim.x)
            reinterpret_cast<Vector<T, 8>*>(slots)[i] = {};
    }
};

// Writes O pixels of a line of sums.
template <int O, typename T>
__device__ inline void write_pixels(const float* line, T* to, long long stride) {
    constexpr int AT_ONCE = O < 4 ? O : 4;
    float sums[O];
#pragma unroll
    for (int e = 0; e < O; e += AT_ONCE)
        *reinterpret_cast<Vector<float, AT_ONCE>*>(sums + e) =
            *reinterpret_cast<const Vector<float, AT_ONCE>*>(line + e);
    store_row<O>(to, stride, sums);
}

template <typename T, bool REFLECT, int K, int V, int TOGETHER>
__global__ void __launch_bounds__(THREADS<TOGETHER>, BLOCKS<TOGETHER>)
    aggregation_input_gradient_mma(const T* grad, Strides sg, const T* w, T* grad_x, Strides sx,
                                   Window window, Deal deal, Divisor segments, Divisor written,
                                   int grad_vector, int out_vector, int tap_pitch,
                                   int ring_elements) {
    constexpr int R = K / 2, SHIFT = MARGIN - 2 * R, WIDE = PER_ROW<TOGETHER>;
    extern __shared__ double shared[];
    const Staged<T, MARGIN> staged(shared, deal);
    const int width = window.width, height = window.height, lines = deal.rows + K - 1;
    const Task task(deal, segments, height, TOGETHER);
    // The first tiles have deal.rows padded rows, the others one less. `top` to `bottom` are those of this
    // block, `row` is the first one of the warp.
    const int longer = height + 2 * R - static_cast<int>(deal.tiles.divisor) * (deal.rows - 1);
    const int top = task.tile * deal.rows - max(task.tile - longer, 0) - R;
    const int bottom = top + deal.rows - (task.tile >= longer);
    const int row = top + task.row - task.top;
    staged.template copy<false>(grad_vector, grad + task.n * sg.n + task.weight_channel * sg.c,
                                deal.weight_channels.divisor * sg.c, sg, window, deal, top - R,
                                lines);
    // The zero line is one that no window of this plane lies on.
    for (int i = threadIdx.x; i < CHANNELS * staged.pitch; i += blockDim.x)
        staged.data[i % CHANNELS * staged.plane_pitch + lines * staged.pitch + i / CHANNELS] = {};
    const long long images_before = task.n * deal.weight_channels.divisor + task.weight_channel;
    const Weights<K, V, T> weights = {
        staged.end(), tap_pitch, w + images_before * K * K * height * width, height, width, top,
        bottom};
    // What lies between the pieces meets zeros, too, and must be finite.
    weights.clear(ring_elements);
    __syncthreads();
#pragma unroll
    for (int ky = 0; ky < STAGES - 1; ++ky) {
        weights.fetch(ky);
        end_group();
    }
    const Band<K, SHIFT> band(task.lane);
    unsigned data = shared_address(matrix_row(staged, task.lane, 0) + task.begin);
    // Diagonal d of the transposed band holds tap K - 1 - d, of column row + d.
    const int at = MARGIN - 2 * R + task.begin + band.row;
    int low = (K - 1 - band.diagonal[0]) * tap_pitch + band.diagonal[0] + at;
    int high = (K - 1 - band.diagonal[1]) * tap_pitch + band.diagonal[1] + at;
    forget_origin(data);
    forget_origin(low);
    forget_origin(high);
    float sums[TOGETHER * WIDE][4] = {};
#pragma unroll 1
    for (int ky = 0; ky < K; ++ky) {
        wait_for_groups<STAGES - 2>();
        __syncthreads();
        if (ky + STAGES - 1 < K) weights.fetch(ky + STAGES - 1);
        end_group();
        const int window_row = row + R - ky;  // the one above the first of the warp's rows
        if (row >= bottom || window_row + TOGETHER <= 0 || window_row >= height) continue;
        const T* slot = weights.slot(ky);
        const T* taps = slot + (window_row - weights.first(ky)) * width;
        const unsigned line = data + (window_row - top + R) * staged.pitch *
                                         static_cast<int>(sizeof(T));
        const unsigned zeros = data + lines * staged.pitch * static_cast<int>(sizeof(T));
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            const bool exists =
                row + i < bottom && static_cast<unsigned>(window_row + i) < height;
            const unsigned columns_at =
                exists ? line + i * staged.pitch * static_cast<int>(sizeof(T)) : zeros;
            const T* weight = exists ? taps + i * width : slot;
#pragma unroll
            for (int b = 0; b < WIDE; ++b) {
                unsigned columns[4];
                load_matrices<false>(columns_at + b * PIXELS * sizeof(T), columns);
                band.template multiply<T>(sums[i * WIDE + b], weight + low + b * PIXELS,
                                          weight + high + b * PIXELS, columns);
            }
        }
    }
    __syncthreads();  // from here on, sums take the place of everything, 8 channels of each row
    const int pitch = (TOGETHER > 1 ? WIDE * PIXELS : static_cast<int>(segments.divisor) * SEGMENT) + 4;
    float* joined = reinterpret_cast<float*>(staged.data) + JOINED;
    float* own = joined + (row - top) * CHANNELS * pitch;
#pragma unroll
    for (int p = 0; p < TOGETHER * WIDE; ++p)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            own[(p / WIDE * CHANNELS + task.lane % 4 * 2 + i % 2) * pitch - R + task.begin +
                p % WIDE * PIXELS + band.row + i / 2 * 8] = sums[p][i];
    __syncthreads();
    const int first = max(top, 0), rows = min(bottom, height) - first;
    float* pixels = joined + (first - top) * CHANNELS * pitch;
    if (REFLECT) {
        for (int i = threadIdx.x; i < (bottom - top) * CHANNELS; i += blockDim.x)
            add_reflections<R>(joined + i * pitch, 1, width, true, true);
        __syncthreads();
        // The same for all columns of a line, from one row of the tile to another.
        for (int i = threadIdx.x; i < CHANNELS * pitch; i += blockDim.x)
            add_reflections<R>(pixels + i - JOINED, CHANNELS * pitch, rows, top < 0,
                               bottom > height);
        __syncthreads();
    }
    T* to = grad_x + task.n * sx.n + task.weight_channel * sx.c + first * sx.h;
    for (int i = threadIdx.x; i < rows * CHANNELS * static_cast<int>(written.divisor);
         i += blockDim.x) {
        unsigned line = i;
        const int part = written.divide(line), g = line % CHANNELS;
        if (g >= deal.group) continue;
        with_vector<8>(out_vector, [&](auto vector) {
            constexpr int O = decltype(vector)::value;
            write_pixels<O>(pixels + line * pitch + part * O,
                            to + g * deal.weight_channels.divisor * sx.c + line / CHANNELS * sx.h +
                                part * O * sx.w,
                            sx.w);
        });
    }
}
