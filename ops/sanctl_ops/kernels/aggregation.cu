// out[n, c, i] = sum_j w[n, c % Cw, j, i] * x[n, c, nbr(i, j)] and its two gradients.
//
// The kernels named *_same take windows of stride 1 and padding K / 2 and contiguous weights. Their
// blocks run over (image, weight channel, tile of rows); threads own V neighbouring pixels of a row
// and serve all channels that share a weight, so that every weight is read or written once.
#include "window_gradient.cuh"

// The channels that one pass over the weights serves: each keeps its sums in registers.
constexpr int CHANNELS_AT_ONCE = 8;

struct Tile {
    long long n;
    int weight_channel, top;  // `top` is the first row of the tile
    int row, column;          // this thread's row of the plane and the first of its V columns
    bool active;              // whether that row is one of the plane

    __device__ Tile(int weight_channels, int tiles, int rows, int width, int height, int v) {
        const long long part = blockIdx.x / tiles;
        const int vectors = width / v;
        n = part / weight_channels;
        weight_channel = part % weight_channels;
        top = blockIdx.x % tiles * rows;
        row = top + threadIdx.x / vectors;
        column = threadIdx.x % vectors * v;
        active = threadIdx.x < rows * vectors && row < height;
    }
};

// A line of the staged tile, in elements: what the last thread reads, V at a time.
template <int K, int V>
__device__ inline int staged_width(int width) {
    return width - V + (V + K - 2) / V * V + V;
}

// Copies lines of `group` planes, all of `lines` from row `first` on, into shared memory, at column
// `margin` of lines of `pitch` elements. Rows outside the plane are reflected or zero. Threads own V
// columns, and have several loads under way before they wait for the first.
template <bool REFLECT, int V, typename T, typename A>
__device__ inline void stage(const T* planes, long long plane_stride, const Strides& strides,
                             const Window& window, int group, int first, int lines, int rows,
                             int margin, int pitch, A* staged) {
    constexpr int AT_ONCE = 4;
    const int vectors = window.width / V;
    const int own_line = threadIdx.x / vectors, column = threadIdx.x % vectors * V;
    if (own_line >= rows) return;
    int g = 0, line = own_line;
    while (g < group) {
        A values[AT_ONCE][V];
        int to[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            to[k] = -1;
            if (g < group) {
                to[k] = (g * lines + line) * pitch + margin + column;
                const int y = source<REFLECT>(first + line, window.height);
                // Rows below the last tile's windows are not used; they only must not be read.
                if (y >= 0 && y < window.height)
                    load_row<V>(planes + g * plane_stride + y * strides.h + column * strides.w,
                                strides.w, values[k]);
                else
#pragma unroll
                    for (int e = 0; e < V; ++e) values[k][e] = 0;
            }
            line += rows;
            if (line >= lines) {
                line -= lines;
                ++g;
            }
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k)
            if (to[k] >= 0)
#pragma unroll
                for (int e = 0; e < V; ++e) staged[to[k] + e] = values[k][e];
    }
}

// Fills the margins of K / 2 columns on both sides of staged lines.
template <bool REFLECT, int K, typename A>
__device__ inline void fill_margins(A* staged, int lines, int width, int pitch) {
    for (int i = threadIdx.x; i < lines * (K - 1); i += blockDim.x) {
        const int side = i % (K - 1);
        const int column = side < K / 2 ? side : width + side;
        const int from = source<REFLECT>(column - K / 2, width);
        A* line = staged + i / (K - 1) * pitch;
        line[column] = from >= 0 ? line[from + K / 2] : A(0);
    }
}

// Stages the rows of x that a tile's windows reach, padding included, for all `group` channels.
template <bool REFLECT, int K, int V, typename T, typename A>
__device__ inline void stage_windows(const T* x, const Strides& strides, const Window& window,
                                     int weight_channels, int group, int top, int rows, A* staged) {
    const int lines = rows + K - 1, pitch = staged_width<K, V>(window.width);
    stage<REFLECT, V>(x, weight_channels * strides.c, strides, window, group, top - K / 2, lines,
                      rows, K / 2, pitch, staged);
    __syncthreads();
    fill_margins<REFLECT, K>(staged, group * lines, window.width, pitch);
    __syncthreads();
}

