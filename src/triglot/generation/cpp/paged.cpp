// What hypotheses of a beam search attend to (Vaswani et al. 2017, eq. 1), or a text's tokens, each of which is then a
// sentence of one hypothesis: `paged.py` compiles this for one model and beam. Threads share sentences and heads; every sum
// is taken in one order, whatever stands beside a sentence.
//
// Given: HEADS, KV_HEADS, HEAD_DIM, HYPOTHESES, and the types Input and Output, float or BFloat16.

#include <vector>

#include "vectors.h"

namespace {

constexpr int GROUP = HEADS / KV_HEADS;  // heads that share keys and values
constexpr int QUERIES = HYPOTHESES * GROUP;
constexpr int TURNS = (QUERIES + 11) / 12, SOME = (QUERIES + TURNS - 1) / TURNS;  // as many at a time as registers hold
constexpr int CHUNKS = (HEAD_DIM + LANES - 1) / LANES;
constexpr float HIDDEN = -5e29f;  // what is below this weighs exactly nothing

// Keys and values of LANES places of one sentence: keys lie so that their scores are computed side by side, values so
// that their sums are.
struct Page {
    Input keys[HEAD_DIM][LANES];
    Input values[LANES][CHUNKS * LANES];
};

// A page that some hypothesis attends to: its heads, and which one it is.
struct Shown {
    const Page* heads;
    int64_t number;
};

// What is added to the scores of a sentence's keys: strides are 0 where all heads, or hypotheses, have the same.
struct Bias {
    const float* of;
    int64_t head_stride, hypothesis_stride;

    Floats at(int head, int hypothesis, int64_t page) const {
        return load(of + head * head_stride + hypothesis * hypothesis_stride + page * LANES);
    }

    bool shows(int64_t page) const {
        for (int hypothesis = 0; hypothesis < (hypothesis_stride ? HYPOTHESES : 1); hypothesis++)
            if (!(largest(at(0, hypothesis, page)) < HIDDEN)) return true;
        return false;
    }
};

// SOME queries from one on, of a sentence and a head of keys: of each hypothesis those of a group. What is more than there
// are repeats the last. `scores` has room for SOME of each page.
void attend(const Input* query, int64_t stride, const std::vector<Shown>& pages, const Bias& bias, int kv_head,
            int first, std::vector<Floats>& scores, Output* output) {
    int hypotheses[SOME], heads[SOME];
    for (int q = 0; q < SOME; q++) {
        const int one = first + q < QUERIES ? first + q : QUERIES - 1;
        hypotheses[q] = one / GROUP;
        heads[q] = kv_head * GROUP + one % GROUP;
    }
    float queries[SOME][HEAD_DIM];
    for (int q = 0; q < SOME; q++)
        for (int d = 0; d < HEAD_DIM; d++)
            queries[q][d] = number(query[hypotheses[q] * stride + heads[q] * HEAD_DIM + d]);

    Floats most[SOME];
    for (size_t page = 0; page < pages.size(); page++) {
        Floats sums[SOME];
        for (int q = 0; q < SOME; q++) sums[q] = bias.at(heads[q], hypotheses[q], pages[page].number);
        for (int d = 0; d < HEAD_DIM; d++) {
            const Floats keys = load(pages[page].heads[kv_head].keys[d]);
            for (int q = 0; q < SOME; q++) sums[q] += queries[q][d] * keys;
        }
        for (int q = 0; q < SOME; q++) {
            scores[page * SOME + q] = sums[q];
            most[q] = page ? larger(most[q], sums[q]) : sums[q];
        }
    }

    float norm[SOME];
    for (int q = 0; q < SOME; q++) {
        Floats sum{};
        const float shift = largest(most[q]);
        for (size_t page = 0; page < pages.size(); page++) {
            Floats& weights = scores[page * SOME + q];
            weights = exponential(weights - shift);
            sum += weights;
        }
        norm[q] = 1 / total(sum);
    }

    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        Floats mixed[SOME] = {};
        for (size_t page = 0; page < pages.size(); page++)
            for (int place = 0; place < LANES; place++) {
                const Floats values = load(pages[page].heads[kv_head].values[place] + chunk * LANES);
                for (int q = 0; q < SOME; q++) mixed[q] += lane(scores[page * SOME + q], place) * values;
            }
        const int at = chunk * LANES, count = HEAD_DIM - at < LANES ? HEAD_DIM - at : LANES;
        for (int q = 0; q < SOME; q++)
            store(output + (hypotheses[q] * HEADS + heads[q]) * HEAD_DIM + at, mixed[q] * norm[q], count);
    }
}

void write(const Input* key, const Input* value, int64_t lane, Page* heads) {
    for (int head = 0; head < KV_HEADS; head++)
        for (int d = 0; d < HEAD_DIM; d++) {
            heads[head].keys[d][lane] = key[head * HEAD_DIM + d];
            heads[head].values[lane][d] = value[head * HEAD_DIM + d];
        }
}

}  // namespace

// Writes what is new in its places, if there are places, and attends. Of each page there are the heads of all sentences
// one behind another, those of a layer from `layer` on and those of a sentence from its row on. Sentences may have the
// same row, and see what all of them wrote.
extern "C" void step(const Input* query, int64_t query_stride, const Input* key, int64_t key_stride,
                     const Input* value, int64_t value_stride, const int64_t* places, Page* const* pages,
                     int64_t num_pages, int64_t layer, const int64_t* rows, const float* bias, int64_t sentence_stride,
                     int64_t head_stride, int64_t hypothesis_stride, Output* output, int64_t sentences,
                     int64_t threads) {
    const auto heads_of = [&](int64_t page, int64_t sentence) {
        return pages[page] + layer + rows[sentence] * KV_HEADS;
    };
#pragma omp parallel num_threads(threads)
    {
        if (places) {
#pragma omp for
            for (int64_t at = 0; at < sentences * HYPOTHESES; at++)
                write(key + at * key_stride, value + at * value_stride, places[at] % LANES,
                      heads_of(places[at] / LANES, at / HYPOTHESES));
        }
        std::vector<Shown> shown;
        std::vector<Floats> scores;
        int64_t last = -1;
#pragma omp for
        for (int64_t at = 0; at < sentences * KV_HEADS; at++) {
            const int64_t sentence = at / KV_HEADS, first = sentence * HYPOTHESES;
            const Bias own{bias + sentence * sentence_stride, head_stride, hypothesis_stride};
            if (sentence != last) {
                shown.clear();
                for (int64_t page = 0; page < num_pages; page++)
                    if (own.shows(page)) shown.push_back({heads_of(page, sentence), page});
                scores.resize(shown.size() * SOME);
                last = sentence;
            }
            for (int some = 0; some < QUERIES; some += SOME)
                attend(query + first * query_stride, query_stride, shown, own, at % KV_HEADS, some, scores,
                       output + first * HEADS * HEAD_DIM);
        }
    }
}
