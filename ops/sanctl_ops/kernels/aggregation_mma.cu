// aggregation and the gradient of its weights for 16-bit values, windows of stride 1 and padding
// K / 2, contiguous weights and at most 8 channels to a weight: see banded_mma.cuh.
//
// A warp goes through its rows tap row by tap row. Its weights, which lie in one piece, pass through
// shared memory of its own, copied ahead of use.
#include "banded_mma.cuh"

constexpr int MARGIN = 4;         // columns staged before the first pixel
constexpr int WEIGHT_PITCH = 72;  // 36 words: the diagonals of a band lie in different banks

// Threads of a block, at most, and blocks of a multiprocessor, at least.
template <int TOGETHER>
constexpr int THREADS = TOGETHER == 4 ? 128 : 256;
template <int TOGETHER>
constexpr int BLOCKS = TOGETHER == 4 ? 6 : 4;

// Where the weights of a warp pass through: K pieces, of a row of taps each, in every slot. Row ky is
// in slot ky % SLOTS: so chosen that two rows ahead, of the next rows of pixels too, are not in the way.
template <int K>
struct Ring {
    static constexpr int AHEAD = 2;
    static constexpr int SLOTS = K == 7 ? 4 : K;
    static constexpr int SLOT = K * WEIGHT_PITCH;
    // Between two rows of pixels all slots but the first AHEAD are free for sums.
    static constexpr int SUMS = AHEAD * SLOT;
    static constexpr int LEAST = SUMS + CHANNELS * WEIGHT_PITCH;
    static constexpr int ELEMENTS = SLOTS * SLOT > LEAST ? SLOTS * SLOT : LEAST;
};

// Adds up to the sums of a warp's products what one row of taps contributes. `line` is the address of
// this lane's row of the matrices, `low` and `high` its two weights, of the warp's first row.
template <typename T, int TOGETHER, typename B>
__device__ inline void multiply_rows(const B& band, unsigned line, int pitch, const T* low,
                                     const T* high, int width, float (&sums)[PRODUCTS][4]) {
    constexpr int PER_ROW = PRODUCTS / TOGETHER;
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i, line += pitch * sizeof(T), low += width, high += width)
#pragma unroll
        for (int b = 0; b < PER_ROW; ++b) {
            unsigned columns[4];
            load_matrices<false>(line + b * PIXELS * sizeof(T), columns);
            band.template multiply<T>(sums[i * PER_ROW + b], low + b * PIXELS, high + b * PIXELS,
                                      columns);
        }
}

// Writes the pixels of a warp's rows: `count` of each channel, which lie in one piece.
template <int O, typename T>
__device__ inline void write_pixels(const T* from, int lane, int count, int group, T* to,
                                    long long channel, long long stride) {
    constexpr int VECTORS = SEGMENT / O;  // of a channel
#pragma unroll 1
    for (int k = 0; k < CHANNELS * VECTORS; k += 32) {
        const int g = (lane + k) / VECTORS, i = (lane + k) % VECTORS * O;
        if (g < group && i < count)
            *reinterpret_cast<Vector<T, O>*>(to + g * channel + i * stride) =
                *reinterpret_cast<const Vector<T, O>*>(from + g * WEIGHT_PITCH + i);
    }
}

