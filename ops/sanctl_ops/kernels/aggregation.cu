// out[n, c, i] = sum_j w[n, c % Cw, j, i] * x[n, c, nbr(i, j)] and its two gradients.
//
// The kernels named *_same take windows of stride 1 and padding K / 2, contiguous weights, and at
// most 8 channels to a weight. Their blocks run over (image, weight channel, tile of rows); threads
// own V neighbouring pixels of a row and serve all channels that share a weight, so that every
// weight is read or written once. Weights are copied to shared memory ahead of their use.
#include "staged_tile.cuh"
#include "window_gradient.cuh"

constexpr int THREADS = 128;          // of a block, at most
constexpr int GRADIENT_THREADS = 64;  // the same for the gradient of x, which takes more registers
constexpr int STAGES = 2;             // rows of taps under way or in use

struct Tile {
    int n, weight_channel, top;  // `top` is the first row of the tile
    int row, column;             // this thread's row of the plane and the first of its V columns
    bool active;                 // whether that row is one of the tile and of the plane

    __device__ Tile(const Deal& deal, int height, int v) {
        unsigned part = blockIdx.x, line = threadIdx.x;
        top = deal.tiles.divide(part) * deal.rows;
        weight_channel = deal.weight_channels.divide(part);
        n = part;
        column = deal.vectors.divide(line) * v;
        row = top + line;
        active = line < deal.rows && row < height;
    }
};

// Rows of taps on their way to one thread: slot s has K vectors, which no other thread reads.
template <typename T, int K, int V>
struct Ring {
    T* own;

    __device__ explicit Ring(void* shared) : own(static_cast<T*>(shared) + threadIdx.x * V) {}

    // What follows the rings of all threads.
    static __device__ T* end(void* shared) {
        return static_cast<T*>(shared) + STAGES * K * blockDim.x * V;
    }

    __device__ T* at(int slot, int kx) const { return own + (slot * K + kx) * blockDim.x * V; }

    // `from` is the first tap's vector; the other taps' follow `plane` elements apart.
    __device__ void fetch(int slot, const T* from, int plane) const {
#pragma unroll
        for (int kx = 0; kx < K; ++kx)
            copy_async<V>(at(slot, kx), from + static_cast<long long>(kx) * plane);
    }
};

// How the lines of a staged tile are laid out, for reads of V elements at a time; _Line in
// aggregation.py is the same.
template <int K, int V>
struct Line {
    static __device__ constexpr int vectors(int elements) { return (elements + V - 1) / V; }

    // Columns before the first pixel: whole vectors where that costs no extra read.
    static constexpr int WHOLE = vectors(K / 2) * V;
    static constexpr bool FREE = vectors(V + K - 1 + WHOLE - K / 2) == vectors(V + K - 1);
    static constexpr int MARGIN = FREE ? WHOLE : K / 2;
    // What lies before the first tap in the vectors that a thread reads, and how many it reads.
    static constexpr int SKIPPED = MARGIN - K / 2;
    static constexpr int READ = vectors(V + K - 1 + SKIPPED);
};

// What a row of K taps reads in V neighbouring windows: tap kx of window e at SKIPPED + kx + e.
template <int K, int V, typename T>
__device__ inline void read_staged(const T* line, computed_t<T> (&values)[Line<K, V>::READ * V]) {
#pragma unroll
    for (int part = 0; part < Line<K, V>::READ; ++part)
        load<V>(line + part * V, *reinterpret_cast<computed_t<T>(*)[V]>(values + part * V));
}

