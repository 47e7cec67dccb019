// x Wᵀ + b in whole numbers, each row rounded to bytes as it comes; negative numbers become 0 where that is asked for.
// `int8.py` compiles this for one number of inputs.
//
// Given: WIDTH, the numbers of a row, a multiple of LANES, VNNI, and TILES, 1 where many rows may be multiplied by tiles,
// for which WIDTH is a multiple of 64. Whole sums are the same by all ways.

#include <algorithm>
#include <optional>

#include "bytes.h"
#if TILES && defined(__AMX_INT8__)  // which older compilers know nothing of
#define BY_TILES
#include "tiles.h"
#endif

namespace {

constexpr int ROWS = 32, COLUMNS = SIDE * LANES;  // that are multiplied while weights are read once, and of outputs
constexpr int FEW = 8;  // rows that tiles would not pay for

}  // namespace

extern "C" void linear(const int8_t* weights, const int32_t* starts, const float* scales, const float* bias,
                       int64_t outputs, const float* x, float* to, int64_t count, int64_t relu, int64_t threads) {
    RowsOfBytes<WIDTH> rows(count, ROWS);
    const int64_t groups = (count + ROWS - 1) / ROWS, columns = outputs / COLUMNS;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t row = 0; row < count; row++) rows.round(row, x + row * WIDTH);
#ifdef BY_TILES
        std::optional<Tiles> tiles;
        if (count > FEW) tiles.emplace();
#endif
#pragma omp for
        for (int64_t part = 0; part < groups * columns; part++) {
            const int64_t begin = part / columns * ROWS, first = part % columns * COLUMNS;
            const int some = std::min<int64_t>(ROWS, count - begin);
            const auto finish = [&](int row, int side, Floats sums) {
                if (row >= some) return;
                const int64_t at = first + side * LANES;
                Floats y = sums * (load(scales + at) * rows.steps[begin + row]) + load(bias + at);
                if (relu) y = y < 0 ? Floats{} : y;
                store(to + (begin + row) * outputs + at, y, LANES);
            };
            const uint8_t* bytes = rows.bytes.get() + begin * WIDTH;
#ifdef BY_TILES
            if (some > FEW) {
                int32_t sums[ROWS][COLUMNS];
                multiply_tiles<WIDTH>(bytes, weights + first * WIDTH, starts + first, sums[0]);
                for (int row = 0; row < some; row++)
                    for (int side = 0; side < SIDE; side++)
                        finish(row, side, __builtin_convertvector(read<Integers>(sums[row] + side * LANES), Floats));
                continue;
            }
#endif
            if (some == 1)
                multiply_bytes<WIDTH, 1>(bytes, some, weights + first * WIDTH, starts + first, finish);
            else
                multiply_bytes<WIDTH, SOME>(bytes, some, weights + first * WIDTH, starts + first, finish);
        }
    }
}
