// What pairwise attention computes of planes: the statistics of the first normalisation, the folded
// planes, and the gradients of query, key and position. See pairwise.cuh.
//
// Windows are summed column by column: a thread walks down a column of one channel and keeps what the
// last K rows of taps add up to. The last image stands for the positions, of which there is only one;
// its channels come last. Blocks go over (image or positions, part of the columns).
#include "pairwise.cuh"

constexpr int THREADS = 256;

// Query, key and position; channels are those of query and key, without the two of the positions.
template <typename T>
struct Sources {
    const T* planes[3];
    Strides strides[3];
};

// What a block has to do with: an image, or the positions.
template <typename T>
struct Image {
    const T* plane[2];  // of query and key
    Strides strides[2];
    bool positions;
    int number, part;
    int channels, channel;  // of the image; the thread's own one
    int first, step;        // columns that the thread takes

    __device__ Image(const Sources<T>& sources, int images, int relation, int parts) {
        number = blockIdx.x / parts;
        part = blockIdx.x % parts;
        positions = number == images;
        channels = positions ? 2 : relation;
        channel = threadIdx.x % channels;
        const int at_once = THREADS / channels;
        const bool idle = static_cast<int>(threadIdx.x) >= at_once * channels;
        first = idle ? 1 << 30 : part * at_once + static_cast<int>(threadIdx.x) / channels;
        step = parts * at_once;
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            strides[s] = positions ? sources.strides[2] : sources.strides[s];
            plane[s] = positions ? sources.planes[2] : sources.planes[s] + number * strides[s].n;
            plane[s] += channel * strides[s].c;
        }
    }

    // Where a row of the plane of queries or keys begins.
    __device__ const T* row(int which, int y) const { return plane[which] + y * strides[which].h; }

    // How far into a row a column is.
    __device__ int column(int which, int x) const {
        return x * static_cast<int>(strides[which].w);
    }

    // Where values of this image's channels begin, when all channels of all images have one.
    __device__ int before(int relation) const { return number * relation; }
};

// Adds up a double of every thread that has the same channel, in a fixed order.
template <int N>
__device__ inline void sum_of_channel(double (&values)[N], double* shared, int channels) {
#pragma unroll
    for (int v = 0; v < N; ++v) shared[threadIdx.x * N + v] = values[v];
    __syncthreads();
    if (static_cast<int>(threadIdx.x) >= channels) return;
    for (int t = threadIdx.x + channels; t < THREADS / channels * channels; t += channels)
#pragma unroll
        for (int v = 0; v < N; ++v) values[v] += shared[t * N + v];
}

// Of d in one part of an image: the sum and the sum of squares of d - offset, the offset, and the sum
// of key - first_key.
struct Moments {
    double sum, square, offset, first_key, key;
};

template <typename T, int K>
__global__ void __launch_bounds__(THREADS)
    pairwise_moments(const T* query, Strides sq, const T* key, Strides sk, const T* position,
                     Strides sp, double* moments, int images, int relation, int height, int width,
                     int parts) {
    constexpr int R = K / 2;
    extern __shared__ double shared[];
    const Image<T> image({{query, key, position}, {sq, sk, sp}}, images, relation, parts);
    const float query0 = widen(*image.plane[0]), key0 = widen(*image.plane[1]);
    double totals[3] = {};
#pragma unroll 1
    for (int x = image.first; x < width; x += image.step) {
        int columns[K];
#pragma unroll
        for (int j = 0; j < K; ++j) columns[j] = image.column(1, source<true>(x + j - R, width));
        const int own_column = image.column(0, x);
        float sums[K] = {}, squares[K] = {}, sum = 0, square = 0, keys = 0;
#pragma unroll 1
        for (int begin = 0; begin < height + 2 * R; begin += K)
#pragma unroll
            for (int i = 0; i < K; ++i) {
                const int y = begin + i - R;
                if (y >= height + R) break;
                const T* row = image.row(1, source<true>(y, height));
                sums[i] = squares[i] = 0;
#pragma unroll
                for (int j = 0; j < K; ++j) {
                    const float value = widen(row[columns[j]]) - key0;
                    sums[i] += value;
                    squares[i] += value * value;
                    if (j == R && y >= 0 && y < height) keys += value;
                }
                if (y < R) continue;
                const float centre = widen(image.row(0, y - R)[own_column]) - query0;
                float taps = 0, tap_squares = 0;
#pragma unroll
                for (int k = 0; k < K; ++k) {
                    taps += sums[k];
                    tap_squares += squares[k];
                }
                sum += K * K * centre - taps;
                square += centre * (K * K * centre - 2 * taps) + tap_squares;
            }
        totals[0] += sum;
        totals[1] += square;
        totals[2] += keys;
    }
    sum_of_channel(totals, shared, image.channels);
    if (static_cast<int>(threadIdx.x) >= image.channels) return;
    Moments& found = reinterpret_cast<Moments*>(
        moments)[(image.before(relation) + image.channel) * parts + image.part];
    found = {totals[0], totals[1], static_cast<double>(query0) - key0, key0, totals[2]};
}

