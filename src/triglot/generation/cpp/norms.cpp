// LayerNorm(x + added) (Ba et al. 2016, eq. 4), or by the root of the mean square (Zhang & Sennrich 2019, eq. 4), a row
// after another: `residual.py` compiles this for one model.
//
// Given: WIDTH, a multiple of LANES, the types Added and Read, float or BFloat16, and RMS, 1 where no mean is taken off.

#include <cmath>

#include "vectors.h"

extern "C" void normalise(const float* x, const Added* added, const float* weight, const float* bias, float eps,
                          float* full, Read* read, int64_t num_rows, int64_t threads) {
    constexpr int CHUNKS = WIDTH / LANES;
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < num_rows; row++) {
        Floats rows[CHUNKS], sum{}, squares{};
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            const int64_t at = row * WIDTH + chunk * LANES;
            rows[chunk] = load(x + at);
            if (added) rows[chunk] += load(added + at);
            sum += rows[chunk];
        }
        const float mean = RMS ? 0 : total(sum) / WIDTH;
        for (Floats& some : rows) {
            some -= mean;
            squares += some * some;
        }
        const float scale = 1 / std::sqrt(total(squares) / WIDTH + eps);
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            const int64_t at = row * WIDTH + chunk * LANES;
            Floats normed = rows[chunk] * scale * load(weight + chunk * LANES);
            if (bias) normed += load(bias + chunk * LANES);
            if (full) store(full + at, normed, LANES);
            if (read) store(read + at, normed, LANES);
        }
    }
}
