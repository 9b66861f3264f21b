// The statistics of the first normalisation, and query and key folded with it: see pairwise_planes.cuh.
#include "pairwise_planes.cuh"

// Of d in one part of an image: the sum and the sum of squares of d - offset, the offset, and the sum
// of key - first_key.
struct Moments {
    double sum, square, offset, first_key, key;
};

// Neighbouring columns whose windows one thread sums up, and columns that it reads for that.
constexpr int COLUMNS = 4;
template <int K>
constexpr int READ = COLUMNS + K - 1;

// A row of a thread's columns: what their windows read of the keys, and the queries. Columns beyond the
// width repeat the last one and count for nothing.
template <typename T, int K>
struct Row {
    static constexpr int R = K / 2;
    int key_columns[READ<K>], query_columns[COLUMNS];
    float own[COLUMNS], readers[COLUMNS];  // 1 or 0; how many windows read the column
    T keys[READ<K>], queries[COLUMNS];

    __device__ Row(const Image<T>& image, int left, int width) {
#pragma unroll
        for (int j = 0; j < READ<K>; ++j)
            key_columns[j] = image.column(1, source<true>(min(left + j - R, width - 1 + R), width));
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            query_columns[c] = image.column(0, min(left + c, width - 1));
            own[c] = left + c < width;
            readers[c] = own[c] * ::readers<K>(left + c, width);
        }
    }

    // Reads row y of the keys, and that of the queries whose windows end there.
    __device__ void read(const Image<T>& image, int y, int height) {
        const T* key_row = image.row(1, source<true>(y, height));
        const T* query_row = image.row(0, max(y - R, 0));
        forget_origin(key_row);
        forget_origin(query_row);
#pragma unroll
        for (int j = 0; j < READ<K>; ++j) keys[j] = key_row[key_columns[j]];
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) queries[c] = query_row[query_columns[c]];
    }
};

// What windows add up to over K rows: blocks of K rows are summed up from their first one on, and back
// from their last one (van Herk, 1992). Row i is the i-th of a block.
template <int K>
struct Windows {
    float from_first[COLUMNS] = {}, to_last[COLUMNS][K + 1] = {};

    __device__ void add_row(int i, const float (&values)[READ<K>]) {
        float sum = 0;
#pragma unroll
        for (int j = 0; j < K; ++j) sum += values[j];
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            if (c > 0) sum += values[c + K - 1] - values[c - 1];
            from_first[c] = i > 0 ? from_first[c] + sum : sum;
            to_last[c][i] = sum;
        }
    }

    // Of the K rows up to row i, whose first ones are of the block before.
    __device__ float sum(int c, int i) const { return from_first[c] + to_last[c][i + 1]; }

    __device__ void end_block() {
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
            for (int i = K - 1; i > 0; --i) to_last[c][i - 1] += to_last[c][i];
    }
};

// With q a query, k a key that its window reads, and K * K taps, the sum of d is K * K * sum(q) less
// sum(readers * k), and that of its squares sum(q * (K * K * q - 2 * sum of k)) + sum(readers * k * k).
// So windows are summed up for the mixed term alone: a thread has COLUMNS neighbouring columns of a band
// of rows.
template <typename T, int K>
__global__ void __launch_bounds__(THREADS, 2)
    pairwise_moments(const T* query, Strides sq, const T* key, Strides sk, const T* position,
                     Strides sp, double* moments, int images, int relation, int height, int width,
                     int bands, int parts) {
    constexpr int R = K / 2;
    extern __shared__ double shared[];
    const Image<T> image({{query, key, position}, {sq, sk, sp}}, images, relation, parts);
    const float query0 = widen(*image.plane[0]), key0 = widen(*image.plane[1]);
    const int across = (width + COLUMNS - 1) / COLUMNS, rows = (height + bands - 1) / bands;
    double totals[3] = {};
#pragma unroll 1
    for (int item = image.first; item < across * bands; item += image.step) {
        const int top = item / across * rows, bottom = min(top + rows, height);
        Row<T, K> row(image, item % across * COLUMNS, width);
        Windows<K> windows;
        float queries = 0, mixed = 0, read = 0, squares = 0, keys = 0;
        row.read(image, top - R, height);
#pragma unroll 1
        for (int begin = top - R; begin < bottom + R; begin += K) {
#pragma unroll
            for (int i = 0; i < K; ++i) {
                const int y = begin + i;
                if (y >= bottom + R) break;
                float values[READ<K>], centres[COLUMNS];
#pragma unroll
                for (int j = 0; j < READ<K>; ++j) values[j] = widen(row.keys[j]) - key0;
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c)
                    centres[c] = row.own[c] * (widen(row.queries[c]) - query0);
                if (y + 1 < bottom + R) row.read(image, y + 1, height);  // ahead of its use
                windows.add_row(i, values);
                const bool has_keys = y >= top && y < bottom;
                const float row_readers = has_keys ? readers<K>(y, height) : 0;
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) {
                    const float weighed = row_readers * row.readers[c] * values[c + R];
                    read += weighed;
                    squares += weighed * values[c + R];
                    if (has_keys) keys += row.own[c] * values[c + R];
                    if (y < top + R) continue;
                    queries += centres[c];
                    mixed += centres[c] * (K * K * centres[c] - 2 * windows.sum(c, i));
                }
            }
            windows.end_block();
        }
        totals[0] += K * K * queries - read;
        totals[1] += mixed + squares;
        totals[2] += keys;
    }
    sum_of_channel(totals, shared, image.channels);
    if (static_cast<int>(threadIdx.x) >= image.channels) return;
    Moments& found = reinterpret_cast<Moments*>(
        moments)[(image.before(relation) + image.channel) * parts + image.part];
    found = {totals[0], totals[1], static_cast<double>(query0) - key0, key0, totals[2]};
}

