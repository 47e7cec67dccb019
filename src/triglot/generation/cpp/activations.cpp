// What a feed-forward layer does between its products (`layers/activations.py`): each number's is its own.
//
// Given: the types Input and Output, float or BFloat16, OPEN, the function below of that name, and GATED, 1 where a row's
// second half is multiplied by what becomes of its first, 0 where that is all there is.

#include "vectors.h"

namespace {

// Below -80 nothing, where the power of e would be too large.
Floats sigmoid(Floats x) { return x < -80 ? Floats{} : 1 / (1 + exponential(-x)); }

Floats relu(Floats x) { return x < 0 ? Floats{} : x; }

Floats silu(Floats x) { return x * sigmoid(x); }

// x · (1 + tanh √(2/π)(x + 0.044715 x³)) / 2 (Hendrycks & Gimpel 2016), where (1 + tanh z) / 2 = σ(2z).
Floats gelu_tanh(Floats x) { return x * sigmoid(1.5957691216f * (x + .044715f * x * x * x)); }

// x · (1 + erf(x/√2)) / 2, where erfc(z) is a polynomial of t = 1 / (1 + 0.3275911 z) by e^(-z²) (Abramowitz & Stegun
// 1964, 7.1.26), to within 1.5e-7.
Floats gelu(Floats x) {
    const Floats z = (x < 0 ? -x : x) * .70710678118f, t = 1 / (1 + .3275911f * z);
    const Floats rest = 1.421413741f + t * (-1.453152027f + t * 1.061405429f);
    const Floats series = t * (.254829592f + t * (-.284496736f + t * rest));
    const Floats half = .5f * series * exponential(-z * z);  // of what lies beyond |x|
    return x * (x < 0 ? half : 1 - half);
}

}  // namespace

// Rows of `width` numbers, a multiple of LANES, from rows `stride` numbers apart, twice as wide where GATED is.
extern "C" void activate(const Input* x, Output* y, int64_t rows, int64_t width, int64_t stride, int64_t threads) {
#pragma omp parallel for num_threads(threads) collapse(2)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t at = 0; at < width; at += LANES) {
            Floats opened = OPEN(load(x + row * stride + at));
            if (GATED) opened *= load(x + row * stride + width + at);
            store(y + row * width + at, opened, LANES);
        }
}
