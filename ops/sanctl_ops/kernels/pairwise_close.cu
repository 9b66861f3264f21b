// The gradients of query, key and positions, and of the first normalisation: see pairwise_planes.cuh.
#include "pairwise_planes.cuh"

// Sums up the slopes of the positions over the images, (H * W, 2) for queries and for keys: a block
// takes 8 pixels. Slopes have `size` channels, those of the positions from `base` on.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    pairwise_sum_positions(const T* slopes_query, const T* slopes_key, double* of_queries,
                           double* of_keys, int images, int plane, int size, int base) {
    constexpr int PIXELS = 8;
    extern __shared__ double shared[];
    const bool keys = blockIdx.x % 2 == 1;
    const int pixel = blockIdx.x / 2 * PIXELS + threadIdx.x % PIXELS;
    const T* from = (keys ? slopes_key : slopes_query) + pixel * static_cast<long long>(size) + base;
    double sums[2] = {};
    if (pixel < plane)
#pragma unroll 4
        for (int n = threadIdx.x / PIXELS; n < images; n += THREADS / PIXELS)
#pragma unroll
            for (int c = 0; c < 2; ++c) sums[c] += from[n * static_cast<long long>(plane) * size + c];
    sum_of_channel(sums, shared, PIXELS);
    if (static_cast<int>(threadIdx.x) >= PIXELS || pixel >= plane) return;
    double* to = (keys ? of_keys : of_queries) + pixel * 2;
    to[0] = sums[0];
    to[1] = sums[1];
}

// Sums up one channel's slopes of queries, and slopes times what was normalised, in the thread's
// columns; as in close_columns.
template <typename T, typename F>
__device__ inline void sum_columns(const Image<T>& image, const F* slope_query, const F* slope_key,
                                   int channels, float centre, int height, int width,
                                   double (&sums)[2]) {
    const float key0 = widen(*image.plane[1]);
#pragma unroll 1
    for (int x = image.first; x < width; x += image.step)
#pragma unroll 4
        for (int y = 0; y < height; ++y) {
            const int at = (y * width + x) * channels;
            const double slope = slope_query[at];
            const float query = widen(image.row(0, y)[image.column(0, x)]) - key0;
            const float key = widen(image.row(1, y)[image.column(1, x)]) - key0;
            sums[0] += slope;
            sums[1] += (static_cast<double>(query) - centre) * slope +
                       static_cast<double>(key) * slope_key[at];
        }
}

// Slopes are sums over queries and, negative, over keys of the gradient behind the first normalisation.
// Writes for every channel of a part of an image their sum, and that of slopes times what was normalised,
// to `totals`. Slopes are laid out as `pairwise_close` takes them.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    pairwise_close_sums(const T* query, Strides sq, const T* key, Strides sk, const T* position,
                        Strides sp, const float* slopes_query, const float* slopes_key,
                        const double* positions_query, const double* positions_key,
                        const float* mean, double* totals, int images, int relation, int height,
                        int width, int parts, int channels) {
    extern __shared__ double shared[];
    const Image<T> image({{query, key, position}, {sq, sk, sp}}, images, relation, parts);
    const long long before = static_cast<long long>(image.number) * height * width * channels;
    const int channel = image.channel;
    double sums[2] = {};
    if (image.positions)
        sum_columns(image, positions_query + channel, positions_key + channel, 2,
                    mean[relation + channel], height, width, sums);
    else
        sum_columns(image, slopes_query + before + channel, slopes_key + before + channel, channels,
                    mean[channel], height, width, sums);
    sum_of_channel(sums, shared, image.channels);
    if (static_cast<int>(threadIdx.x) >= image.channels) return;
    double* to = totals + ((image.before(relation) + channel) * parts + image.part) * 2;
    to[0] = sums[0];
    to[1] = sums[1];
}

// A block for every channel. `constants` are (relation + 2, 3): the factor of the gradient, what is
// taken away for every tap, and what is taken away for every tap times what was normalised.
template <bool BY_BATCH>
__global__ void __launch_bounds__(THREADS)
    pairwise_join_close(const double* totals, const float* weight, const float* mean,
                        const float* variance, float* grad_weight, float* grad_bias, float* constants,
                        double eps, double count, int images, int relation, int parts) {
    extern __shared__ double shared[];
    const int channel = blockIdx.x;
    const bool positions = channel >= relation;
    double sums[2] = {};
    for (int i = threadIdx.x; i < (positions ? parts : images * parts); i += THREADS) {
        const int n = positions ? images : i / parts;
        const double* one =
            totals + ((n * relation + (positions ? channel - relation : channel)) * parts + i % parts) * 2;
        sums[0] += one[0];
        sums[1] += one[1];
    }
    sum_of_block(sums, shared);
    if (threadIdx.x > 0) return;
    const double deviation = 1 / sqrt(static_cast<double>(variance[channel]) + eps);
    grad_bias[channel] = sums[0];
    grad_weight[channel] = deviation * sums[1];
    constants[channel * 3] = weight[channel] * deviation;
    constants[channel * 3 + 1] = BY_BATCH ? sums[0] / count : 0;
    constants[channel * 3 + 2] = BY_BATCH ? deviation * deviation * sums[1] / count : 0;
}

