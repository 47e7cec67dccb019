// The COUNT largest logits of each row, falling, ties by lower id, and Σ e^logit of all: logits are products of rows with
// a projection's weights, a bias added, and leave the cache never. `top.py` compiles this for one model.
//
// Given: WIDTH, the numbers of a row, a multiple of 32, COUNT, and BITS of what is multiplied: 32 where rows and weights
// are floats, 16 where they are bf16, tiles of which the processor multiplies, 8 where weights are bytes and rows become
// such (VNNI: see bytes.h).

#include <limits>
#include <vector>

#if BITS == 16
#include "tiles.h"
#elif BITS == 8
#include "bytes.h"
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

// Each of the following has a thread's rows, and multiplies ROWS of them with COLUMNS outputs' weights. Those of LANES
// outputs lie together, input by input.
#if BITS == 16
typedef BFloat16 Number;
typedef BFloat16 Weight;

class Products {
    const Tiles tiles;
    const BFloat16 *rows, *weights;

  public:
    Products(const BFloat16* rows, int64_t, const BFloat16* weights, const int32_t*, const float*)
        : rows(rows), weights(weights) {}

    void multiply(int64_t row, int64_t column, float* logits) const {
        for (int at = 0; at < COLUMNS; at += 2 * LANES)
            multiply_tiles<WIDTH>(rows + row * WIDTH, weights + (column + at) * WIDTH, logits + at, COLUMNS);
    }
};
#elif BITS == 8
typedef float Number;
typedef int8_t Weight;

class Products {
    RowsOfBytes<WIDTH> rounded;
    const int8_t* weights;
    const int32_t* starts;
    const float* scales;

  public:
    Products(const float* rows, int64_t count, const int8_t* weights, const int32_t* starts, const float* scales)
        : rounded(count), weights(weights), starts(starts), scales(scales) {
        for (int64_t row = 0; row < count; row++) rounded.round(row, rows + row * WIDTH);
    }

    void multiply(int64_t row, int64_t column, float* logits) const {
        for (int at = 0; at < COLUMNS; at += SIDE * LANES) {
            const int64_t first = column + at;
            const auto finish = [&](int one, int side, Floats sums) {
                const Floats scale = load(scales + first + side * LANES) * rounded.steps[row + one];
                store(logits + one * COLUMNS + at + side * LANES, sums * scale, LANES);
            };
            const uint8_t* bytes = rounded.bytes.get() + row * WIDTH;
            multiply_bytes<WIDTH>(bytes, ROWS, weights + first * WIDTH, starts + first, finish);
        }
    }
};
#else
typedef float Number;
typedef float Weight;

class Products {
    static constexpr int SOME = LANES / 2, SIDE = 2;  // rows and vectors of outputs whose sums are held in registers
    const float *rows, *weights;

  public:
    Products(const float* rows, int64_t, const float* weights, const int32_t*, const float*)
        : rows(rows), weights(weights) {}

    void multiply(int64_t row, int64_t column, float* logits) const {
        for (int at = 0; at < COLUMNS; at += SIDE * LANES)
            for (int first = 0; first < ROWS; first += SOME)
                multiply_some(rows + (row + first) * WIDTH, weights + (column + at) * WIDTH, logits + first * COLUMNS + at);
    }

  private:
    static void multiply_some(const float* some, const float* of_outputs, float* logits) {
        Floats sums[SOME][SIDE] = {};
        for (int at = 0; at < WIDTH; at++)
            for (int side = 0; side < SIDE; side++) {
                const Floats inputs = load(of_outputs + (side * WIDTH + at) * LANES);
                for (int row = 0; row < SOME; row++) sums[row][side] += some[row * WIDTH + at] * inputs;
            }
        for (int row = 0; row < SOME; row++)
            for (int side = 0; side < SIDE; side++) store(logits + row * COLUMNS + side * LANES, sums[row][side], LANES);
    }
};
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

extern "C" void top(const Number* rows, const Weight* weights, const int32_t* starts, const float* scales,
                    const float* bias, float* values, int64_t* ids, float* sums, int64_t groups, int64_t columns,
                    int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t thread = 0; thread < threads; thread++) {
        const int64_t begin = groups * thread / threads * ROWS, end = groups * (thread + 1) / threads * ROWS;
        const Products products(rows + begin * WIDTH, end - begin, weights, starts, scales);
        alignas(64) float logits[ROWS * COLUMNS];
        std::vector<State> states(end - begin);
        for (int64_t first = 0; first < columns; first += COLUMNS)  // so that weights are read once
            for (int64_t row = 0; row < end - begin; row += ROWS) {
                products.multiply(row, first, logits);
                for (int one = 0; one < ROWS; one++) states[row + one].read(logits + one * COLUMNS, bias + first, first);
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
