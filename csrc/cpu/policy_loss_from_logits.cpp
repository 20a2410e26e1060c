// Log-probabilities, and the gradient of the policy loss while the row of logits is in the cache.
#include "math/policy_loss_from_logits.h"

#include "cpu/cpu.h"
#include "cpu/logits_gradient.h"
#include "cpu/softmax_row.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

bool in_a_sequence(const PolicyLossFromLogits& a, int64_t t) {
    return !a.cu_seqlens || (t >= a.cu_seqlens[0] && t < a.cu_seqlens[a.sequences]);
}

float load_if_present(const View& view, int64_t b, int64_t t) {
    return view.data ? load_one(view, b, t) : 0.0f;
}

template <class T, class G>
void one_token(const PolicyLossFromLogits& a, int64_t b, int64_t t, bool split) {
    const Logprobs& forward = a.forward;
    const TokenLogprob token = read_token<T, true>(forward, b, t, in_a_sequence(a, t), split);
    G* gradient = address<G>(a.grad_logits, b, t);
    if (!token.read || token.log_sum != token.log_sum)
        return fill(gradient, forward.vocab, token.log_sum);  // 0 or NaN

    const TokenInputs inputs = {load_if_present(a.old_logprobs, b, t), load_one(a.advantages, b, t),
                                load_if_present(a.ref_logprobs, b, t),
                                load_if_present(a.sampler_logprobs, b, t),
                                element<float>(a.valid_tokens, b, t, 0.0f)};
    const TokenGradient by = token_gradient(a, inputs, token.logp);
    if (by.by_logp == 0 && by.by_entropy == 0) return fill(gradient, forward.vocab, 0.0f);

    const float temperature = element<float>(forward.token_temperature, b, t, forward.temperature);
    const TokenSoftmax softmax = token_softmax(token.max, token.log_sum, token.entropy, temperature,
                                               by.by_logp, by.by_entropy);
    const T* row = address<T>(forward.logits, b, t);
    const int64_t target = *address<int64_t>(forward.targets, b, t);
    // What was read last is still nearest.
    const int64_t chunks = (forward.vocab + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(static) if (split)
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
        const int64_t start = chunk * kChunk, left = forward.vocab - start;
        write_piece(softmax, row, gradient, start, left < kChunk ? left : kChunk, target);
    }
}

template <class T, class G>
void all_tokens(const PolicyLossFromLogits& a) {
    const Logprobs& forward = a.forward;
    advise_huge_pages<G>(forward, a.grad_logits);
    const int64_t tokens = forward.rows * forward.steps;
    const bool split = splits_rows(forward);
    const int64_t grain = 1 + kParallelWork / (forward.vocab + 1);
    const bool parallel = !split && tokens * forward.vocab >= kParallelWork;
#pragma omp parallel for schedule(dynamic, grain) if (parallel)
    for (int64_t token = 0; token < tokens; ++token)
        one_token<T, G>(a, token / forward.steps, token % forward.steps, split);
}

template <class T>
void scale(const ScaleGradient& a) {
    const float factor = *a.factor;
#pragma omp parallel for schedule(static) if (a.rows * a.steps * a.vocab >= kParallelWork)
    for (int64_t token = 0; token < a.rows * a.steps; ++token) {
        T* row = address<T>(a.gradient, token / a.steps, token % a.steps);
#pragma omp simd
        for (int64_t i = 0; i < a.vocab; ++i) from_float(to_float(row[i]) * factor, row[i]);
    }
}

}  // namespace

void policy_loss_from_logits(const PolicyLossFromLogits& a) {
    with_types(a.forward.logits, a.grad_logits, [&](auto* logit, auto* gradient) {
        all_tokens<std::decay_t<decltype(*logit)>, std::decay_t<decltype(*gradient)>>(a);
    });
}

void scale_gradient(const ScaleGradient& a) {
    if (*a.factor == 1.0f) return;
    switch (a.gradient.dtype) {
        case kFloat32: return scale<float>(a);
        case kBFloat16: return scale<BFloat16>(a);
        default: return scale<Float16>(a);
    }
}

}  // namespace warpo::cpu::WARPO_ISA