template <typename T, bool REFLECT, int K, int V>
__global__ void __launch_bounds__(THREADS)
    aggregation_same(const T* x, Strides sx, const T* w, T* out, Strides so, Window window,
                     Deal deal, int x_vector) {
    using A = computed_t<T>;
    using L = Line<K, V>;
    extern __shared__ double shared[];
    const int width = window.width, plane = window.height * width, lines = deal.rows + K - 1;
    const Tile tile(deal, window.height, V);
    const Ring<T, K, V> ring(shared);
    const Staged<T, L::MARGIN> staged(ring.end(shared), deal);
    const long long shared_by = deal.weight_channels.divisor;  // apart are channels of one weight
    staged.template copy<REFLECT>(x_vector, x + tile.n * sx.n + tile.weight_channel * sx.c,
                                  shared_by * sx.c, sx, window, deal, tile.top - K / 2, lines);
    end_group();
    const T* weights = w + (tile.n * shared_by + tile.weight_channel) * K * K * plane +
                       tile.row * width + tile.column;
    const auto fetch = [&](int ky) {
        if (ky < K && tile.active)
            ring.fetch(ky % STAGES, weights + static_cast<long long>(ky) * K * plane, plane);
        end_group();
    };
#pragma unroll
    for (int ky = 0; ky < STAGES - 1; ++ky) fetch(ky);
    wait_for_groups<STAGES - 1>();
    staged.template finish<REFLECT, K / 2>(lines, width);
    if (!tile.active) return;
    A sums[CHANNELS][V] = {};
    const T* line = staged.data + (tile.row - tile.top) * staged.pitch + tile.column;
#pragma unroll 1
    for (int ky = 0; ky < K; ++ky, line += staged.pitch) {
        fetch(ky + STAGES - 1);
        wait_for_groups<STAGES - 1>();
        A weight[K][V];
#pragma unroll
        for (int kx = 0; kx < K; ++kx) load<V>(ring.at(ky % STAGES, kx), weight[kx]);
#pragma unroll
        for (int g = 0; g < CHANNELS; ++g) {
            A values[L::READ * V];
            read_staged<K, V>(line + g * staged.plane_pitch, values);
#pragma unroll
            for (int kx = 0; kx < K; ++kx)
#pragma unroll
                for (int e = 0; e < V; ++e)
                    sums[g][e] += weight[kx][e] * values[L::SKIPPED + kx + e];
        }
    }
    T* to = out + tile.n * so.n + tile.weight_channel * so.c + tile.row * so.h + tile.column * so.w;
#pragma unroll
    for (int g = 0; g < CHANNELS; ++g)
        if (g < deal.group) store_row<V>(to + g * shared_by * so.c, so.w, sums[g]);
}

template <typename T, bool REFLECT, int K, int V>
__global__ void __launch_bounds__(THREADS)
    aggregation_weight_gradient_same(const T* grad, Strides sg, const T* x, Strides sx, T* grad_w,
                                     Window window, Deal deal, int x_vector) {
    using A = computed_t<T>;
    using L = Line<K, V>;
    extern __shared__ double shared[];
    const int width = window.width, plane = window.height * width, lines = deal.rows + K - 1;
    const Tile tile(deal, window.height, V);
    const Staged<T, L::MARGIN> staged(shared, deal);
    const long long shared_by = deal.weight_channels.divisor;
    staged.template copy<REFLECT>(x_vector, x + tile.n * sx.n + tile.weight_channel * sx.c,
                                  shared_by * sx.c, sx, window, deal, tile.top - K / 2, lines);
    end_group();
    A slopes[CHANNELS][V] = {};
    if (tile.active) {
        const T* from = grad + tile.n * sg.n + tile.weight_channel * sg.c + tile.row * sg.h +
                        tile.column * sg.w;
#pragma unroll
        for (int g = 0; g < CHANNELS; ++g)
            if (g < deal.group) load_row<V>(from + g * shared_by * sg.c, sg.w, slopes[g]);
    }
    wait_for_groups<0>();
    staged.template finish<REFLECT, K / 2>(lines, width);
    if (!tile.active) return;
    T* to = grad_w + (tile.n * shared_by + tile.weight_channel) * K * K * plane +
            tile.row * width + tile.column;
    const T* line = staged.data + (tile.row - tile.top) * staged.pitch + tile.column;
#pragma unroll 1
    for (int ky = 0; ky < K; ++ky, line += staged.pitch) {
        A sums[K][V] = {};
#pragma unroll
        for (int g = 0; g < CHANNELS; ++g) {
            A values[L::READ * V];
            read_staged<K, V>(line + g * staged.plane_pitch, values);
#pragma unroll
            for (int kx = 0; kx < K; ++kx)
#pragma unroll
                for (int e = 0; e < V; ++e)
                    sums[kx][e] += slopes[g][e] * values[L::SKIPPED + kx + e];
        }
#pragma unroll
        for (int kx = 0; kx < K; ++kx)
            store<V>(to + static_cast<long long>(ky * K + kx) * plane, sums[kx]);
    }
}

