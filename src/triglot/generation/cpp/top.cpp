// The COUNT largest logits of each row, falling, ties by lower id, and Σ e^logit of all: logits are products of rows with
// a projection's weights, a bias added, and leave the cache never. `top.py` compiles this for one model.
//
// Given: WIDTH, the numbers of a row, a multiple of 32, COUNT, and TILED: 1 where rows and weights are bf16 and tiles of
// them are multiplied by the processor, 0 where they are floats.

#include <limits>
#include <vector>

#if TILED
#include "tiles.h"
#endif
#include "vectors.h"

namespace {

constexpr int ROWS = 32, COLUMNS = 128;  // of logits that are made at a time: they stay in the first cache
constexpr int TILES = COLUMNS / LANES;

struct Best {
    float values[COUNT];
    int64_t ids[COUNT] = {};

    Best() {
        for (float& value : values) value = -std::numeric_limits<float>::infinity();
    }

    float least() const { return values[COUNT - 1]; }

    void insert(float value, int64_t id) {
        int at = COUNT - 1;
        for (; at > 0 && values[at - 1] < value; at--) {
            values[at] = values[at - 1];
            ids[at] = ids[at - 1];
        }
        values[at] = value;
        ids[at] = id;
    }
};

// The products of ROWS rows with COLUMNS outputs' weights. Those of LANES outputs lie together, input by input.
#if TILED
typedef BFloat16 Number;

void multiply(const Number* rows, const Number* weights, float* logits) {
    for (int tile = 0; tile < TILES; tile += 2)
        multiply_tiles<WIDTH>(rows, weights + tile * LANES * WIDTH, logits + tile * LANES, COLUMNS);
}
#else
typedef float Number;
struct Tiles {};

void multiply(const Number* rows, const Number* weights, float* logits) {
    constexpr int SOME = LANES / 2, SIDE = 2;  // rows and vectors of outputs whose sums are taken at a time, in registers
    for (int tile = 0; tile < TILES; tile += SIDE)
        for (int first = 0; first < ROWS; first += SOME) {
            Floats sums[SOME][SIDE] = {};
            for (int at = 0; at < WIDTH; at++)
                for (int side = 0; side < SIDE; side++) {
                    const Floats inputs = load(weights + ((tile + side) * WIDTH + at) * LANES);
                    for (int row = 0; row < SOME; row++) sums[row][side] += rows[(first + row) * WIDTH + at] * inputs;
                }
            for (int row = 0; row < SOME; row++)
                for (int side = 0; side < SIDE; side++)
                    store(logits + (first + row) * COLUMNS + (tile + side) * LANES, sums[row][side], LANES);
        }
}
#endif

bool any(Integers mask) {
    uint64_t parts[sizeof mask / 8], found = 0;
    std::memcpy(parts, &mask, sizeof mask);
    for (uint64_t part : parts) found |= part;
    return found;
}

struct State {
    Best best;
    Floats sums{};

    // What a row's logits from a column on add.
    void read(const float* logits, const float* bias, int64_t first) {
        Floats some[TILES], most, sum = sums;
        for (int tile = 0; tile < TILES; tile++) {
            some[tile] = load(logits + tile * LANES) + load(bias + tile * LANES);
            most = tile ? larger(most, some[tile]) : some[tile];
            sum += exponential(some[tile]);
        }
        sums = sum;
        if (!any(most > best.least())) return;
        for (int tile = 0; tile < TILES; tile++)
            if (any(some[tile] > best.least()))
                for (int lane = 0; lane < LANES; lane++)
                    if (some[tile][lane] > best.least()) best.insert(some[tile][lane], first + tile * LANES + lane);
    }
};

}  // namespace

extern "C" void top(const Number* rows, const Number* weights, const float* bias, float* values, int64_t* ids,
                    float* sums, int64_t groups, int64_t columns, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t thread = 0; thread < threads; thread++) {
        const int64_t begin = groups * thread / threads * ROWS, end = groups * (thread + 1) / threads * ROWS;
        [[maybe_unused]] const Tiles tiles;
        alignas(64) float logits[ROWS * COLUMNS];
        std::vector<State> states(end - begin);
        for (int64_t first = 0; first < columns; first += COLUMNS)  // so that weights are read once
            for (int64_t row = begin; row < end; row += ROWS) {
                multiply(rows + row * WIDTH, weights + first * WIDTH, logits);
                for (int one = 0; one < ROWS; one++)
                    states[row - begin + one].read(logits + one * COLUMNS, bias + first, first);
            }
        for (int64_t row = begin; row < end; row++) {
            const State& state = states[row - begin];
            for (int rank = 0; rank < COUNT; rank++) {
                values[row * COUNT + rank] = state.best.values[rank];
                ids[row * COUNT + rank] = state.best.ids[rank];
            }
            sums[row] = total(state.sums);
        }
    }
}
