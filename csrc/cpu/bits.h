// The bits of an element, zero-extended, and the fingerprint of a run of elements.
#pragma once

#include <string.h>

#include "cpu/load.h"
#include "math/fingerprint.h"

namespace warpo::cpu::WARPO_ISA {

WARPO_HD uint32_t bits_of(float x) { return bits_from_float(x); }
WARPO_HD uint32_t bits_of(BFloat16 x) { return x.bits; }
WARPO_HD uint32_t bits_of(Float16 x) { return x.bits; }

template <class T>
constexpr int kPerWord = sizeof(uint64_t) / sizeof(T);

template <class T>
WARPO_HD uint64_t word_of(const T* elements) {
    uint64_t word;
    memcpy(&word, elements, sizeof word);
    return word;
}

// Of elements that begin a word. `index` is the position of the first of them in the tensor.
template <class T>
inline uint64_t fingerprint_of(const T* elements, int count, int64_t index) {
    const int words = count / kPerWord<T>, left = count % kPerWord<T>;
    uint64_t position = (uint64_t)(index / kPerWord<T> + 1) * kSplitMixStep, sum = 0;
#pragma omp simd reduction(+ : sum) linear(position : kSplitMixStep)
    for (int w = 0; w < words; ++w) {
        sum += splitmix64(position + word_of(elements + w * kPerWord<T>));
        position += kSplitMixStep;
    }
    if (left == 0) return sum;
    T last[kPerWord<T>] = {};
    memcpy(last, elements + count - left, left * sizeof(T));
    return sum + splitmix64((uint64_t)(index / kPerWord<T> + words + 1) * kSplitMixStep +
                            word_of(last));
}

// Elements [index, index + count) in row-major order of rows whose columns are dense, and back.
template <class T, class Copy>
inline void for_each_run(const View& view, int64_t columns, int64_t index, int count,
                         const Copy& copy) {
    for (int done = 0; done < count;) {
        const int64_t row = (index + done) / columns, column = index + done - row * columns;
        const int64_t left = columns - column;
        const int run = count - done < left ? count - done : (int)left;
        copy(address<T>(view, row, column), done, run * sizeof(T));
        done += run;
    }
}

template <class T>
inline void gather(const View& view, int64_t columns, int64_t index, int count, T* out) {
    for_each_run<T>(view, columns, index, count, [&](const T* source, int at, size_t bytes) {
        memcpy(out + at, source, bytes);
    });
}

template <class T>
inline void scatter(const View& view, int64_t columns, int64_t index, int count, const T* source) {
    for_each_run<T>(view, columns, index, count, [&](T* out, int at, size_t bytes) {
        memcpy(out, source + at, bytes);
    });
}

}  // namespace warpo::cpu::WARPO_ISA
