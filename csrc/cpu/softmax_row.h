// Softmax statistics of a row of logits: one read of it from memory, one exp an element.
#pragma once

#include <math.h>
#include <omp.h>
#include <stdlib.h>

#include "cpu/load.h"
#include "math/temperature.h"

namespace warpo::cpu::WARPO_ISA {

// A row is reduced chunk by chunk, each within the L1 cache, and the chunks are merged in order:
// the tree depends on the vocabulary alone, never on the number of rows or threads.
constexpr int kChunk = 4096;
constexpr int kLanes = 64;

struct Softmax {
    float max = -INFINITY;
    float sum = 0;       // of 2^d, d = (x - max) log2(e) / temperature
    float weighted = 0;  // of 2^d d
};

WARPO_HD Softmax merge(Softmax a, Softmax b, float scale) {
    Softmax merged;
    merged.max = a.max > b.max ? a.max : b.max;
    // sums are 0, or NaN where a NaN was seen
    if (merged.max == -INFINITY) return {merged.max, a.sum + b.sum, a.weighted + b.weighted};
    auto add = [&](const Softmax& part) {
        float shift = (part.max - merged.max) * scale;
        shift = shift < kExp2Floor ? kExp2Floor : shift;
        const float factor = exp2_softmax(shift);
        merged.sum += factor * part.sum;
        merged.weighted += factor * (part.weighted + shift * part.sum);
    };
    add(a);
    add(b);
    return merged;
}

// The largest element, and all as floats in `buffer` unless they are floats.
template <class T>
inline float convert_and_max(const T* source, int count, float* buffer) {
    float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
    for (int i = 0; i < count; ++i) {
        const float x = to_float(source[i]);
        if (sizeof(T) != sizeof(float)) buffer[i] = x;
        largest = x > largest ? x : largest;
    }
    return largest;
}

struct Sums {
    float sum = 0, weighted = 0;
};

template <bool kEntropy>
inline Sums sum_exponentials(const float* x, int count, float max, float scale,
                             const char* prefetch, int bytes) {
    alignas(64) float sum[kLanes] = {}, weighted[kLanes] = {};
    int start = 0;
    for (; start + kLanes <= count; start += kLanes) {
        for (int line = 0; line < bytes; line += 64) __builtin_prefetch(prefetch + line);
        prefetch += bytes;
#pragma omp simd
        for (int lane = 0; lane < kLanes; ++lane) {
            float d = (x[start + lane] - max) * scale;
            const bool low = d < kExp2Floor;
            const float e = exp2_bounded(low ? kExp2Floor : d);
            sum[lane] += e;
            if (kEntropy) weighted[lane] += e * (low ? kExp2Floor : d);
        }
    }
    Sums sums;
#pragma omp simd
    for (int lane = 0; lane < count - start; ++lane) {
        float d = (x[start + lane] - max) * scale;
        d = d < kExp2Floor ? kExp2Floor : d;
        const float e = exp2_bounded(d);
        sum[lane] += e;
        if (kEntropy) weighted[lane] += e * d;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
        sums.sum += sum[lane];
        sums.weighted += weighted[lane];
    }
    return sums;
}

template <class T, bool kEntropy>
inline Softmax reduce_chunk(const T* source, int count, float scale) {
    alignas(64) float buffer[kChunk];
    Softmax chunk;
    chunk.max = convert_and_max(source, count, buffer);
    const float* x = sizeof(T) == sizeof(float) ? (const float*)source : buffer;
    const Sums sums =
        sum_exponentials<kEntropy>(x, count, chunk.max == -INFINITY ? 0.0f : chunk.max, scale,
                                   (const char*)(source + kChunk), kLanes * (int)sizeof(T));
    chunk.sum = sums.sum;
    chunk.weighted = sums.weighted;
    if (chunk.max == -INFINITY && chunk.sum == chunk.sum) chunk.sum = chunk.weighted = 0;
    return chunk;
}

template <class T, bool kEntropy>
inline Softmax reduce_row(const T* logits, int64_t vocab, float scale, bool split) {
    const int64_t chunks = (vocab + kChunk - 1) / kChunk;
    auto reduce = [=](int64_t c) {
        const int64_t left = vocab - c * kChunk;
        return reduce_chunk<T, kEntropy>(logits + c * kChunk, left < kChunk ? (int)left : kChunk,
                                         scale);
    };
    Softmax row;
    if (!split) {
        for (int64_t c = 0; c < chunks; ++c) row = merge(row, reduce(c), scale);
        return row;
    }
    Softmax* parts = (Softmax*)malloc(chunks * sizeof(Softmax));
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < chunks; ++c) parts[c] = reduce(c);
    for (int64_t c = 0; c < chunks; ++c) row = merge(row, parts[c], scale);
    free(parts);
    return row;
}

struct TokenLogprob {
    bool read;  // false: masked or poisoned, and the results are 0 or NaN
    float max, log_sum, logp, entropy;
};

// One copy for all callers: in another, GCC may contract other products to fused multiply-adds, and
// logprobs would not have the bits of those of a loss from logits.
#ifdef __clang__
#define WARPO_ONE_COPY __attribute__((noinline))
#else
#define WARPO_ONE_COPY __attribute__((noipa))
#endif

// Reads the row of a token, if it is valid and its target is in range, and stores its results.
template <class T, bool kEntropy>
WARPO_ONE_COPY TokenLogprob read_token(const Logprobs& a, int64_t b, int64_t t, bool valid,
                                       bool split) {
    const int64_t target = *address<int64_t>(a.targets, b, t);
    valid = valid && element<uint8_t>(a.mask, b, t, 1) && target != a.ignore_index;
    TokenLogprob token = {false, 0.0f, 0.0f, 0.0f, 0.0f};
    if (valid && (target < 0 || target >= a.vocab)) {
        token.max = token.log_sum = token.logp = token.entropy = NAN;
    } else if (valid) {
        const T* logits = address<T>(a.logits, b, t);
        const float inverse_temperature =
            1.0f / temperature_or_nan(element<float>(a.token_temperature, b, t, a.temperature));
        const Softmax row =
            reduce_row<T, kEntropy>(logits, a.vocab, inverse_temperature * kLog2e, split);
        token.read = true;
        token.max = row.max;
        token.log_sum = row.sum > 0 ? logf(row.sum) : NAN;
        const float logp =
            (to_float(logits[target]) - row.max) * inverse_temperature - token.log_sum;
        token.logp = logp > 0 ? 0 : logp;
        if (kEntropy) token.entropy = token.log_sum - kLn2 * (row.weighted / row.sum);
    }
    *address<float>(a.logprobs, b, t) = token.logp;
    if (kEntropy) *address<float>(a.entropy, b, t) = token.entropy;
    if (a.stats) {
        float* stats = a.stats + 2 * (b * a.steps + t);
        stats[0] = token.max;
        stats[1] = token.log_sum;
    }
    return token;
}

// Whether the threads share each row, as there are fewer rows than threads.
inline bool splits_rows(const Logprobs& a) {
    return a.rows * a.steps < omp_get_max_threads() && a.vocab >= kParallelWork;
}

}  // namespace warpo::cpu::WARPO_ISA
