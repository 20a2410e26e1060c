// Log-probability and entropy: one read of the logits from memory, one exp an element.
#include "cpu/cpu.h"
#include "cpu/softmax_row.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

template <class T, bool kEntropy>
void forward(const Logprobs& a) {
    const int64_t tokens = a.rows * a.steps;
    const bool split = splits_rows(a);
    const int64_t grain = 1 + kParallelWork / (a.vocab + 1);
#pragma omp parallel for schedule(dynamic, grain) if (!split && tokens * a.vocab >= kParallelWork)
    for (int64_t token = 0; token < tokens; ++token)
        read_token<T, kEntropy>(a, token / a.steps, token % a.steps, true, split);
}

}  // namespace

void logprobs_forward(const Logprobs& a) {
    const bool entropy = a.entropy.data != nullptr;
    switch (a.logits.dtype) {
        case kFloat32: return entropy ? forward<float, true>(a) : forward<float, false>(a);
        case kBFloat16: return entropy ? forward<BFloat16, true>(a) : forward<BFloat16, false>(a);
        default: return entropy ? forward<Float16, true>(a) : forward<Float16, false>(a);
    }
}

}  // namespace warpo::cpu::WARPO_ISA
