// Estimators of the KL of each token, and their gradient, tile by tile.
#include "math/approx_kl.h"

#include "cpu/cpu.h"
#include "cpu/load.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

constexpr int kTile = 1024;

// Steps [first, first + count) of a row; `offset` of the first in a dense output.
struct Span {
    int64_t row, first, offset;
    int count;
};

// A tile of tokens as float32: where they lie, or converted into storage.
struct Column {
    alignas(64) float storage[kTile];

    const float* load(const View& view, const Span& span) {
        if (view.dtype == kFloat32 && view.stride1 == 1)
            return address<float>(view, span.row, span.first);
        load_steps(view, span.row, span.first, span.count, storage);
        return storage;
    }
};

struct Flags {
    uint8_t storage[kTile];

    // Null where all are valid.
    const uint8_t* load(const View& mask, const Span& span) {
        if (!mask.data) return nullptr;
        const uint8_t* const flags = address<uint8_t>(mask, span.row, span.first);
        if (mask.stride1 == 1) return flags;
        for (int i = 0; i < span.count; ++i) storage[i] = flags[i * mask.stride1];
        return storage;
    }
};

void zero_masked(const uint8_t* mask, int count, float* out) {
    if (!mask) return;
#pragma omp simd
    for (int i = 0; i < count; ++i) out[i] = mask[i] ? out[i] : 0.0f;
}

template <int kEstimator>
void forward_tile(const ApproxKl& a, const Span& span) {
    Column logprobs, refs;
    Flags flags;
    const float *logp = logprobs.load(a.logprobs, span), *ref = refs.load(a.ref_logprobs, span);
    const float limit = a.limit;
    float* const out = a.kl + span.offset;
#pragma omp simd
    for (int i = 0; i < span.count; ++i)
        out[i] = clamp_symmetric(approx_kl<kEstimator>(logp[i], ref[i]).value, limit);
    zero_masked(flags.load(a.mask, span), span.count, out);
}

template <int kEstimator>
void derivatives(const ApproxKlBackward& a, const float* logp, const float* ref, int count,
                 float* out) {
    // the bound in a loop of its own: in the first one it becomes branches, which do not vectorise
    const float limit = a.limit;
    alignas(64) float values[kTile];
#pragma omp simd
    for (int i = 0; i < count; ++i) {
        const ApproxKlTerm term = approx_kl<kEstimator>(logp[i], ref[i]);
        values[i] = term.value;
        out[i] = term.derivative;
    }
#pragma omp simd
    for (int i = 0; i < count; ++i) out[i] = clamped_derivative({values[i], out[i]}, limit);
}

void weighted_differences(const float* logp, const float* ref, const float* weight, int count,
                          float* out) {
    if (weight) {
#pragma omp simd
        for (int i = 0; i < count; ++i) out[i] = weight[i] * (logp[i] - ref[i]);
    } else {
#pragma omp simd
        for (int i = 0; i < count; ++i) out[i] = logp[i] - ref[i];
    }
}

template <int kEstimator>
void backward_tile(const ApproxKlBackward& a, const Span& span) {
    Column logprobs, refs, weights, grads;
    Flags flags;
    const int count = span.count;
    const float *logp = logprobs.load(a.logprobs, span), *ref = refs.load(a.ref_logprobs, span);
    alignas(64) float grad[kTile];
    if (a.straight_through) {
        const float* const weight = a.weight.data ? weights.load(a.weight, span) : nullptr;
        weighted_differences(logp, ref, weight, count, grad);
    } else {
        derivatives<kEstimator>(a, logp, ref, count, grad);
    }
    const float* const upstream = grads.load(a.grad_kl, span);
#pragma omp simd
    for (int i = 0; i < count; ++i) grad[i] *= upstream[i];
    zero_masked(flags.load(a.mask, span), count, grad);
    if (a.grad_logprobs.data) store_steps(a.grad_logprobs, span.offset, count, grad);
    if (!a.grad_ref.data) return;
#pragma omp simd
    for (int i = 0; i < count; ++i) grad[i] = -grad[i];
    store_steps(a.grad_ref, span.offset, count, grad);
}

template <class Arguments>
void for_each_tile(const Arguments& a, void (*one_tile)(const Arguments&, const Span&)) {
    const int64_t tiles = (a.columns + kTile - 1) / kTile;
#pragma omp parallel for if (a.rows * a.columns >= kParallelWork)
    for (int64_t t = 0; t < a.rows * tiles; ++t) {
        const int64_t row = t / tiles, first = (t - row * tiles) * kTile, left = a.columns - first;
        one_tile(a, {row, first, row * a.columns + first, (int)(left < kTile ? left : kTile)});
    }
}

}  // namespace

void approx_kl_forward(const ApproxKl& a) {
    switch (a.estimator) {
        case kK1: return for_each_tile(a, forward_tile<kK1>);
        case kK2: return for_each_tile(a, forward_tile<kK2>);
        case kK3: return for_each_tile(a, forward_tile<kK3>);
        default: return for_each_tile(a, forward_tile<kReverseK3>);
    }
}

void approx_kl_backward(const ApproxKlBackward& a) {
    switch (a.estimator) {
        case kK1: return for_each_tile(a, backward_tile<kK1>);
        case kK2: return for_each_tile(a, backward_tile<kK2>);
        case kK3: return for_each_tile(a, backward_tile<kK3>);
        default: return for_each_tile(a, backward_tile<kReverseK3>);
    }
}

}  // namespace warpo::cpu::WARPO_ISA
