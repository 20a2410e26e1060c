// The gradient of log-probability and entropy with respect to a row of logits:
//   d/dx_j = ( g_logprob (1[j = target] - p_j) - g_entropy p_j (log p_j + H) ) / temperature
#pragma once

#include <math.h>

#include <type_traits>

#include "cpu/huge_pages.h"
#include "cpu/load.h"

namespace warpo::cpu::WARPO_ISA {

template <class T>
inline void fill(T* out, int64_t count, float value) {
    T filler;
    from_float(value, filler);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = filler;
}

// p = 2^y with y = (x - max) slope - log2_sum, and the gradient p (constant + linear y).
struct TokenSoftmax {
    float max, slope, log2_sum;
    float constant, linear, at_target;

    template <bool kEntropy>
    WARPO_HD float gradient(float x) const {
        const float y = (x - max) * slope - log2_sum;
        const float bounded = y < kExp2Floor ? kExp2Floor : y;  // keeps 0 * inf out
        const float p = y < kExp2Floor ? 0.0f : exp2_softmax(bounded);
        return p * (kEntropy ? constant + linear * bounded : constant);
    }
};

// In place is allowed: element i is read before it is written.
template <class T, class G, bool kEntropy>
inline void piece_gradient(const TokenSoftmax& token, const T* logits, G* out, int64_t count) {
    const TokenSoftmax local = token;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
        from_float(local.gradient<kEntropy>(to_float(logits[i])), out[i]);
}

inline TokenSoftmax token_softmax(float max, float log_sum, float entropy, float temperature,
                                  float grad_logprob, float grad_entropy) {
    const float inverse_temperature = 1.0f / temperature;
    TokenSoftmax token;
    token.max = max;
    token.slope = inverse_temperature * kLog2e;
    token.log2_sum = log_sum * kLog2e;
    token.constant = -inverse_temperature * (grad_logprob + grad_entropy * entropy);
    token.linear = -inverse_temperature * grad_entropy * kLn2;
    token.at_target = inverse_temperature * grad_logprob;
    return token;
}

// Of `count` logits from `start` on.
template <class T, class G>
inline void write_piece(const TokenSoftmax& token, const T* row, G* gradient, int64_t start,
                        int64_t count, int64_t target) {
    const bool has_target = target >= start && target < start + count;
    const float at_target =
        has_target ? token.gradient<true>(to_float(row[target])) + token.at_target : 0.0f;
    if (token.linear == 0)
        piece_gradient<T, G, false>(token, row + start, gradient + start, count);
    else
        piece_gradient<T, G, true>(token, row + start, gradient + start, count);
    if (has_target) from_float(at_target, gradient[target]);
}

template <class G>
inline void advise_huge_pages(const Logprobs& a, const View& gradient) {
    if (gradient.data != a.logits.data)
        cpu::advise_huge_pages(gradient.data,
                               address<G>(gradient, a.rows - 1, a.steps - 1) + a.vocab);
}

// use(logit, gradient), null pointers of their types: those of float32 logits may have 16 bits.
template <class Use>
inline void with_types(const View& logits, const View& gradient, Use use) {
    BFloat16* const bfloat16 = nullptr;
    Float16* const float16 = nullptr;
    float* const float32 = nullptr;
    if (logits.dtype == kBFloat16) return use(bfloat16, bfloat16);
    if (logits.dtype == kFloat16) return use(float16, float16);
    switch (gradient.dtype) {
        case kBFloat16: return use(float32, bfloat16);
        case kFloat16: return use(float32, float16);
        default: return use(float32, float32);
    }
}

}  // namespace warpo::cpu::WARPO_ISA
