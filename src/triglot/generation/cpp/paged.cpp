// What hypotheses of a beam search attend to (Vaswani et al. 2017, eq. 1), a sentence after another: `paged.py` compiles
// this for one model and beam. Every sum is taken in one order, whatever stands beside a sentence.
//
// Given: HEADS, KV_HEADS, HEAD_DIM, HYPOTHESES, and the types Input and Output, float or BFloat16.

#include <vector>

#include "vectors.h"

namespace {

constexpr int GROUPS = HEADS / KV_HEADS;  // heads that share keys and values
constexpr int QUERIES = HYPOTHESES * GROUPS;
constexpr int CHUNKS = (HEAD_DIM + LANES - 1) / LANES;
constexpr float HIDDEN = -5e29f;  // what is below this weighs exactly nothing

// Keys and values of LANES places of one sentence: keys lie so that their scores are computed side by side, values so
// that their sums are.
struct Page {
    Input keys[HEAD_DIM][LANES];
    Input values[LANES][CHUNKS * LANES];
};

// What is added to the scores of a sentence's keys: strides of heads and hypotheses are 0 where all have the same.
struct Bias {
    const float* of;
    int64_t head, hypothesis;

    const float* at(int head, int hypothesis, int64_t page) const {
        return of + head * this->head + hypothesis * this->hypothesis + page * LANES;
    }
};

// Queries of one sentence and head of keys: all hypotheses', and of each all of a group.
void attend(const Input* query, int64_t stride, const std::vector<const Page*>& pages,
            const std::vector<int64_t>& numbers, Bias bias, int kv_head, std::vector<Floats>& scores, Output* output) {
    const int first = kv_head * GROUPS;
    float queries[QUERIES][HEAD_DIM];
    for (int q = 0; q < QUERIES; q++)
        for (int d = 0; d < HEAD_DIM; d++)
            queries[q][d] = number(query[q / GROUPS * stride + (first + q % GROUPS) * HEAD_DIM + d]);

    Floats most[QUERIES];
    for (size_t b = 0; b < pages.size(); b++) {
        Floats sums[QUERIES];
        for (int q = 0; q < QUERIES; q++) sums[q] = load(bias.at(first + q % GROUPS, q / GROUPS, numbers[b]));
        for (int d = 0; d < HEAD_DIM; d++) {
            Floats keys = load(pages[b][kv_head].keys[d]);
            for (int q = 0; q < QUERIES; q++) sums[q] += queries[q][d] * keys;
        }
        for (int q = 0; q < QUERIES; q++) {
            scores[b * QUERIES + q] = sums[q];
            most[q] = b ? larger(most[q], sums[q]) : sums[q];
        }
    }

    float norm[QUERIES];
    for (int q = 0; q < QUERIES; q++) {
        Floats sum{};
        float shift = largest(most[q]);
        for (size_t b = 0; b < pages.size(); b++) {
            Floats& weights = scores[b * QUERIES + q];
            weights = exponential(weights - shift);
            sum += weights;
        }
        norm[q] = 1 / total(sum);
    }

    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        Floats mixed[QUERIES] = {};
        for (size_t b = 0; b < pages.size(); b++) {
            const float* weights = reinterpret_cast<const float*>(&scores[b * QUERIES]);
            for (int place = 0; place < LANES; place++) {
                Floats values = load(pages[b][kv_head].values[place] + chunk * LANES);
                for (int q = 0; q < QUERIES; q++) mixed[q] += weights[q * LANES + place] * values;
            }
        }
        const int count = HEAD_DIM - chunk * LANES < LANES ? HEAD_DIM - chunk * LANES : LANES;
        for (int q = 0; q < QUERIES; q++)
            store(output + (q / GROUPS * HEADS + first + q % GROUPS) * HEAD_DIM + chunk * LANES, mixed[q] * norm[q],
                  count);
    }
}

void write(const Input* key, const Input* value, int64_t place, Page* page) {
    for (int head = 0; head < KV_HEADS; head++)
        for (int d = 0; d < HEAD_DIM; d++) {
            page[head].keys[d][place % LANES] = key[head * HEAD_DIM + d];
            page[head].values[place % LANES][d] = value[head * HEAD_DIM + d];
        }
}

bool visible(Bias bias, int64_t page) {
    for (int hypothesis = 0; hypothesis < (bias.hypothesis ? HYPOTHESES : 1); hypothesis++)
        if (!(largest(load(bias.at(0, hypothesis, page))) < HIDDEN)) return true;
    return false;
}

}  // namespace

extern "C" void step(const Input* query, int64_t query_stride, const Input* key, int64_t key_stride,
                     const Input* value, int64_t value_stride, const int64_t* places, Page* const* pages, int64_t num_pages, const int64_t* rows,
                     const float* bias, const int64_t* strides, Output* output, int64_t sentences, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t sentence = 0; sentence < sentences; sentence++) {
        thread_local std::vector<const Page*> own;
        thread_local std::vector<int64_t> numbers;
        thread_local std::vector<Floats> scores;
        const int64_t row = sentence * HYPOTHESES;
        if (places)
            for (int64_t at = row; at < row + HYPOTHESES; at++)
                write(key + at * key_stride, value + at * value_stride, places[at],
                      pages[places[at] / LANES] + rows[sentence] * KV_HEADS);
        const Bias of_sentence{bias + sentence * strides[0], strides[1], strides[2]};
        own.clear(), numbers.clear();
        for (int64_t number = 0; number < num_pages; number++)
            if (visible(of_sentence, number)) {
                own.push_back(pages[number] + rows[sentence] * KV_HEADS);
                numbers.push_back(number);
            }
        scores.resize(own.size() * QUERIES);
        for (int head = 0; head < KV_HEADS; head++)
            attend(query + row * query_stride, query_stride, own, numbers, of_sentence, head, scores,
                   output + row * HEADS * HEAD_DIM);
    }
}