// How many taps of the window at `centre` read `pixel`, no more than K / 2 apart.
__device__ inline int readings(int centre, int pixel, int side, int radius) {
    if (centre < 0 || centre >= side) return 0;
    return 1 + (pixel > 0 && centre + pixel <= radius) +
           (pixel < side - 1 && 2 * (side - 1) - pixel - centre <= radius);
}

// What the blocks of pairwise_close take: `rows` x `columns` pixels of `channels` channels; laid out
// as CUT in pairwise_planes.py.
struct Cut {
    Divisor down, across, pieces;
    int rows, columns, channels;
};

// Rows that a thread reads before it works on them: too few warps fit to hide each row's wait.
constexpr int ROWS = 4;

// Where a block's sums along rows lie: those of queries `apart` behind those of keys.
struct RowSums {
    float* first;  // of the thread's column, in row `begin`
    int begin, end, pitch, apart;
};

// One channel of one column: where its values, slopes and gradients begin, and constants, which are
// taken `repeated` times.
template <typename T, typename F, typename O>
struct Column {
    const T* planes[2];  // of query and key
    Strides strides[2];
    const F* slopes[2];
    int pitch;  // between the slopes of two pixels
    O* grads[2];
    long long to_column[2], to_row[2];
    float centre;
    const float* constants;
    float repeated;

    __device__ float centred(int which, T value, float key0) const {
        return widen(value) - key0 - (which == 0 ? centre : 0);
    }
};

// Sums up along rows what the windows around column x read of keys, and what reads it of queries; the
// thread takes every `step`-th row from `first` on.
template <int K, typename T, typename F, typename O>
__device__ inline void sum_rows(const Column<T, F, O>& own, const RowSums& sums, int x, int width,
                                int first, int step) {
    constexpr int R = K / 2;
    const float key0 = widen(*own.planes[1]);
    float readers[K];
    int columns[2][K];
#pragma unroll
    for (int j = 0; j < K; ++j) {
        readers[j] = readings(x + j - R, x, width, R);
#pragma unroll
        for (int s = 0; s < 2; ++s)
            columns[s][j] = source<true>(x + j - R, width) * static_cast<int>(own.strides[s].w);
    }
#pragma unroll 1
    for (int y = sums.begin + first; y < sums.end; y += ROWS * step) {
        T read[ROWS][2][K];
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                const T* row = own.planes[s] + min(y + r * step, sums.end - 1) * own.strides[s].h;
                forget_origin(row);
#pragma unroll
                for (int j = 0; j < K; ++j) read[r][s][j] = row[columns[s][j]];
            }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (y + r * step >= sums.end) break;
            float key = 0, query = 0;
#pragma unroll
            for (int j = 0; j < K; ++j) {
                key += own.centred(1, read[r][1][j], key0);
                query += readers[j] * own.centred(0, read[r][0][j], key0);
            }
            float* const to = sums.first + (y + r * step - sums.begin) * sums.pitch;
            to[0] = key;
            to[sums.apart] = query;
        }
    }
}

// What the window around a pixel sums up of keys, what those that read it sum up of queries, and how
// many taps of a column read its row.
struct WindowSums {
    float taps = 0, windows = 0, readers;

    template <int K>
    __device__ void add(const RowSums& sums, int y, int height, Number<K>) {
        constexpr int R = K / 2;
        // Far from the borders every row of a window reads this one once.
        const bool inside = y > R && y < height - 1 - R;
        const float* row = sums.first + (y - R - sums.begin) * sums.pitch;
        if (inside) {
            readers = K;
#pragma unroll
            for (int i = 0; i < K; ++i, row += sums.pitch) {
                taps += row[0];
                windows += row[sums.apart];
            }
        } else {
            readers = ::readers<K>(y, height);
#pragma unroll 1
            for (int i = 0; i < K; ++i) {
                row = sums.first + (source<true>(y + i - R, height) - sums.begin) * sums.pitch;
                taps += row[0];
                windows += readings(y + i - R, y, height, R) * row[sums.apart];
            }
        }
    }
};

