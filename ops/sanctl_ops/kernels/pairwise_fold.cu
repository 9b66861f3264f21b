// The statistics of the first normalisation, and query and key folded with it: see pairwise_planes.cuh.
#include "pairwise_planes.cuh"

// Of d in one part of an image: the sum and the sum of squares of d - offset, the offset, and the sum
// of key - first_key.
struct Moments {
    double sum, square, offset, first_key, key;
};

template <typename T, int K>
__global__ void __launch_bounds__(THREADS, 3)
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
        T next[K], next_centre;
        // Reads a row of taps, and the query whose last row that is, ahead of their use.
        const auto fetch = [&](int y) {
            if (y >= height + R) return;
            const T* row = image.row(1, source<true>(y, height));
#pragma unroll
            for (int j = 0; j < K; ++j) next[j] = row[columns[j]];
            next_centre = image.row(0, max(y - R, 0))[own_column];
        };
        fetch(-R);
#pragma unroll 1
        for (int begin = 0; begin < height + 2 * R; begin += K)
#pragma unroll
            for (int i = 0; i < K; ++i) {
                const int y = begin + i - R;
                if (y >= height + R) break;
                float values[K];
#pragma unroll
                for (int j = 0; j < K; ++j) values[j] = widen(next[j]) - key0;
                const float centre = widen(next_centre) - query0;
                fetch(y + 1);
                sums[i] = squares[i] = 0;
#pragma unroll
                for (int j = 0; j < K; ++j) {
                    sums[i] += values[j];
                    squares[i] += values[j] * values[j];
                }
                if (y >= 0 && y < height) keys += values[R];
                if (y < R) continue;
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

// Reads up to 8 neighbouring channels, of which `count` exist; in `rows` by one instruction.
template <typename T>
__device__ inline void load_channels(const T* from, long long step, int count, bool rows,
                                     float (&values)[8]) {
    if (rows) return load<8>(from, values);
#pragma unroll
    for (int e = 0; e < 8; ++e) values[e] = e < count ? widen(from[e * step]) : 0;
}

// Writes the folded planes of query and key; a block takes a part of an image, and a thread always the
// same 8 channels. Each image's channels are centred by the mean of the key, which cancels in
// differences. In `rows`, 8 channels of a pixel are neighbours in memory, aligned.
template <typename T, int REL>
__global__ void __launch_bounds__(THREADS)
    pairwise_fold_relation(const T* query, Strides sq, const T* key, Strides sk, const T* position,
                           Strides sp, const double* moments, const float* constants, Half* folded_query,
                           Half* folded_key, Divisor width, int plane, int relation, int parts,
                           int shares, int rows) {
    constexpr int PIECES = CHUNKS<REL>, AT_ONCE = THREADS / PIECES;
    const int slot = threadIdx.x % PIECES * 8, base = REL > 0 ? REL : relation;
    const int share = blockIdx.x % shares;
    const long long n = blockIdx.x / shares;
    if (static_cast<int>(threadIdx.x) >= AT_ONCE * PIECES) return;
    const int count = min(max(relation - slot, 0), 8);  // of the relation's channels
    float mean[8], scale[8] = {}, shift[8] = {};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        if (e >= count) continue;
        const Moments* of_image =
            reinterpret_cast<const Moments*>(moments) + (n * relation + slot + e) * parts;
        double sum = 0;
        for (int p = 0; p < parts; ++p) sum += of_image[p].key;
        mean[e] = of_image->first_key + sum / plane;
        scale[e] = constants[(slot + e) * 2];
        shift[e] = constants[(slot + e) * 2 + 1];
    }
    const T* const from_query = query + n * sq.n + slot * sq.c;
    const T* const from_key = key + n * sk.n + slot * sk.c;
#pragma unroll 2
    for (int pixel = share * AT_ONCE + threadIdx.x / PIECES; pixel < plane; pixel += shares * AT_ONCE) {
        unsigned y = pixel;
        const int x = width.divide(y);
        float values[2][8];
        load_channels(from_query + y * sq.h + x * sq.w, sq.c, count, rows && count == 8, values[0]);
        load_channels(from_key + y * sk.h + x * sk.w, sk.c, count, rows && count == 8, values[1]);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const int c = slot + e - base;  // of the positions
            if (e < count) {
                values[0][e] = scale[e] * (values[0][e] - mean[e]) + shift[e];
                values[1][e] = scale[e] * (values[1][e] - mean[e]);
            } else if (c == 0 || c == 1)
                values[0][e] = values[1][e] = widen(position[c * sp.c + y * sp.h + x * sp.w]) *
                                              power_near(constants[(relation + c) * 2]);
        }
        const long long at = ((n * plane + pixel) * PIECES + threadIdx.x % PIECES) * 8;
        store<8>(folded_query + at, values[0]);
        store<8>(folded_key + at, values[1]);
    }
}