// A power of two near the scale of a position, which positions are multiplied by.
__device__ inline float power_near(float scale) {
    return scale == 0 ? 1 : ldexpf(1, max(-14, min(ilogbf(scale), 10)));
}

// A block for every channel. `constants` are (relation + 2, 2): the factor and the summand of z before
// the ReLU. `centres` are (images, relation): the mean of the key. `affine` is what Relation takes;
// without REL channels, those of the relation are in its tail, too. If RUNNING, mean and variance are
// given.
template <int REL, bool RUNNING>
__global__ void __launch_bounds__(THREADS)
    pairwise_join_moments(const double* moments, const float* weight, const float* bias, float* mean,
                          float* variance, float* constants, float* centres, Half* affine, double eps,
                          double count, int plane, int images, int relation, int parts) {
    extern __shared__ double shared[];
    const int channel = blockIdx.x;
    const bool positions = channel >= relation;
    if (!positions)
        for (int n = threadIdx.x; n < images; n += THREADS) {
            const Moments* of_image =
                reinterpret_cast<const Moments*>(moments) + (n * relation + channel) * parts;
            double sum = 0;
            for (int p = 0; p < parts; ++p) sum += of_image[p].key;
            centres[n * relation + channel] = of_image->first_key + sum / plane;
        }
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

// Reads up to 8 neighbouring channels, of which `count` exist; in `rows` by one instruction.
template <typename T>
__device__ inline void load_channels(const T* from, long long step, int count, bool rows,
                                     float (&values)[8]) {
    if (rows && count == 8) return load<8>(from, values);
#pragma unroll
    for (int e = 0; e < 8; ++e) values[e] = e < count ? widen(from[e * step]) : 0;
}

// Writes the folded planes of query and key; a block takes a part of an image, and a thread always the
// same 8 channels: scale * (x - mean) of the key, with the shift added of the query. Each image's
// channels are centred by the mean of the key, which cancels in differences. In `rows`, 8 channels of a
// pixel are neighbours in memory, aligned.
template <typename T, int REL>
__global__ void __launch_bounds__(THREADS, 4)
    pairwise_fold_relation(const T* query, Strides sq, const T* key, Strides sk, const T* position,
                           Strides sp, const float* constants, const float* centres,
                           Half* folded_query, Half* folded_key, Divisor width, int plane, int relation,
                           int shares, int rows) {
    constexpr int PIECES = CHUNKS<REL>, AT_ONCE = THREADS / PIECES;
    const int slot = threadIdx.x % PIECES * 8, base = REL > 0 ? REL : relation;
    const int share = blockIdx.x % shares;
    const long long n = blockIdx.x / shares;
    if (static_cast<int>(threadIdx.x) >= AT_ONCE * PIECES) return;
    const int count = min(max(relation - slot, 0), 8);  // of the relation's channels
    const bool has_position = slot == base / 8 * 8;
    float mean[8] = {}, scale[8] = {}, shift[8] = {}, powers[2] = {};
    if (has_position)
#pragma unroll
        for (int c = 0; c < 2; ++c) powers[c] = power_near(constants[(relation + c) * 2]);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        const int c = slot + e - base;  // of the positions
        if (e < count) {
            mean[e] = centres[n * relation + slot + e];
            scale[e] = constants[(slot + e) * 2];
            shift[e] = constants[(slot + e) * 2 + 1];
        } else if (c == 0 || c == 1)
            scale[e] = c == 0 ? powers[0] : powers[1];
    }
    const T* const from_query = query + n * sq.n + slot * sq.c;
    const T* const from_key = key + n * sk.n + slot * sk.c;
#pragma unroll 1
    for (int pixel = share * AT_ONCE + threadIdx.x / PIECES; pixel < plane; pixel += shares * AT_ONCE) {
        unsigned y = pixel;
        const int x = width.divide(y);
        float values[2][8];
        load_channels(from_query + y * sq.h + x * sq.w, sq.c, count, rows, values[0]);
        load_channels(from_key + y * sk.h + x * sk.w, sk.c, count, rows, values[1]);
        float own[2] = {};
        if (has_position) {
            const T* const from = position + y * sp.h + x * sp.w;
            own[0] = widen(from[0]);
            own[1] = widen(from[sp.c]);
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const int c = slot + e - base;
            if (c == 0 || c == 1) values[0][e] = values[1][e] = c == 0 ? own[0] : own[1];
            values[0][e] = scale[e] * (values[0][e] - mean[e]) + shift[e];
            values[1][e] = scale[e] * (values[1][e] - mean[e]);
        }
        const long long at = ((n * plane + pixel) * PIECES + threadIdx.x % PIECES) * 8;
        store<8>(folded_query + at, values[0]);
        store<8>(folded_key + at, values[1]);
    }
}