template <typename T, bool REFLECT, int K, int V>
__global__ void __launch_bounds__(GRADIENT_THREADS, 6)
    aggregation_input_gradient_same(const T* grad, Strides sg, const T* w, T* grad_x, Strides sx,
                                    Window window, Deal deal, int grad_vector) {
    using A = computed_t<T>;
    extern __shared__ double shared[];
    const int width = window.width, height = window.height, plane = height * width;
    const Tile tile(deal, height, V);
    const Ring<T, K, V> ring(shared);
    const Staged<T, 0> staged(ring.end(shared), deal);
    const long long shared_by = deal.weight_channels.divisor;
    staged.template copy<false>(grad_vector, grad + tile.n * sg.n + tile.weight_channel * sg.c,
                                shared_by * sg.c, sg, window, deal, tile.top - K / 2,
                                deal.rows + K - 1);
    end_group();
    const T* weights = w + (tile.n * shared_by + tile.weight_channel) * K * K * plane + tile.column;
    // The rows of windows with a tap on this row, one (reflection, tap row) after the other.
    int which = 0, ky = -1, position = tile.row;
    bool more = tile.active;
    const auto fetch_next = [&](int slot) {
        int row = -1;
        while (more && row < 0) {
            if (++ky == K) {
                ky = 0;
                do ++which;
                while (which < IMAGES<REFLECT> &&
                       !image<REFLECT>(tile.row, height, K / 2, which, position));
                more = which < IMAGES<REFLECT>;
            }
            row = position + K / 2 - ky;
            if (!more || row >= height) row = -1;
        }
        if (row >= 0)
            ring.fetch(slot, weights + static_cast<long long>(ky) * K * plane + row * width, plane);
        end_group();
        return row;
    };
    int row = fetch_next(0);
    wait_for_groups<STAGES - 1>();
    __syncthreads();
    A sums[CHANNELS][V + K - 1] = {};
#pragma unroll 1
    for (int slot = 0; row >= 0; slot ^= 1) {
        const int next = fetch_next(slot ^ 1);
        wait_for_groups<STAGES - 1>();
        const T* line = staged.data + (row - tile.top + K / 2) * staged.pitch + tile.column;
        A slopes[CHANNELS][V];
#pragma unroll
        for (int g = 0; g < CHANNELS; ++g) load<V>(line + g * staged.plane_pitch, slopes[g]);
#pragma unroll
        for (int kx = 0; kx < K; ++kx) {
            A weight[V];
            load<V>(ring.at(slot, kx), weight);
#pragma unroll
            for (int g = 0; g < CHANNELS; ++g)
#pragma unroll
                for (int e = 0; e < V; ++e) sums[g][kx + e] += weight[e] * slopes[g][e];
        }
        row = next;
    }
    __syncthreads();  // from here on, the staged rows make way for sums
    join_columns<REFLECT, K, V, CHANNELS>(sums, reinterpret_cast<A*>(staged.data), deal.rows,
                                          tile.row - tile.top, tile.column, width, tile.active);
    if (!tile.active) return;
    T* to = grad_x + tile.n * sx.n + tile.weight_channel * sx.c + tile.row * sx.h +
            tile.column * sx.w;
#pragma unroll
    for (int g = 0; g < CHANNELS; ++g)
        if (g < deal.group) store_row<V>(to + g * shared_by * sx.c, sx.w, sums[g]);
}

