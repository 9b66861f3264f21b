// Means and variances of a relation's channels, without the relation: a tap reads every pixel of a key a
// fixed number of times, the product of a number for its row and one for its column, so that sums over all
// windows follow from sums over images. All sums are kept in double, which nothing less can replace where
// values lie far from zero or hardly differ.
#include "patchwise.cuh"

constexpr int THREADS = 256;
constexpr int LANES = 16;  // that join the sums of a block's threads

// Threads for the statistics of a channel and row of taps: images of few taps are large, here.
template <int K>
constexpr int WIDE_THREADS = K == 3 ? 1024 : THREADS;

// Sums over images and summed squares of every element of an image, less its channel's first value:
// partials[(share * 2 + moment) * elements + pixel * channels + c], images being dealt out to shares.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    patchwise_image_moments(const T* image, double* partials, int images, int pixels, int channels,
                            int pitch, int shares) {
    const int elements = pixels * channels;
    const int index = blockIdx.x * blockDim.x + threadIdx.x;
    const int share = index / elements, element = index % elements;
    if (share >= shares) return;
    const int channel = element % channels;
    const long long step = static_cast<long long>(pixels) * pitch;
    const T* from = image + element / channels * pitch + channel;
    const double pivot = widen(image[channel]);
    double sum = 0, squares = 0;
#pragma unroll 16
    for (int n = share; n < images; n += shares) {
        const double x = widen(from[n * step]) - pivot;
        sum += x;
        squares += x * x;
    }
    partials[2 * share * elements + element] = sum;
    partials[(2 * share + 1) * elements + element] = squares;
}

// Statistics from the moments of both images, each of `shares` parts: a block has one channel and one row
// of taps, or (row number K) the query. Means and variances lie in the order of the relation.
template <typename T, int K>
__global__ void __launch_bounds__(WIDE_THREADS<K>)
    patchwise_statistics(const T* query, const T* key, const double* of_query, const double* of_key,
                         float* mean, float* variance, int images, int height, int width,
                         int relation, int shares) {
    extern __shared__ double shared[];
    const int channel = blockIdx.x % relation, dy = blockIdx.x / relation;
    const int elements = height * width * relation;
    const bool is_query = dy == K;
    const double* moments = is_query ? of_query : of_key;
    double sums[2 * K] = {};
    for (int i = threadIdx.x; i < height * width; i += blockDim.x) {
        const int down = is_query ? 1 : readings(i / width, height, dy, K / 2);
        if (down == 0) continue;
        double own[2] = {};
#pragma unroll 4
        for (int share = 0; share < shares; ++share)
#pragma unroll
            for (int k = 0; k < 2; ++k)
                own[k] += moments[(2 * share + k) * elements + i * relation + channel];
#pragma unroll
        for (int dx = 0; dx < K; ++dx) {
            const int count = down * (is_query ? 1 : readings(i % width, width, dx, K / 2));
            sums[2 * dx] += count * own[0];
            sums[2 * dx + 1] += count * own[1];
        }
    }
#pragma unroll
    for (int k = 0; k < 2 * K; ++k) shared[k * WIDE_THREADS<K> + threadIdx.x] = sums[k];
    __syncthreads();
    double joined = 0;
    if (threadIdx.x < 2 * K * LANES)
        for (int i = 0; i < WIDE_THREADS<K> / LANES; ++i)
            joined += shared[threadIdx.x / LANES * WIDE_THREADS<K> + threadIdx.x % LANES + i * LANES];
    __syncthreads();
    shared[threadIdx.x] = joined;
    __syncthreads();
    if (threadIdx.x >= (is_query ? 1 : K)) return;
    double moment[2] = {};
    for (int k = 0; k < 2; ++k)
        for (int i = 0; i < LANES; ++i)
            moment[k] += shared[(2 * threadIdx.x + k) * LANES + i];
    const double count = static_cast<double>(images) * height * width;
    const double first = moment[0] / count, second = moment[1] / count;
    const int number = is_query ? channel : relation + channel * K * K + dy * K + threadIdx.x;
    const double pivot = widen(is_query ? query[channel] : key[channel]);
    mean[number] = static_cast<float>(first + pivot);
    variance[number] = static_cast<float>(max(second - first * first, 0.0));
}
