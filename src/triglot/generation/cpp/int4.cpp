// x Wᵀ of few rows by weights of four bits, GROUP inputs of which share a step and a middle: w ≈ (number − 8) · step +
// middle. Rows are rounded to bytes, GROUP numbers together; their products are summed in whole numbers, and what the
// groups come to in floats, of each row in one order. `int4.py` has the weights, and compiles this.
//
// Given: VNNI.

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <vector>

#include "bytes.h"

namespace {

constexpr int GROUP = 32;             // inputs
constexpr int HALF = GROUP / 2;       // of them lie in the lower halves of bytes, the others in the upper ones
constexpr int LOADS = HALF / BESIDE;  // vectors of such bytes that hold a group's weights of LANES outputs
constexpr int TOGETHER = 4;           // rows for which weights are taken apart once

struct Rounded {
    uint8_t bytes[GROUP];  // from −127 to 127, two's complement
    int32_t whole;         // their sum
    float step;            // what one of them is worth
};

// The groups of a row.
void to_groups(const float* row, int64_t groups, Rounded* to) {
    for (int64_t at = 0; at < groups; at++) {
        Rounded& group = to[at];
        group.step = to_bytes<GROUP>(row + at * GROUP, group.bytes);
        group.whole = 0;
        for (uint8_t& byte : group.bytes) group.whole += int8_t(byte ^= 128);
    }
}

// Some rows with SIDE · LANES outputs.
template <int ROWS>
void multiply_some(const Rounded* rows, int64_t groups, const uint8_t* weights, const uint32_t* scales, float* to,
                   int64_t outputs) {
    Floats y[ROWS][SIDE]{};
    for (int64_t at = 0; at < groups; at++) {
        Integers sums[ROWS][SIDE];
        for (int row = 0; row < ROWS; row++)
            for (int side = 0; side < SIDE; side++) sums[row][side] = Integers{} - 8 * rows[row * groups + at].whole;
        for (int load = 0; load < LOADS; load++) {
            Words both[SIDE];
            for (int side = 0; side < SIDE; side++)
                both[side] = read<Words>(weights + ((side * groups + at) * LOADS + load) * LANES * BESIDE);
            for (int row = 0; row < ROWS; row++) {
                const uint8_t* bytes = rows[row * groups + at].bytes + load * BESIDE;
                const Integers lower = read<int32_t>(bytes) + Integers{}, upper = read<int32_t>(bytes + HALF) + Integers{};
                for (int side = 0; side < SIDE; side++) {
                    sums[row][side] = add_products(sums[row][side], Integers(both[side] & 0x0f0f0f0f), lower);
                    sums[row][side] = add_products(sums[row][side], Integers(both[side] >> 4 & 0x0f0f0f0f), upper);
                }
            }
        }
        for (int side = 0; side < SIDE; side++) {
            const Words both = read<Words>(scales + (side * groups + at) * LANES);
            const Floats step = as<Floats>(both << 16), middle = as<Floats>(both & 0xffff0000);
            for (int row = 0; row < ROWS; row++) {
                const Rounded& group = rows[row * groups + at];
                y[row][side] += middle * (group.step * group.whole);
                y[row][side] += __builtin_convertvector(sums[row][side], Floats) * (step * group.step);
            }
        }
    }
    for (int row = 0; row < ROWS; row++)
        for (int side = 0; side < SIDE; side++) store(to + row * outputs + side * LANES, y[row][side], LANES);
}

void multiply(const float* rows, const uint8_t* weights, const uint32_t* scales, const int64_t* expert, float* to,
              int64_t count, int64_t inputs, int64_t outputs, int64_t threads) {
    const int64_t groups = inputs / GROUP;
    weights += *expert * outputs * inputs / 2;
    scales += *expert * outputs * groups;
    std::vector<Rounded> rounded(count * groups);
    for (int64_t row = 0; row < count; row++) to_groups(rows + row * inputs, groups, &rounded[row * groups]);
#pragma omp parallel for num_threads(threads)
    for (int64_t first = 0; first < outputs; first += SIDE * LANES) {
        const auto make = [&](auto some, int64_t row) {
            some(&rounded[row * groups], groups, weights + first * inputs / 2, scales + first * groups,
                 to + row * outputs + first, outputs);
        };
        int64_t row = 0;
        for (; row + TOGETHER <= count; row += TOGETHER) make(multiply_some<TOGETHER>, row);
        for (; row < count; row++) make(multiply_some<1>, row);
    }
}

}  // namespace

extern "C" void multiply_int4(const float* rows, const uint8_t* weights, const uint32_t* scales, const int64_t* expert,
                              float* to, int64_t count, int64_t inputs, int64_t outputs, int64_t threads) {
    multiply(rows, weights, scales, expert, to, count, inputs, outputs, threads);
}

// A function of PyTorch's, which has been loaded: a library that all may call must not have all call PyTorch's, too.
template <class Function> Function* of_torch(const char* name) {
    static void* const library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? (Function*)dlsym(library, name) : nullptr;
}

#define OF_TORCH(name) of_torch<decltype(aoti_torch_##name)>("aoti_torch_" #name)

// The same as code that PyTorch has compiled calls it, for the operation `triglot::multiply_int4`.
extern "C" AOTITorchError aoti_torch_cpu_multiply_int4(AtenTensorHandle rows, AtenTensorHandle weights,
                                                       AtenTensorHandle scales, AtenTensorHandle expert,
                                                       int64_t outputs, int64_t threads, AtenTensorHandle* to) {
    static const auto size = OF_TORCH(get_size), stride = OF_TORCH(get_stride);
    static const auto data_ptr = OF_TORCH(get_data_ptr);
    static const auto empty = OF_TORCH(empty_strided);
    static const auto float32 = OF_TORCH(dtype_float32), cpu = OF_TORCH(device_type_cpu);
    if (!(size && stride && data_ptr && empty && float32 && cpu)) return AOTI_TORCH_FAILURE;
    int64_t sizes[] = {0, outputs}, strides[] = {outputs, 1}, inputs, of_row, of_number;
    AOTITorchError failed =
        size(rows, 0, &sizes[0]) | size(rows, 1, &inputs) | stride(rows, 0, &of_row) | stride(rows, 1, &of_number);
    failed |= of_number != 1 || (sizes[0] > 1 && of_row != inputs);  // PyTorch lays numbers as it likes
    failed = failed || empty(2, sizes, strides, float32(), cpu(), 0, to);
    if (failed) return AOTI_TORCH_FAILURE;
    void* data[5];
    const AtenTensorHandle parts[] = {rows, weights, scales, expert, *to};
    for (int part = 0; part < 5; part++) failed |= data_ptr(parts[part], &data[part]);
    if (failed) return AOTI_TORCH_FAILURE;
    multiply((const float*)data[0], (const uint8_t*)data[1], (const uint32_t*)data[2], (const int64_t*)data[3],
             (float*)data[4], sizes[0], inputs, outputs, threads);
    return AOTI_TORCH_SUCCESS;
}