// Writes the gradients of query and key in column x, every `step`-th row from `first` to `end`.
template <int K, typename T, typename F, typename O>
__device__ inline void close_column(const Column<T, F, O>& own, const RowSums& sums, int x, int first,
                                    int end, int step, int height, int width) {
    const float key0 = widen(*own.planes[1]), factor = own.constants[0];
    const float constant = own.constants[1] * own.repeated, linear = own.constants[2] * own.repeated;
    const float column_readers = readers<K>(x, width);
    O* const to_query = own.grads[0] + x * own.to_column[0];
    O* const to_key = own.grads[1] + x * own.to_column[1];
#pragma unroll 1
    for (int y = first; y < end; y += ROWS * step) {
        T values[ROWS][2];
        F slopes[ROWS][2];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const int row = min(y + r * step, end - 1), at = (row * width + x) * own.pitch;
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                const int column = x * static_cast<int>(own.strides[s].w);
                values[r][s] = own.planes[s][row * own.strides[s].h + column];
                slopes[r][s] = own.slopes[s][at];
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const int row = y + r * step;
            if (row >= end) break;
            WindowSums found;
            found.add(sums, row, height, Number<K>());
            const float count = found.readers * column_readers;
            const float query = own.centred(0, values[r][0], key0);
            const float key = own.centred(1, values[r][1], key0);
            const float of_query = factor * (slopes[r][0] - K * K * constant -
                                             linear * (K * K * query - found.taps));
            const float of_key = factor * (slopes[r][1] + count * constant +
                                           linear * (found.windows - count * key));
            to_query[row * own.to_row[0]] = narrow<O>(of_query);
            to_key[row * own.to_row[1]] = narrow<O>(of_key);
        }
    }
}

// Writes the gradients of query and key; those of the positions, as queries and as keys, go to
// `grad_positions`, (2, 2, H * W). Slopes of images have `size` for every pixel, those of the
// positions, which are summed over images, two. Windows are summed along rows, then along columns.
template <typename T, int K>
__global__ void __launch_bounds__(THREADS)
    pairwise_close(const T* query, Strides sq, const T* key, Strides sk, const T* position, Strides sp,
                   const float* slopes_query, const float* slopes_key, const double* positions_query,
                   const double* positions_key, const float* mean, const float* constants,
                   T* grad_query, Strides gq, T* grad_key, Strides gk, float* grad_positions,
                   int images, int relation, int height, int width, int size, Cut cut) {
    extern __shared__ double shared[];
    unsigned rest = blockIdx.x;
    const int top = cut.down.divide(rest) * cut.rows, left = cut.across.divide(rest) * cut.columns;
    const int first_channel = cut.pieces.divide(rest) * cut.channels;
    // Positions first: see Image.
    const long long n = images - static_cast<int>(rest), plane = height * width;
    const bool positions = n == images;
    const int pitch = cut.channels * cut.columns, thread = threadIdx.x % pitch;
    const int c = first_channel + thread % cut.channels, x = left + thread / cut.channels;
    const int first = threadIdx.x / pitch, step = THREADS / pitch;
    const bool idle = first >= step || c >= (positions ? 2 : relation) || x >= width;
    const int begin = max(top - K / 2, 0), end = min(top + cut.rows + K / 2, height);
    const RowSums sums = {reinterpret_cast<float*>(shared) + thread, begin, end, pitch,
                          (end - begin) * pitch};
    const auto close = [&](const auto& column) {
        if (!idle) sum_rows<K>(column, sums, x, width, first, step);
        __syncthreads();
        if (!idle)
            close_column<K>(column, sums, x, top + first, min(top + cut.rows, height), step, height,
                            width);
    };
    const int channel = idle ? 0 : c;
    if (positions) {
        const T* from = position + channel * sp.c;
        float* to = grad_positions + channel * plane;
        close(Column<T, double, float>{
            {from, from}, {sp, sp}, {positions_query + channel, positions_key + channel}, 2,
            {to, to + 2 * plane}, {1, 1}, {width, width}, mean[relation + channel],
            constants + (relation + channel) * 3, static_cast<float>(images)});
    } else {
        const long long slopes = n * plane * size + channel;
        close(Column<T, float, T>{
            {query + n * sq.n + channel * sq.c, key + n * sk.n + channel * sk.c}, {sq, sk},
            {slopes_query + slopes, slopes_key + slopes}, size,
            {grad_query + n * gq.n + channel * gq.c, grad_key + n * gk.n + channel * gk.c},
            {gq.w, gk.w}, {gq.h, gk.h}, mean[channel], constants + channel * 3, 1});
    }
}
