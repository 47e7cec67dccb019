// Vectors of numbers as the kernels of this folder compute with them, of floats and of bf16 in memory. They are those of
// GCC and Clang, for any processor. Given: LANES, the numbers that are computed side by side.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct BFloat16 {
    uint16_t bits;  // the upper half of a float
};

template <class To, class From> To as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class Vector, class T> Vector read(const T* at) {
    Vector vector;
    std::memcpy(&vector, at, sizeof vector);
    return vector;
}

float number(float x) { return x; }
float number(BFloat16 x) { return as<float>(uint32_t(x.bits) << 16); }

Floats load(const float* at) { return read<Floats>(at); }
Floats load(const BFloat16* at) { return as<Floats>(__builtin_convertvector(read<Halves>(at), Words) << 16); }

void store(float* at, Floats x, int count) { std::memcpy(at, &x, count * sizeof *at); }
void store(BFloat16* at, Floats x, int count) {  // rounded to the nearest, half to even
    Words bits = as<Words>(x);
    bits = x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : Words{} + 0x7fc0;  // some NaN would become 0
    Halves upper = __builtin_convertvector(bits, Halves);
    std::memcpy(at, &upper, count * sizeof *at);
}

float lane(const Floats& x, int at) { return reinterpret_cast<const float*>(&x)[at]; }  // vectors alias their numbers

Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// e to the power of numbers up to 80, below −80 nothing: 2^n · e^r with r = x − n·log 2, of at most 0.35, for which the
// first terms of the series are enough.
Floats exponential(Floats x) {
    const float rounder = 1.5f * (1 << 23), log2 = 0.693147180559945f;  // numbers beside the former are whole
    Floats n = (x * (1 / log2) + rounder) - rounder;
    Floats r = (x * (1 / log2) - n) * log2;
    Floats power = r * (1.f / 720) + (1.f / 120);
    power = power * r + (1.f / 24);
    power = power * r + (1.f / 6);
    power = power * r + .5f;
    power = power * r + 1;
    power = power * r + 1;
    Words scaled = as<Words>(power) + (as<Words>(__builtin_convertvector(n, Integers)) << 23);
    return x < -80 ? Floats{} : as<Floats>(scaled);  // and NaN stays NaN
}

float total(Floats x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) x[lane] += x[lane + half];
    return x[0];
}

float largest(Floats x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) x[lane] = x[lane] > x[lane + half] ? x[lane] : x[lane + half];
    return x[0];
}

}  // namespace