// Adds up N doubles of all threads of a block, in a fixed order; thread 0 has the sums.
template <int N>
__device__ inline void sum_of_block(double (&values)[N], double* shared) {
#pragma unroll
    for (int v = 0; v < N; ++v) shared[threadIdx.x * N + v] = values[v];
    for (int apart = THREADS / 2; apart > 0; apart /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < apart)
#pragma unroll
            for (int v = 0; v < N; ++v)
                shared[threadIdx.x * N + v] += shared[(threadIdx.x + apart) * N + v];
    }
#pragma unroll
    for (int v = 0; v < N; ++v) values[v] = shared[v];
}

// A power of two near the scale of a position, which positions are multiplied by.
__device__ inline float power_near(float scale) {
    return scale == 0 ? 1 : ldexpf(1, max(-14, min(ilogbf(scale), 10)));
}

// A block for every channel. `constants` are (relation + 2, 2): the factor and the summand of z before
// the ReLU. `affine` is what Relation takes; without REL channels, those of the relation are in its
// tail, too. If RUNNING, mean and variance are given.
template <int REL, bool RUNNING>
__global__ void __launch_bounds__(THREADS)
    pairwise_join_moments(const double* moments, const float* weight, const float* bias, float* mean,
                          float* variance, float* constants, Half* affine, double eps, double count,
                          int images, int relation, int parts) {
    extern __shared__ double shared[];
    const int channel = blockIdx.x;
    const bool positions = channel >= relation;
    double sums[2] = {};
    if (!RUNNING)
        for (int i = threadIdx.x; i < (positions ? parts : images * parts); i += THREADS) {
            const int n = positions ? images : i / parts;
            const Moments one = reinterpret_cast<const Moments*>(
                moments)[(n * relation + (positions ? channel - relation : channel)) * parts + i % parts];
            const double terms = i % parts == 0 ? count / images : 0;  // of an image
            sums[0] += one.sum + terms * one.offset;
            sums[1] += one.square + one.offset * (2 * one.sum + terms * one.offset);
        }
    sum_of_block(sums, shared);
    if (threadIdx.x > 0) return;
    if (!RUNNING) {
        const double terms = positions ? count / images : count;
        const double centre = sums[0] / terms;
        mean[channel] = centre;
        variance[channel] = max(sums[1] / terms - centre * centre, 0.0);
    }
    const double scale = weight[channel] / sqrt(static_cast<double>(variance[channel]) + eps);
    const double shift = bias[channel] - scale * mean[channel];
    constants[channel * 2] = scale;
    constants[channel * 2 + 1] = shift;
    const int base = REL > 0 ? 0 : relation;
    if (positions) {
        affine[base + channel - relation] = to_half(static_cast<float>(scale) / power_near(scale));
        affine[TAIL + base + channel - relation] = to_half(shift);
    } else if (REL == 0) {
        affine[channel] = to_half(1);
        affine[TAIL + channel] = to_half(0);
    }
    if (channel == 0)
        for (int slot = base + 2; slot < TAIL; ++slot) {
            affine[slot] = to_half(0);
            affine[TAIL + slot] = to_half(slot == base + 2);
        }
}

// Writes the folded planes of query and key; a thread takes 8 channels of a pixel. Each image's
// channels are centred by the mean of the key, which cancels in differences.
template <typename T, int REL>
__global__ void __launch_bounds__(THREADS)
    pairwise_fold_relation(const T* query, Strides sq, const T* key, Strides sk, const T* position,
                           Strides sp, const double* moments, const float* constants, Half* folded_query,
                           Half* folded_key, Divisor width, Divisor height, int images, int relation,
                           int parts) {
    constexpr int PIECES = CHUNKS<REL>;
    const unsigned number = blockIdx.x * static_cast<unsigned>(THREADS) + threadIdx.x;
    const int piece = number % PIECES;
    unsigned rest = number / PIECES;
    const int x = width.divide(rest), y = height.divide(rest), n = rest;
    if (n >= images) return;
    const int base = REL > 0 ? REL : relation;
    const int plane = static_cast<int>(width.divisor * height.divisor);
    float values[2][8] = {};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        const int slot = piece * 8 + e;
        if (slot < relation && slot < base) {
            const Moments* of_image = reinterpret_cast<const Moments*>(moments) + (n * relation + slot) * parts;
            double sum = 0;
            for (int p = 0; p < parts; ++p) sum += of_image[p].key;
            const float mean = of_image->first_key + sum / plane;
            const float scale = constants[slot * 2], shift = constants[slot * 2 + 1];
            values[0][e] = scale * (widen(query[n * sq.n + slot * sq.c + y * sq.h + x * sq.w]) - mean) + shift;
            values[1][e] = scale * (widen(key[n * sk.n + slot * sk.c + y * sk.h + x * sk.w]) - mean);
        } else if (slot == base || slot == base + 1) {
            const int c = slot - base;
            values[0][e] = values[1][e] = widen(position[c * sp.c + y * sp.h + x * sp.w]) *
                                          power_near(constants[(relation + c) * 2]);
        }
    }
    const long long at = static_cast<long long>(number) * 8;
    store<8>(folded_query + at, values[0]);
    store<8>(folded_key + at, values[1]);
}

