// The largest of each block of numbers, and their sum: `powers.py` compiles this.
//
// Given: SIZE, the numbers of a block, a multiple of LANES.

#include "vectors.h"

extern "C" void of_blocks(const BFloat16* values, float* maxima, float* sums, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block++) {
        Floats most = load(values + block * SIZE), sum = most;
        for (int at = LANES; at < SIZE; at += LANES) {
            const Floats some = load(values + block * SIZE + at);
            most = larger(most, some);
            sum += some;
        }
        maxima[block] = largest(most);
        sums[block] = total(sum);
    }
}