// What a row of K taps reads in V neighbouring windows.
template <int K, int V, typename A>
__device__ inline void read_staged(const A* line, A (&values)[(V + K - 2) / V * V + V]) {
#pragma unroll
    for (int part = 0; part <= (V + K - 2) / V; ++part) {
        const auto vector = *reinterpret_cast<const Vector<A, V>*>(line + part * V);
#pragma unroll
        for (int e = 0; e < V; ++e) values[part * V + e] = vector.at[e];
    }
}

template <typename T, bool REFLECT, int K, int V>
__global__ void aggregation_same(const T* x, Strides sx, const T* w, T* out, Strides so,
                                 Window window, int weight_channels, int group, int tiles,
                                 int rows) {
    using A = computed_t<T>;
    extern __shared__ double shared[];
    A* staged = reinterpret_cast<A*>(shared);
    const int width = window.width, height = window.height, plane = height * width;
    const Tile tile(weight_channels, tiles, rows, width, height, V);
    stage_windows<REFLECT, K, V>(x + tile.n * sx.n + tile.weight_channel * sx.c, sx, window,
                                 weight_channels, group, tile.top, rows, staged);
    if (!tile.active) return;
    const int pitch = staged_width<K, V>(width), lines = rows + K - 1;
    const T* weights = w + (tile.n * weight_channels + tile.weight_channel) * K * K * plane +
                       tile.row * width + tile.column;
    for (int first = 0; first < group; first += CHANNELS_AT_ONCE) {
        A sums[CHANNELS_AT_ONCE][V] = {};
#pragma unroll 1
        for (int ky = 0; ky < K; ++ky) {
            A weight[K][V];
#pragma unroll
            for (int kx = 0; kx < K; ++kx)
                load<V>(weights + static_cast<long long>(ky * K + kx) * plane, weight[kx]);
            const A* line = staged + (first * lines + tile.row - tile.top + ky) * pitch + tile.column;
#pragma unroll
            for (int g = 0; g < CHANNELS_AT_ONCE; ++g) {
                if (first + g >= group) break;
                A values[(V + K - 2) / V * V + V];
                read_staged<K, V>(line + g * lines * pitch, values);
#pragma unroll
                for (int kx = 0; kx < K; ++kx)
#pragma unroll
                    for (int e = 0; e < V; ++e) sums[g][e] += weight[kx][e] * values[kx + e];
            }
        }
#pragma unroll
        for (int g = 0; g < CHANNELS_AT_ONCE; ++g) {
            if (first + g >= group) break;
            const long long c = tile.weight_channel + (first + g) * weight_channels;
            store_row<V>(out + tile.n * so.n + c * so.c + tile.row * so.h + tile.column * so.w, so.w,
                         sums[g]);
        }
    }
}

template <typename T, bool REFLECT, int K, int V>
__global__ void aggregation_weight_gradient_same(const T* grad, Strides sg, const T* x, Strides sx,
                                                 T* grad_w, Window window, int weight_channels,
                                                 int group, int tiles, int rows) {
    using A = computed_t<T>;
    extern __shared__ double shared[];
    A* staged = reinterpret_cast<A*>(shared);
    const int width = window.width, height = window.height, plane = height * width;
    const Tile tile(weight_channels, tiles, rows, width, height, V);
    stage_windows<REFLECT, K, V>(x + tile.n * sx.n + tile.weight_channel * sx.c, sx, window,
                                 weight_channels, group, tile.top, rows, staged);
    if (!tile.active) return;
    const int pitch = staged_width<K, V>(width), lines = rows + K - 1;
    const T* from = grad + tile.n * sg.n + tile.weight_channel * sg.c + tile.row * sg.h +
                    tile.column * sg.w;
    T* to = grad_w + (tile.n * weight_channels + tile.weight_channel) * K * K * plane +
            tile.row * width + tile.column;
#pragma unroll 1
    for (int ky = 0; ky < K; ++ky) {
        A sums[K][V] = {};
        const A* line = staged + (tile.row - tile.top + ky) * pitch + tile.column;
#pragma unroll 4
        for (int g = 0; g < group; ++g) {
            A slope[V], values[(V + K - 2) / V * V + V];
            load_row<V>(from + static_cast<long long>(g) * weight_channels * sg.c, sg.w, slope);
            read_staged<K, V>(line + g * lines * pitch, values);
#pragma unroll
            for (int kx = 0; kx < K; ++kx)
#pragma unroll
                for (int e = 0; e < V; ++e) sums[kx][e] += slope[e] * values[kx + e];
        }
#pragma unroll
        for (int kx = 0; kx < K; ++kx)
            store<V>(to + static_cast<long long>(ky * K + kx) * plane, sums[kx]);
    }
}