// The warps of a block take `step` rows at once. `out` is dense, contiguous or channels_last.
template <typename T, bool REFLECT, int K, int V, int TOGETHER>
__global__ void __launch_bounds__(THREADS<TOGETHER>, BLOCKS<TOGETHER>)
    aggregation_mma(const T* x, Strides sx, const T* w, T* out, Strides so, Window window, Deal deal,
                    Divisor segments, int step, int x_vector, int out_vector) {
    using R = Ring<K>;
    extern __shared__ double shared[];
    const Staged<T, MARGIN> staged(shared, deal);
    const int width = window.width, plane = window.height * width;
    const int lines = deal.rows + K - 1;
    Task task(deal, segments, window.height, TOGETHER);
    staged.template copy<REFLECT>(x_vector, x + task.n * sx.n + task.weight_channel * sx.c,
                                  deal.weight_channels.divisor * sx.c, sx, window, deal,
                                  task.top - K / 2, lines);
    end_group();
    T* ring = staged.end() + task.warp * R::ELEMENTS;
    Vectors<K, V, WEIGHT_PITCH> vectors(task.lane, deal.vectors, plane);
    // Pixels of the warp's rows from `row` on.
    const auto pixels_of = [&](int row) {
        const int rows = max(min(TOGETHER, task.bottom - row), 0);
        return TOGETHER > 1 ? rows * width : rows * min(SEGMENT, width - task.begin);
    };
    const long long images_before = task.n * deal.weight_channels.divisor + task.weight_channel;
    const T* weights = w + images_before * K * K * plane + task.row * width + task.begin;
    vectors.choose(pixels_of(task.row));
    const unsigned to_ring = shared_address(ring);
    const auto fetch = [&](int ky) {
        vectors.visit([&](int there, int here) {
            const int slot = ky % R::SLOTS * R::SLOT;
            copy_async<V>(to_ring + (slot + here) * static_cast<int>(sizeof(T)), weights + there);
        });
        weights += K * plane;
        forget_origin(weights);
        end_group();
    };
#pragma unroll
    for (int ky = 0; ky < R::AHEAD; ++ky) fetch(ky);
    wait_for_groups<R::AHEAD>();
    staged.template finish<REFLECT, K / 2>(lines, width);
    const Band<K, MARGIN - K / 2> band(task.lane);
    const T* low = ring + band.row + band.diagonal[0] * WEIGHT_PITCH;
    const T* high = ring + band.row + band.diagonal[1] * WEIGHT_PITCH;
#pragma unroll 1
    for (; task.row < task.bottom; task.row += step) {
        unsigned line =
            shared_address(matrix_row(staged, task.lane, task.row - task.top) + task.begin);
        float sums[PRODUCTS][4] = {};
#pragma unroll
        for (int ky = 0; ky < K; ++ky, line += staged.pitch * sizeof(T)) {
            if (ky + R::AHEAD == K) {
                vectors.choose(pixels_of(task.row + step));
                weights += step * width - K * K * plane;
            }
            wait_for_groups<R::AHEAD - 1>();
            __syncwarp();
            fetch((ky + R::AHEAD) % K);
            const int slot = ky % R::SLOTS * R::SLOT;
            multiply_rows<T, TOGETHER>(band, line, staged.pitch, low + slot, high + slot, width, sums);
        }
        __syncwarp();
        // The lane holds two pixels, 8 columns apart, of two channels.
        constexpr int PER_ROW = PRODUCTS / TOGETHER;
        T* to = ring + R::SUMS + task.lane % 4 * 2 * WEIGHT_PITCH + band.row;
#pragma unroll
        for (int b = 0; b < PRODUCTS; ++b) {
            // What lies beyond a row is put right by the next one.
            if (b > 0 && b % PER_ROW == 0) __syncwarp();
            const int at = b / PER_ROW * width + b % PER_ROW * PIXELS;
#pragma unroll
            for (int half = 0; half < 2; ++half)
                write_pair(to + at + half * 8, to + at + half * 8 + WEIGHT_PITCH,
                           sums[b][half * 2], sums[b][half * 2 + 1]);
        }
        __syncwarp();
        T* pixels = out + task.n * so.n + task.weight_channel * so.c +
                    (task.row * width + task.begin) * so.w;
        with_vector<8>(out_vector, [&](auto vector) {
            write_pixels<decltype(vector)::value>(ring + R::SUMS, task.lane, pixels_of(task.row),
                                                  deal.group, pixels,
                                                  deal.weight_channels.divisor * so.c, so.w);
        });
    }
}

// Pixels of a warp's rows, row i from column i * (SEGMENT / TOGETHER) on.
template <typename T, int TOGETHER>
struct Slopes {
    static constexpr int ELEMENTS = CHANNELS * WEIGHT_PITCH;
    T* data;

    // Starts copying `rows` rows of up to `columns` pixels, C at a time; other channels are zero.
    template <int C>
    __device__ void copy(int lane, const T* from, const Strides& strides, long long channel,
                         int group, int rows, int columns) const {
        constexpr int COLUMNS = SEGMENT / TOGETHER, VECTORS = SEGMENT / C;
#pragma unroll
        for (int k = 0; k < (VECTORS + 31) / 32; ++k) {
            const int i = (lane + k * 32) * C, row = i / COLUMNS, column = i % COLUMNS;
            if (lane + k * 32 >= VECTORS || row >= rows || column >= columns) continue;
            const T* pixel = from + row * strides.h + column * strides.w;
#pragma unroll
            for (int g = 0; g < CHANNELS; ++g, pixel += channel)
                copy_or_clear<C>(data + g * WEIGHT_PITCH + i, pixel, g < group);
        }
    }

    // Two pixels of each product, 8 columns apart, of two channels.
    __device__ void load(int lane, unsigned (&pixels)[PRODUCTS][2]) const {
        const unsigned row = shared_address(data + lane % 8 * WEIGHT_PITCH + lane / 8 * 8);
#pragma unroll
        for (int b = 0; b < PRODUCTS; b += 2) {
            unsigned matrices[4];
            load_matrices<true>(row + b * PIXELS * sizeof(T), matrices);
#pragma unroll
            for (int i = 0; i < 4; ++i) pixels[b + i / 2][i % 2] = matrices[i];
        }
    }
};

