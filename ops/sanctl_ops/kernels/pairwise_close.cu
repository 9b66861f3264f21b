// The gradients of query, key and positions, and of the first normalisation: see pairwise_planes.cuh.
#include "pairwise_planes.cuh"

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

// Slopes are sums over queries and, negative, over keys of the gradient behind the first normalisation. Writes for every channel of a part of an image their sum, and that of slopes times
// what was normalised, to `totals`. Slopes are laid out as `pairwise_close` takes them.
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

// Where the gradients of a query's and a key's column go, and how far its rows are apart.
template <typename O>
struct Columns {
    O* query;
    O* key;
    long long query_column, query_row, key_column, key_row;
};

// Writes one channel's gradients of query and key in the thread's columns. `slope_query` and
// `slope_key` point to the channel's slopes at the first pixel, `channels` apart; constants are taken
// `repeated` times.
template <int K, typename T, typename F, typename O>
__device__ inline void close_columns(const Image<T>& image, const F* slope_query, const F* slope_key,
                                     int channels, float repeated, float centre,
                                     const float* constants, const Columns<O>& to, int height,
                                     int width) {
    constexpr int R = K / 2;
    const float key0 = widen(*image.plane[1]), factor = constants[0];
    const float constant = constants[1] * repeated, linear = constants[2] * repeated;
#pragma unroll 1
    for (int x = image.first; x < width; x += image.step) {
        O* const store_query = to.query + x * to.query_column;
        O* const store_key = to.key + x * to.key_column;
        int columns[2][K];
        float readers[K], all_readers = 0;
#pragma unroll
        for (int j = 0; j < K; ++j) {
#pragma unroll
            for (int s = 0; s < 2; ++s)
                columns[s][j] = image.column(s, source<true>(x + j - R, width));
            readers[j] = readings(x + j - R, x, width, R);
            all_readers += readers[j];
        }
        float keys[K] = {}, queries[K] = {};
#pragma unroll 1
        for (int begin = 0; begin < height + 2 * R; begin += K)
#pragma unroll
            for (int i = 0; i < K; ++i) {
                const int y = begin + i - R;
                if (y >= height + R) break;
                const int shown = source<true>(y, height);
                const T* query_row = image.row(0, shown);
                const T* key_row = image.row(1, shown);
                keys[i] = queries[i] = 0;
#pragma unroll
                for (int j = 0; j < K; ++j) {
                    keys[i] += widen(key_row[columns[1][j]]) - key0;
                    queries[i] += readers[j] * (widen(query_row[columns[0][j]]) - key0 - centre);
                }
                const int own = y - R;  // the row in the middle of the last K
                if (own < 0) continue;
                float taps = 0, windows = 0, row_readers = 0;
                // Far from the borders every row of the last K reads this one once.
                const bool inside = own > R && own < height - 1 - R;
#pragma unroll
                for (int k = 0; k < K; ++k) taps += keys[k];
                if (inside) {
                    row_readers = K;
#pragma unroll
                    for (int k = 0; k < K; ++k) windows += queries[k];
                } else
#pragma unroll
                    for (int k = 0; k < K; ++k) {
                        // Line k is the latest one up to i, and one of the round before behind it.
                        const int line = begin + k - R - (k > i ? K : 0);
                        const float reader = readings(line, own, height, R);
                        windows += reader * queries[k];
                        row_readers += reader;
                    }
                const float own_query = widen(image.row(0, own)[columns[0][R]]) - key0 - centre;
                const float own_key = widen(image.row(1, own)[columns[1][R]]) - key0;
                const float count = row_readers * all_readers;
                const float of_query =
                    factor * (slope_query[(own * width + x) * channels] - K * K * constant -
                              linear * (K * K * own_query - taps));
                const float of_key =
                    factor * (slope_key[(own * width + x) * channels] + count * constant + linear * (windows - count * own_key));
                store_query[own * to.query_row] = narrow<O>(of_query);
                store_key[own * to.key_row] = narrow<O>(of_key);
            }
    }
}

// Writes the gradients of query and key; those of the positions, as queries and as keys, go to
// `grad_positions`, (2, 2, H * W). Slopes of images have `channels` for every pixel, those of the
// positions, which are summed over images, two.
template <typename T, int K>
__global__ void __launch_bounds__(THREADS)
    pairwise_close(const T* query, Strides sq, const T* key, Strides sk, const T* position, Strides sp,
                   const float* slopes_query, const float* slopes_key, const double* positions_query,
                   const double* positions_key, const float* mean, const float* constants,
                   T* grad_query, Strides gq, T* grad_key, Strides gk, float* grad_positions,
                   int images, int relation, int height, int width, int parts, int channels) {
    const Image<T> image({{query, key, position}, {sq, sk, sp}}, images, relation, parts);
    const long long plane = height * width;
    const int channel = image.channel;
    if (image.positions) {
        const int of_all = relation + channel;
        const Columns<float> to = {grad_positions + channel * plane,
                                   grad_positions + (2 + channel) * plane, 1, width, 1, width};
        close_columns<K>(image, positions_query + channel, positions_key + channel, 2,
                         static_cast<float>(images), mean[of_all], constants + of_all * 3, to,
                         height, width);
    } else {
        const long long n = image.number;
        const Columns<T> to = {grad_query + n * gq.n + channel * gq.c,
                               grad_key + n * gk.n + channel * gk.c, gq.w, gq.h, gk.w, gk.h};
        close_columns<K>(image, slopes_query + n * plane * channels + channel,
                         slopes_key + n * plane * channels + channel, channels, 1.0f, mean[channel],
                         constants + channel * 3, to, height, width);
    }
}