// Sums up one channel's slopes, and slopes times what was normalised, in the thread's columns; as in
// close_columns.
template <int K, typename T, typename F>
__device__ inline void sum_columns(const Image<T>& image, const F* slope_query, const F* slope_key,
                                   int channels, float centre, int height, int width,
                                   double (&sums)[2]) {
    constexpr int R = K / 2;
    const int padded_width = width + 2 * R;
    const float key0 = widen(*image.plane[1]);
#pragma unroll 1
    for (int x = image.first; x < padded_width; x += image.step) {
        const int column = image.column(1, source<true>(x - R, width));
#pragma unroll 4
        for (int y = 0; y < height + 2 * R; ++y) {
            const float value = widen(image.row(1, source<true>(y - R, height))[column]) - key0;
            sums[1] += static_cast<double>(value) * slope_key[(y * padded_width + x) * channels];
        }
        if (x >= width) continue;
        const int own_column = image.column(0, x);
#pragma unroll 4
        for (int y = 0; y < height; ++y) {
            const double slope = slope_query[(y * width + x) * channels];
            const float value = widen(image.row(0, y)[own_column]) - key0;
            sums[0] += slope;
            sums[1] += (static_cast<double>(value) - centre) * slope;
        }
    }
}

// Slopes are sums over queries and, negative, over padded keys of the gradient behind the first
// normalisation. Writes for every channel of a part of an image their sum, and that of slopes times
// what was normalised, to `totals`. Slopes are laid out as `pairwise_close` takes them.
template <typename T, int K>
__global__ void __launch_bounds__(THREADS)
    pairwise_close_sums(const T* query, Strides sq, const T* key, Strides sk, const T* position,
                        Strides sp, const float* slopes_query, const float* slopes_key,
                        const double* positions_query, const double* positions_key,
                        const float* mean, double* totals, int images, int relation, int height,
                        int width, int parts, int channels) {
    extern __shared__ double shared[];
    const Image<T> image({{query, key, position}, {sq, sk, sp}}, images, relation, parts);
    const long long plane = height * width, padded = (height + K - 1) * (width + K - 1);
    const long long n = image.number;
    const int channel = image.channel;
    double sums[2] = {};
    if (image.positions)
        sum_columns<K>(image, positions_query + channel, positions_key + channel, 2,
                       mean[relation + channel], height, width, sums);
    else
        sum_columns<K>(image, slopes_query + n * plane * channels + channel,
                       slopes_key + n * padded * channels + channel, channels, mean[channel], height,
                       width, sums);
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
    const int padded_width = width + 2 * R;
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
        int shown_x[IMAGES<true>];  // columns of padded keys that show this one; -1 for none
#pragma unroll
        for (int b = 0; b < IMAGES<true>; ++b)
            shown_x[b] = ::image<true>(x, width, R, b, shown_x[b]) ? shown_x[b] + R : -1;
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
                float taps = 0, windows = 0, row_readers = 0, slope = 0;
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
#pragma unroll
                for (int a = 0; a < IMAGES<true>; ++a) {
                    int shown_y;
                    if (a > 0 && inside) break;
                    if (!::image<true>(own, height, R, a, shown_y)) continue;
                    const F* line = slope_key + (shown_y + R) * padded_width * channels;
#pragma unroll
                    for (int b = 0; b < IMAGES<true>; ++b)
                        if (shown_x[b] >= 0) slope += line[shown_x[b] * channels];
                }
                const float own_query = widen(image.row(0, own)[columns[0][R]]) - key0 - centre;
                const float own_key = widen(image.row(1, own)[columns[1][R]]) - key0;
                const float count = row_readers * all_readers;
                const float of_query =
                    factor * (slope_query[(own * width + x) * channels] - K * K * constant -
                              linear * (K * K * own_query - taps));
                const float of_key =
                    factor * (slope + count * constant + linear * (windows - count * own_key));
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
    const long long plane = height * width, padded = (height + K - 1) * (width + K - 1);
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
                         slopes_key + n * padded * channels + channel, channels, 1.0f, mean[channel],
                         constants + channel * 3, to, height, width);
    }
}
