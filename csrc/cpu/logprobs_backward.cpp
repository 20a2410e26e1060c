// Gradient of the log-probability and of the entropy with respect to the logits.
#include "cpu/cpu.h"
#include "cpu/logits_gradient.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

constexpr int64_t kPiece = 32768;  // of a row: the unit of work of a thread

template <class T, class G>
void backward_piece(const Logprobs& a, const LogprobsBackward& g, int64_t b, int64_t t,
                    int64_t start) {
    const int64_t left = a.vocab - start, count = left < kPiece ? left : kPiece;
    const T* logits = address<T>(a.logits, b, t);
    G* gradient = address<G>(g.grad_logits, b, t);
    G* out = gradient + start;
    const int64_t target = *address<int64_t>(a.targets, b, t);
    if (!element<uint8_t>(a.mask, b, t, 1) || target == a.ignore_index)
        return fill(out, count, 0.0f);

    const float* stats = a.stats + 2 * (b * a.steps + t);
    const float grad_logprob = element<float>(g.grad_logprobs, b, t, 0.0f);
    const float grad_entropy = element<float>(g.grad_entropy, b, t, 0.0f);
    if (target < 0 || target >= a.vocab || stats[1] != stats[1]) return fill(out, count, NAN);
    if (grad_logprob == 0 && grad_entropy == 0) return fill(out, count, 0.0f);

    const float entropy = grad_entropy == 0 ? 0.0f : *address<float>(a.entropy, b, t);
    const float temperature = element<float>(a.token_temperature, b, t, a.temperature);
    write_piece(token_softmax(stats[0], stats[1], entropy, temperature, grad_logprob, grad_entropy),
                logits, gradient, start, count, target);
}

template <class T, class G>
void backward(const Logprobs& a, const LogprobsBackward& g) {
    advise_huge_pages<G>(a, g.grad_logits);
    const int64_t pieces = (a.vocab + kPiece - 1) / kPiece;
    const int64_t units = a.rows * a.steps * pieces;
    const int64_t grain = 1 + kParallelWork / (a.vocab + 1);
#pragma omp parallel for schedule(dynamic, grain) if (a.rows * a.steps * a.vocab >= kParallelWork)
    for (int64_t unit = 0; unit < units; ++unit) {
        const int64_t token = unit / pieces;
        backward_piece<T, G>(a, g, token / a.steps, token % a.steps, unit % pieces * kPiece);
    }
}

}  // namespace

void logprobs_backward(const LogprobsBackward& g) {
    const Logprobs& a = g.forward;
    with_types(a.logits, g.grad_logits, [&](auto* logit, auto* gradient) {
        backward<std::decay_t<decltype(*logit)>, std::decay_t<decltype(*gradient)>>(a, g);
    });
}

}  // namespace warpo::cpu::WARPO_ISA