template <typename T, bool REFLECT, int K, int V, int TOGETHER>
__global__ void __launch_bounds__(THREADS<TOGETHER>, BLOCKS<TOGETHER>)
    aggregation_weight_gradient_mma(const T* grad, Strides sg, const T* x, Strides sx, T* grad_w,
                                    Window window, Deal deal, Divisor segments, int step,
                                    int x_vector, int grad_vector) {
    constexpr int PER_ROW = PRODUCTS / TOGETHER;
    constexpr int TAPS = K * WEIGHT_PITCH;
    extern __shared__ double shared[];
    const Staged<T, MARGIN> staged(shared, deal);
    const int width = window.width, plane = window.height * width;
    const int lines = deal.rows + K - 1;
    Task task(deal, segments, window.height, TOGETHER);
    staged.template copy<REFLECT>(x_vector, x + task.n * sx.n + task.weight_channel * sx.c,
                                  deal.weight_channels.divisor * sx.c, sx, window, deal,
                                  task.top - K / 2, lines);
    end_group();
    // The warp's memory: the slopes of its rows, and two rows of taps in turn.
    const Slopes<T, TOGETHER> slopes = {
        staged.end() + task.warp * (Slopes<T, TOGETHER>::ELEMENTS + 2 * TAPS)};
    T* taps = slopes.data + slopes.ELEMENTS;
    const auto fetch_slopes = [&](int row) {
        with_vector<8>(grad_vector, [&](auto vector) {
            slopes.template copy<decltype(vector)::value>(
                task.lane,
                grad + task.n * sg.n + task.weight_channel * sg.c + row * sg.h + task.begin * sg.w, sg,
                deal.weight_channels.divisor * sg.c, deal.group, task.bottom - row,
                width - task.begin);
        });
        end_group();
    };
    fetch_slopes(task.row);
    wait_for_groups<1>();
    staged.template finish<REFLECT, K / 2>(lines, width);
    const Band<K, MARGIN - K / 2> band(task.lane);
    Vectors<K, V, WEIGHT_PITCH> vectors(task.lane, deal.vectors, plane);
    const long long images_before = task.n * deal.weight_channels.divisor + task.weight_channel;
    unsigned own_tap[2];  // of the two elements that this lane holds of a product's first half, in bytes
#pragma unroll
    for (int p = 0; p < 2; ++p)
        own_tap[p] = (band.diagonal[p] * WEIGHT_PITCH + band.row) * sizeof(T);
#pragma unroll 1
    for (; task.row < task.bottom; task.row += step) {
        unsigned pixels[PRODUCTS][2];
        wait_for_groups<0>();
        __syncwarp();
        slopes.load(task.lane, pixels);
        __syncwarp();
        fetch_slopes(task.row + step);
        const int rows = min(TOGETHER, task.bottom - task.row);
        vectors.choose(TOGETHER > 1 ? rows * width : min(SEGMENT, width - task.begin));
        T* to = grad_w + images_before * K * K * plane + task.row * width + task.begin;
        unsigned line =
            shared_address(matrix_row(staged, task.lane, task.row - task.top) + task.begin);
#pragma unroll 1
        for (int ky = 0; ky < K; ++ky, line += staged.pitch * sizeof(T), to += K * plane) {
            const T* taps_of_row = taps + ky % 2 * TAPS;
            const unsigned row_of_taps = shared_address(taps_of_row);
#pragma unroll
            for (int b = 0; b < PRODUCTS; ++b) {
                unsigned columns[4];  // transposed, pairs of channels being neighbours
                load_matrices<true>(line + (b / PER_ROW * staged.pitch + b % PER_ROW * PIXELS) *
                                               static_cast<int>(sizeof(T)),
                                    columns);
                float products[3][4] = {};
#pragma unroll
                for (int m = 0; m < 3; ++m)
                    Mma<T>::k8(products[m], pixels[b][0], pixels[b][1], columns[m]);
                const unsigned first =
                    row_of_taps + (b / PER_ROW * width + b % PER_ROW * PIXELS) * sizeof(T);
                float halves[2][2];
#pragma unroll
                for (int p = 0; p < 2; ++p) {
                    halves[0][p] = band.block[p] ? products[1][p] : products[0][p];
                    halves[1][p] = band.block[p] ? products[2][2 + p] : products[1][2 + p];
                }
                // What lies beyond a row is put right by the next one.
                if (b > 0 && b % PER_ROW == 0) __syncwarp();
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    store_pair(first + own_tap[0] + half * 8 * sizeof(T),
                               first + own_tap[1] + half * 8 * sizeof(T),
                               pack<T>(halves[half][0], halves[half][1]), band.inside[0],
                               band.inside[1]);
            }
            __syncwarp();
            vectors.visit([&](int there, int here) {
                *reinterpret_cast<Vector<T, V>*>(to + there) =
                    *reinterpret_cast<const Vector<T, V>*>(taps_of_row + here);
            });
        }
    }
}
