// x Wᵀ + b in whole numbers, each row rounded to bytes as it comes; negative numbers become 0 where that is asked for.
// `int8.py` compiles this for one number of inputs.
//
// Given: WIDTH, the numbers of a row, a multiple of LANES, and VNNI.

#include <algorithm>
#include <vector>

#include "bytes.h"

constexpr int ROWS = 32;  // that are multiplied while weights are read once

extern "C" void linear(const float* rows, const int8_t* weights, const int32_t* starts, const float* scales,
                       const float* bias, float* to, int64_t count, int64_t outputs, int64_t relu, int64_t threads) {
    const int64_t groups = (count + ROWS - 1) / ROWS;
#pragma omp parallel for num_threads(threads)
    for (int64_t group = 0; group < groups; group++) {
        const int64_t begin = group * ROWS;
        const int some = std::min<int64_t>(ROWS, count - begin);
        std::vector<uint8_t> bytes(ROWS * WIDTH);
        float steps[ROWS];
        for (int row = 0; row < some; row++)
            steps[row] = to_bytes<WIDTH>(rows + (begin + row) * WIDTH, bytes.data() + row * WIDTH);
        for (int64_t first = 0; first < outputs; first += SIDE * LANES)
            multiply_bytes<WIDTH>(
                bytes.data(), some, weights + first * WIDTH, starts + first, [&](int row, int side, Floats sums) {
                    if (row >= some) return;
                    const int64_t at = first + side * LANES;
                    Floats y = sums * (load(scales + at) * steps[row]) + load(bias + at);
                    if (relu) y = y < 0 ? Floats{} : y;
                    store(to + (begin + row) * outputs + at, y, LANES);
                });
    }
}