// The kernels below take any windows and strides; a thread for every element of the result.

template <typename T, bool REFLECT>
__global__ void aggregation(const T* x, Strides sx, const T* w, Strides sw, T* out, Strides so,
                            Window window, int channels, int weight_channels, int chunks) {
    using A = computed_t<T>;
    const long long plane = blockIdx.x / chunks, n = plane / channels, c = plane % channels;
    const int i = blockIdx.x % chunks * blockDim.x + threadIdx.x;
    if (i >= window.windows()) return;
    const int row = i / window.out_width, column = i % window.out_width;
    const T* weights = w + n * sw.n + c % weight_channels * sw.c + i * sw.w;
    A sum = 0;
    visit_taps<REFLECT>(x + n * sx.n + c * sx.c, sx, window, row, column,
                        [&](int tap, A value) { sum += widen(weights[tap * sw.h]) * value; });
    out[n * so.n + c * so.c + row * so.h + column * so.w] = narrow<T>(sum);
}

template <typename T, bool REFLECT>
__global__ void aggregation_weight_gradient(const T* grad, Strides sg, const T* x, Strides sx,
                                            T* grad_w, Window window, int weight_channels, int group,
                                            int chunks) {
    using A = computed_t<T>;
    const int taps = window.taps();
    const long long part = blockIdx.x / chunks, plane = part / taps;
    const long long n = plane / weight_channels, c = plane % weight_channels;
    const int tap = part % taps, i = blockIdx.x % chunks * blockDim.x + threadIdx.x;
    if (i >= window.windows()) return;
    const int row = i / window.out_width, column = i % window.out_width;
    const int y = source<REFLECT>(row * window.stride - window.padding +
                                      tap / window.kernel_size * window.dilation,
                                  window.height);
    const int x_ = source<REFLECT>(column * window.stride - window.padding +
                                       tap % window.kernel_size * window.dilation,
                                   window.width);
    A sum = 0;
    if (REFLECT || (y >= 0 && x_ >= 0)) {
        const T* slopes = grad + n * sg.n + c * sg.c + row * sg.h + column * sg.w;
        const T* values = x + n * sx.n + c * sx.c + y * sx.h + x_ * sx.w;
        for (int g = 0; g < group; ++g)
            sum += widen(slopes[g * weight_channels * sg.c]) * widen(values[g * weight_channels * sx.c]);
    }
    grad_w[part * window.windows() + i] = narrow<T>(sum);
}

template <typename T, bool REFLECT>
__global__ void aggregation_input_gradient(const T* grad, Strides sg, const T* w, Strides sw,
                                           T* grad_x, Strides sx, Window window, int channels,
                                           int weight_channels, int chunks) {
    using A = computed_t<T>;
    const long long plane = blockIdx.x / chunks, n = plane / channels, c = plane % channels;
    const int i = blockIdx.x % chunks * blockDim.x + threadIdx.x;
    if (i >= window.height * window.width) return;
    const int y = i / window.width, x = i % window.width;
    const T* slopes = grad + n * sg.n + c * sg.c;
    const T* weights = w + n * sw.n + c % weight_channels * sw.c;
    A sum = 0;
    visit_windows_on<REFLECT>(y, x, window, [&](int tap, int at) {
        const int row = at / window.out_width, column = at % window.out_width;
        sum += widen(weights[tap * sw.h + at * sw.w]) * widen(slopes[row * sg.h + column * sg.w]);
    });
    grad_x[n * sx.n + c * sx.c + y * sx.h + x * sx.w] = narrow<T>(sum);
}
