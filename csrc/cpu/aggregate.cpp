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
    double sum = 0, weight = 0;
};

template <class T, class M>
void add_dense(const T* values, const M* mask, int count, Sums& sums) {
    float sum = 0, total = 0;
#pragma omp simd reduction(+ : sum, total)
    for (int i = 0; i < count; ++i) {
        const float weight = weight_of(mask[i]);
        sum += weight != 0.0f ? weight * to_float(values[i]) : 0.0f;
        total += weight;
    }
    sums.sum += sum;
    sums.weight += total;
}

template <class T>
void add_dense(const T* values, int count, Sums& sums) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < count; ++i) sum += to_float(values[i]);
    sums.sum += sum;
    sums.weight += count;
}

// M: of the mask.
template <class T, class M>
Sums sum_tokens(const Aggregate& a, const TokenRange& range) {
    const bool dense = a.values.stride1 == 1 && (!a.mask.data || a.mask.stride1 == 1);
    Sums sums;
    T values[kTile];
    M keep[kTile];
    for (int64_t start = 0; start < range.count; start += kTile) {
        const int64_t left = range.count - start, first = range.first + start;
        const int count = (int)(left < kTile ? left : kTile);
        const T* value = address<T>(a.values, range.row, first);
        const M* mask = a.mask.data ? address<M>(a.mask, range.row, first) : nullptr;
        if (!dense) {
            for (int i = 0; i < count; ++i) values[i] = value[i * a.values.stride1];
            for (int i = 0; mask && i < count; ++i) keep[i] = mask[i * a.mask.stride1];
            value = values;
            mask = mask ? keep : nullptr;
        }
        if (mask) {
            add_dense(value, mask, count, sums);
        } else {
            add_dense(value, count, sums);
        }
    }
    return sums;
}

template <class M>
Sums sum_part(const Aggregate& a, const TokenRange& range) {
    switch (a.values.dtype) {
        case kFloat32: return sum_tokens<float, M>(a, range);
        case kBFloat16: return sum_tokens<BFloat16, M>(a, range);
        default: return sum_tokens<Float16, M>(a, range);
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

template <class T, class M>
void write_weighted(const M* mask, int64_t stride, int64_t count, float value, T* out) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        const float weight = weight_of(mask[i * stride]);
        from_float(weight != 0.0f ? weight * value : 0.0f, out[i]);
    }
}

template <class T, class M>
void write_part(const AggregateBackward& a, const TokenRange& range, float weight) {
    const float value = weight * *a.grad;
    T* const out = (T*)a.grad_values.data + range.offset;
    const int64_t stride = a.mask.stride1;
    const M* const mask = a.mask.data ? address<M>(a.mask, range.row, range.first) : nullptr;
    if (!mask) {
        T rounded;
        from_float(value, rounded);
        for (int64_t i = 0; i < range.count; ++i) out[i] = rounded;
    } else if (stride == 1) {
        write_weighted(mask, 1, range.count, value, out);
    } else {
        write_weighted(mask, stride, range.count, value, out);
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
        const float weight = a.weights[index / parts];
        if (a.mask.dtype == kFloat32)
            write_part<T, float>(a, range, weight);
        else
            write_part<T, uint8_t>(a, range, weight);
    });
}

}  // namespace

void aggregate_forward(const Aggregate& a) {
    const int64_t parts = parts_per_sequence(a, kPart);
    float* const partials = partials_of(a);
    for_each_part(a, parts, [&](int64_t index, const TokenRange& range) {
        const bool weighted = a.mask.dtype == kFloat32;
        const Sums sums = weighted ? sum_part<float>(a, range) : sum_part<uint8_t>(a, range);
        partials[2 * index] = (float)sums.sum;
        partials[2 * index + 1] = (float)sums.weight;
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
