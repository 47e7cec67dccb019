// Products by the instructions for tiles of numbers in bf16 and of bytes (Intel's AMX).

#pragma once

#include <immintrin.h>

#include "vectors.h"

namespace {

// Has tiles of 16 rows of 64 bytes while it lives, and leaves them as they were.
class Tiles {
    struct alignas(64) Config {
        uint8_t palette = 0, first = 0, unused[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    };
    Config before;

  public:
    // What the intrinsics read and write is more than compilers are told.
    Tiles() {
        asm volatile("" ::: "memory");
        _tile_storeconfig(&before);
        asm volatile("" ::: "memory");
        Config own;
        own.palette = 1;
        for (int tile = 0; tile < 8; tile++) {
            own.bytes[tile] = 64;
            own.rows[tile] = 16;
        }
        asm volatile("" ::: "memory");
        _tile_loadconfig(&own);
    }

    ~Tiles() {
        asm volatile("" ::: "memory");
        if (before.palette)
            _tile_loadconfig(&before);
        else
            _tile_release();
    }
};

// The products of 32 rows of INPUTS numbers with 32 outputs; those of LANES outputs lie together, an input's and the
// next one's side by side.
template <int INPUTS> void multiply_tiles(const BFloat16* rows, const BFloat16* weights, float* to, int64_t stride) {
    const BFloat16* others = weights + LANES * INPUTS;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int at = 0; at < INPUTS; at += 32) {
        _tile_loadd(4, rows + at, 2 * INPUTS);
        _tile_loadd(5, rows + 16 * INPUTS + at, 2 * INPUTS);
        _tile_loadd(6, weights + at * LANES, 64);
        _tile_loadd(7, others + at * LANES, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, to, 4 * stride);
    _tile_stored(1, to + LANES, 4 * stride);
    _tile_stored(2, to + 16 * stride, 4 * stride);
    _tile_stored(3, to + 16 * stride + LANES, 4 * stride);
}

// The same of rows of bytes, four inputs side by side, with what sums begin with.
template <int INPUTS> void multiply_tiles(const uint8_t* rows, const int8_t* weights, const int32_t* starts, int32_t* to) {
    const int8_t* others = weights + LANES * INPUTS;
    _tile_loadd(0, starts, 0);
    _tile_loadd(1, starts + LANES, 0);
    _tile_loadd(2, starts, 0);
    _tile_loadd(3, starts + LANES, 0);
    for (int at = 0; at < INPUTS; at += 64) {
        _tile_loadd(4, rows + at, INPUTS);
        _tile_loadd(5, rows + 16 * INPUTS + at, INPUTS);
        _tile_loadd(6, weights + at * LANES, 64);
        _tile_loadd(7, others + at * LANES, 64);
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
    _tile_stored(0, to, 8 * LANES);
    _tile_stored(1, to + LANES, 8 * LANES);
    _tile_stored(2, to + 32 * LANES, 8 * LANES);
    _tile_stored(3, to + 33 * LANES, 8 * LANES);
    asm volatile("" ::: "memory");
}

}  // namespace
