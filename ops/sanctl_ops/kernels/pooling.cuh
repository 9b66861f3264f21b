// 2 x 2 max-pooling with stride 2 of (N, H, W, C) tensors.
#pragma once

#include "channels.cuh"
#include "window.cuh"

// Windows of all images, numbered row by row; laid out as POOL in pooling.py.
struct Pool {
    Divisor across, down;  // windows in a row, rows of windows
    int height, width;     // of the images
    unsigned windows;

    // The number of a window's first pixel; its image, row and column too.
    __device__ unsigned corner(unsigned window, unsigned& n, int& row, int& column) const {
        n = window;
        column = across.divide(n);
        row = down.divide(n);
        return (n * height + 2 * row) * width + 2 * column;
    }

    __device__ unsigned corner(unsigned window) const {
        unsigned n;
        int row, column;
        return corner(window, n, row, column);
    }
};

// Whether a later value of a window is taken, as torch's max_pool2d does: if it is larger, or NaN.
__device__ inline bool surpasses(float value, float most) { return value > most || value != value; }
