// Gradient of the log-probability and of the entropy with respect to the logits:
//   d/dx_j = ( g_logprob (1[j = target] - p_j) - g_entropy p_j (log p_j + H) ) / temperature
#include <math.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu/cpu.h"
#include "cpu/load.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

constexpr int64_t kPiece = 32768;  // of a row: the unit of work of a thread

template <class T>
void fill(T* out, int64_t count, float value) {
    T filler;
    from_float(value, filler);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = filler;
}

// p = 2^y with y = (x - max) slope - log2_sum, and the gradient p (constant + linear y).
struct Token {
    float max, slope, log2_sum;
    float constant, linear;

    template <bool kEntropy>
    WARPO_HD float gradient(float x) const {
        const float y = (x - max) * slope - log2_sum;
        const float bounded = y < kExp2Floor ? kExp2Floor : y;  // keeps 0 * inf out
        const float p = y < kExp2Floor ? 0.0f : exp2_softmax(bounded);
        return p * (kEntropy ? constant + linear * bounded : constant);
    }
};

// In place is allowed: element i is read before it is written.
template <class T, bool kEntropy>
void piece_gradient(const Token& token, const T* logits, T* out, int64_t count) {
    const Token local = token;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
        from_float(local.gradient<kEntropy>(to_float(logits[i])), out[i]);
}

template <class T>
void backward_piece(const Logprobs& a, const LogprobsBackward& g, int64_t b, int64_t t,
                    int64_t start) {
    const int64_t left = a.vocab - start, count = left < kPiece ? left : kPiece;
    const T* logits = address<T>(a.logits, b, t) + start;
    T* out = address<T>(g.grad_logits, b, t) + start;
    const int64_t target = *address<int64_t>(a.targets, b, t);
    if (!element<uint8_t>(a.mask, b, t, 1) || target == a.ignore_index)
        return fill(out, count, 0.0f);

    const float* stats = a.stats + 2 * (b * a.steps + t);
    const float grad_logprob = element<float>(g.grad_logprobs, b, t, 0.0f);
    const float grad_entropy = element<float>(g.grad_entropy, b, t, 0.0f);
    if (target < 0 || target >= a.vocab || stats[1] != stats[1]) return fill(out, count, NAN);
    if (grad_logprob == 0 && grad_entropy == 0) return fill(out, count, 0.0f);

    const float inverse_temperature =
        1.0f / element<float>(a.token_temperature, b, t, a.temperature);
    const float entropy = grad_entropy == 0 ? 0.0f : *address<float>(a.entropy, b, t);
    Token token;
    token.max = stats[0];
    token.slope = inverse_temperature * kLog2e;
    token.log2_sum = stats[1] * kLog2e;
    token.constant = -inverse_temperature * (grad_logprob + grad_entropy * entropy);
    token.linear = -inverse_temperature * grad_entropy * kLn2;

    const bool has_target = target >= start && target < start + count;
    const float of_softmax =
        has_target ? token.gradient<true>(to_float(logits[target - start])) : 0.0f;
    const float at_target = of_softmax + inverse_temperature * grad_logprob;
    if (grad_entropy == 0)
        piece_gradient<T, false>(token, logits, out, count);
    else
        piece_gradient<T, true>(token, logits, out, count);
    if (has_target) from_float(at_target, out[target - start]);
}

// A gradient of this size is fresh memory: in pages of 4 KiB, most of the time would go to page
// faults.
template <class T>
void advise_huge_pages(const Logprobs& a, const LogprobsBackward& g) {
#ifdef __linux__
    constexpr uintptr_t kHugePage = 2u << 20;
    const T* last = address<T>(g.grad_logits, a.rows - 1, a.steps - 1) + a.vocab;
    const uintptr_t begin = ((uintptr_t)g.grad_logits.data + kHugePage - 1) & ~(kHugePage - 1);
    const uintptr_t end = (uintptr_t)last & ~(kHugePage - 1);
    if (g.grad_logits.data != a.logits.data && end > begin + 8 * kHugePage)
        madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
}

template <class T>
void backward(const Logprobs& a, const LogprobsBackward& g) {
    advise_huge_pages<T>(a, g);
    const int64_t pieces = (a.vocab + kPiece - 1) / kPiece;
    const int64_t units = a.rows * a.steps * pieces;
    const int64_t grain = 1 + kParallelWork / (a.vocab + 1);
#pragma omp parallel for schedule(dynamic, grain) if (a.rows * a.steps * a.vocab >= kParallelWork)
    for (int64_t unit = 0; unit < units; ++unit) {
        const int64_t token = unit / pieces;
        backward_piece<T>(a, g, token / a.steps, token % a.steps, unit % pieces * kPiece);
    }
}

}  // namespace

void logprobs_backward(const LogprobsBackward& g) {
    const Logprobs& a = g.forward;
    switch (a.logits.dtype) {
        case kFloat32: return backward<float>(a, g);
        case kBFloat16: return backward<BFloat16>(a, g);
        default: return backward<Float16>(a, g);
    }
}

}  // namespace warpo::cpu::WARPO_ISA
