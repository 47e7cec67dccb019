// Products in whole numbers: rows of bytes from 1 to 255, of which 128 stands for 0, with weights of bytes.
//
// Given: VNNI, 1 where the processor sums four products in 32 bits. Elsewhere it adds two in 16 bits first, for which
// weights are at most 64: 2 · 255 · 64 still fits.

#pragma once

#include <immintrin.h>

#include <memory>

#include "vectors.h"

namespace {

constexpr int BESIDE = 4;                  // numbers of a row whose products are summed by one instruction
constexpr int SOME = LANES / 2, SIDE = 2;  // rows and vectors of outputs whose sums are taken at a time, in registers

// `sums`, and in each place the sum of four products.
Integers add_products(Integers sums, Integers rows, Integers weights) {
#if VNNI
    return (Integers)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)rows, (__m512i)weights);
#elif LANES == 16
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)rows, (__m512i)weights);
    return sums + (Integers)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#else
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)rows, (__m256i)weights);
    return sums + (Integers)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
}

// The last byte of each word; `__builtin_convertvector` takes it from one word at a time.
void store_last(uint8_t* at, Words words) {
#if LANES == 16
    _mm_storeu_si128((__m128i*)at, _mm512_cvtepi32_epi8((__m512i)words));
#else
    const __m256i every_fourth = _mm256_set1_epi32(0x0c080400);  // of each half
    const __m256i last = _mm256_shuffle_epi8((__m256i)words, every_fourth);
    const int32_t both[] = {_mm256_extract_epi32(last, 0), _mm256_extract_epi32(last, 4)};
    std::memcpy(at, both, sizeof both);
#endif
}

// A row as bytes; what a byte more or less is worth. Of a row with a number that is none, that is none.
template <int INPUTS> float to_bytes(const float* row, uint8_t* bytes) {
    Floats most{}, none{};
    for (int at = 0; at < INPUTS; at += LANES) {
        const Floats x = load(row + at);
        most = larger(x < 0 ? -x : x, most);
        none += x * 0;
    }
    const float whole = largest(most), all = whole > 1e-30f ? whole : 1e-30f, scale = 127 / all;
    const float rounder = 1.5f * (1 << 23) + 128;  // numbers beside it are whole, and stand in the last bits
    for (int at = 0; at < INPUTS; at += LANES)
        store_last(bytes + at, as<Words>(load(row + at) * scale + rounder));
    return all / 127 + total(none);
}

// Rows as bytes, with room for `more` of which nothing is known.
template <int INPUTS> struct RowsOfBytes {
    std::unique_ptr<uint8_t[]> bytes;
    std::unique_ptr<float[]> steps;

    explicit RowsOfBytes(int64_t count, int64_t more = 0)
        : bytes(new uint8_t[(count + more) * INPUTS]), steps(new float[count]) {}

    void round(int64_t row, const float* from) { steps[row] = to_bytes<INPUTS>(from, bytes.get() + row * INPUTS); }
};

// The products of `count` rows, AT of them at a time, with SIDE · LANES outputs, which `finish` is given for each row and
// vector. The weights of LANES outputs lie together, BESIDE inputs of each side by side; `starts` takes off what 128 adds.
template <int INPUTS, int AT = SOME, class Finish>
void multiply_bytes(const uint8_t* rows, int count, const int8_t* weights, const int32_t* starts, Finish finish) {
    for (int first = 0; first < count; first += AT) {
        Integers sums[AT][SIDE];
        for (int row = 0; row < AT; row++)
            for (int side = 0; side < SIDE; side++) sums[row][side] = read<Integers>(starts + side * LANES);
        for (int at = 0; at < INPUTS; at += BESIDE) {
            Integers inputs[SIDE];
            for (int side = 0; side < SIDE; side++) inputs[side] = read<Integers>(weights + (side * INPUTS + at) * LANES);
            if (first == 0)  // memory brings what the next outputs have meanwhile, which rows in between would keep it from
                for (int side = 0; side < SIDE; side++)
                    __builtin_prefetch(weights + ((SIDE + side) * INPUTS + at) * LANES, 0, 2);
            for (int row = 0; row < AT; row++) {
                const Integers four = read<int32_t>(rows + (first + row) * INPUTS + at) + Integers{};
                for (int side = 0; side < SIDE; side++)
                    sums[row][side] = add_products(sums[row][side], four, inputs[side]);
            }
        }
        for (int row = 0; row < AT; row++)
            for (int side = 0; side < SIDE; side++)
                finish(first + row, side, __builtin_convertvector(sums[row][side], Floats));
    }
}

}  // namespace