template <typename T, bool REFLECT, int K, int V>
__global__ void __launch_bounds__(256, 2)
    aggregation_input_gradient_same(const T* grad, Strides sg, const T* w, T* grad_x, Strides sx,
                                    Window window, int weight_channels, int group, int tiles,
                                    int rows) {
    using A = computed_t<T>;
    extern __shared__ double shared[];
    const int width = window.width, height = window.height, plane = height * width;
    const int lines = rows + K - 1, line_width = width + K - 1;
    const Tile tile(weight_channels, tiles, rows, width, height, V);
    A* staged = reinterpret_cast<A*>(shared);
    A* joined = staged + CHANNELS_AT_ONCE * lines * width;
    const T* weights =
        w + (tile.n * weight_channels + tile.weight_channel) * K * K * plane + tile.column;
    for (int first = 0; first < group; first += CHANNELS_AT_ONCE) {
        const int channels = min(group - first, CHANNELS_AT_ONCE);
        const T* slopes = grad + tile.n * sg.n +
                          (tile.weight_channel + static_cast<long long>(first) * weight_channels) * sg.c;
        __syncthreads();
        stage<false, V>(slopes, weight_channels * sg.c, sg, window, channels, tile.top - K / 2, lines,
                        rows, 0, width, staged);
        __syncthreads();
        A sums[CHANNELS_AT_ONCE][V + K - 1] = {};
#pragma unroll 1
        for (int which = 0; which < IMAGES<REFLECT>; ++which) {
            int position;
            if (!tile.active || !image<REFLECT>(tile.row, height, K / 2, which, position)) continue;
#pragma unroll 1
            for (int ky = 0; ky < K; ++ky) {
                const int row = position + K / 2 - ky;
                if (row < 0 || row >= height) continue;
                A weight[K][V];
#pragma unroll
                for (int kx = 0; kx < K; ++kx)
                    load<V>(weights + static_cast<long long>(ky * K + kx) * plane + row * width,
                            weight[kx]);
                const A* line = staged + (row - tile.top + K / 2) * width + tile.column;
#pragma unroll
                for (int g = 0; g < CHANNELS_AT_ONCE; ++g) {
                    if (g >= channels) break;
                    A slope[V];
                    load<V>(line + g * lines * width, slope);
#pragma unroll
                    for (int kx = 0; kx < K; ++kx)
#pragma unroll
                        for (int e = 0; e < V; ++e) sums[g][kx + e] += weight[kx][e] * slope[e];
                }
            }
        }
#pragma unroll
        for (int g = 0; g < CHANNELS_AT_ONCE; ++g) {
            if (g >= channels) break;
            __syncthreads();
            for (int i = threadIdx.x; i < rows * line_width; i += blockDim.x) joined[i] = 0;
            __syncthreads();
            join_columns<REFLECT, K, V>(sums[g], joined + (tile.row - tile.top) * line_width,
                                        tile.column, width, tile.active);
            if (!tile.active) continue;
            const long long c = tile.weight_channel + (first + g) * weight_channels;
            store_row<V>(grad_x + tile.n * sx.n + c * sx.c + tile.row * sx.h + tile.column * sx.w,
                         sx.w, sums[g]);
        }
    }
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
    visit_taps<REFLECT, 0, 1>(x + n * sx.n + c * sx.c, sx, window, row, column,
                              [&](int tap, const A* value) {
                                  sum += widen(weights[tap * sw.h]) * *value;
                              });
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
