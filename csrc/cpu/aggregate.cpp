// One number from the values of sequences, and its gradient: sums of parts in parallel, added up in
// their order.
#include "math/aggregate.h"

#include "cpu/cpu.h"
#include "cpu/load.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

// Tokens whose sum is float32 before it is added up in double.
constexpr int kTile = 512;
constexpr int64_t kPart = 8192;

template <class Arguments, class Function>
void for_each_part(const Arguments& a, int64_t parts, Function body) {
    const int64_t count = a.sequences * parts;
    if ((a.cu_seqlens ? a.steps : a.sequences * a.steps) < kParallelWork) {
        for (int64_t p = 0; p < count; ++p)
            body(p, tokens_of_part(a, p / parts, p % parts, parts));
        return;
    }
#pragma omp parallel for
    for (int64_t p = 0; p < count; ++p) body(p, tokens_of_part(a, p / parts, p % parts, parts));
}

struct Sums {
    double sum = 0;
    int64_t tokens = 0;
};

template <class T>
void add_dense(const T* values, const uint8_t* mask, int count, Sums& sums) {
    float sum = 0;
    int tokens = 0;
    if (mask) {
#pragma omp simd reduction(+ : sum, tokens)
        for (int i = 0; i < count; ++i) {
            sum += mask[i] ? to_float(values[i]) : 0.0f;
            tokens += mask[i] != 0;
        }
    } else {
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < count; ++i) sum += to_float(values[i]);
        tokens = count;
    }
    sums.sum += sum;
    sums.tokens += tokens;
}

template <class T>
Sums sum_tokens(const Aggregate& a, const TokenRange& range) {
    const bool dense = a.values.stride1 == 1 && (!a.mask.data || a.mask.stride1 == 1);
    Sums sums;
    T values[kTile];
    uint8_t keep[kTile];
    for (int64_t start = 0; start < range.count; start += kTile) {
        const int64_t left = range.count - start, first = range.first + start;
        const int count = (int)(left < kTile ? left : kTile);
        const T* value = address<T>(a.values, range.row, first);
        const uint8_t* mask = a.mask.data ? address<uint8_t>(a.mask, range.row, first) : nullptr;
        if (!dense) {
            for (int i = 0; i < count; ++i) values[i] = value[i * a.values.stride1];
            for (int i = 0; mask && i < count; ++i) keep[i] = mask[i * a.mask.stride1];
            value = values;
            mask = mask ? keep : nullptr;
        }
        add_dense(value, mask, count, sums);
    }
    return sums;
}

Sums sum_part(const Aggregate& a, const TokenRange& range) {
    switch (a.values.dtype) {
        case kFloat32: return sum_tokens<float>(a, range);
        case kBFloat16: return sum_tokens<BFloat16>(a, range);
        default: return sum_tokens<Float16>(a, range);
    }
}

// The sums of the parts in their order.
void reduce(const Aggregate& a, int64_t parts) {
    const float* const partials = partials_of(a);
    double tokens = 0, result = 0;
    for (int64_t p = 0; p < a.sequences * parts; ++p) tokens += partials[2 * p + 1];
    const float inverse = inverse_denominator(a, (float)tokens);
    for (int64_t b = 0; b < a.sequences; ++b) {
        double sum = 0, own = 0;
        for (int64_t p = b * parts; p < (b + 1) * parts; ++p) {
            sum += partials[2 * p];
            own += partials[2 * p + 1];
        }
        a.weights[b] = sequence_weight(a, inverse, (float)own);
        result += weighted(a.weights[b], sum);
    }
    *a.result = (float)result;
}

template <class T>
void write_zeros(T* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = T();
}

template <class T>
void write_part(const AggregateBackward& a, const TokenRange& range, float weight) {
    T value;
    from_float(weight * *a.grad, value);
    const T zero = T();
    T* const out = (T*)a.grad_values.data + range.offset;
    const int64_t stride = a.mask.stride1;
    const uint8_t* const mask =
        a.mask.data ? address<uint8_t>(a.mask, range.row, range.first) : nullptr;
    if (!mask) {
        for (int64_t i = 0; i < range.count; ++i) out[i] = value;
    } else if (stride == 1) {
#pragma omp simd
        for (int64_t i = 0; i < range.count; ++i) out[i] = mask[i] ? value : zero;
    } else {
        for (int64_t i = 0; i < range.count; ++i) out[i] = mask[i * stride] ? value : zero;
    }
}

template <class T>
void write_gradient(const AggregateBackward& a) {
    const int64_t parts = parts_per_sequence(a, kPart);
    if (a.cu_seqlens) {
        // tokens that belong to no sequence
        T* const out = (T*)a.grad_values.data;
        const int64_t end = a.cu_seqlens[a.sequences];
        write_zeros(out, a.cu_seqlens[0]);
        write_zeros(out + end, a.steps - end);
    }
    for_each_part(a, parts, [&](int64_t index, const TokenRange& range) {
        write_part<T>(a, range, a.weights[index / parts]);
    });
}

}  // namespace

void aggregate_forward(const Aggregate& a) {
    const int64_t parts = parts_per_sequence(a, kPart);
    float* const partials = partials_of(a);
    for_each_part(a, parts, [&](int64_t index, const TokenRange& range) {
        const Sums sums = sum_part(a, range);
        partials[2 * index] = (float)sums.sum;
        partials[2 * index + 1] = (float)sums.tokens;
    });
    reduce(a, parts);
}

void aggregate_backward(const AggregateBackward& a) {
    switch (a.grad_values.dtype) {
        case kFloat32: return write_gradient<float>(a);
        case kBFloat16: return write_gradient<BFloat16>(a);
        default: return write_gradient<Float16>(a);
    }
}

}  // namespace warpo::cpu::WARPO_ISA
