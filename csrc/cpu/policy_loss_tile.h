// Sequences in parts, parts in tiles: what the policy loss runs over.
#pragma once

#include <vector>

#include "cpu/load.h"
#include "kernels.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

// Tokens whose sums are float32 before they are added up in double, and stay in the L1 cache.
constexpr int kTile = 256;
// Tokens of a sequence that one thread takes. Sums are made part by part, however many threads
// there are, so the result does not depend on their number.
constexpr int64_t kPart = 8192;

// The tokens of one sequence, steps [first, first + count) of a row of the views.
struct Span {
    int64_t row, first, count;
    int64_t grad;  // offset of its gradients
};

Span span_of(const PolicyLoss& a, int64_t sequence) {
    if (!a.cu_seqlens) return {sequence, 0, a.steps, sequence * a.steps};
    const int64_t first = a.cu_seqlens[sequence];
    return {sequence, first, a.cu_seqlens[sequence + 1] - first, first};
}

Span part_of(const Span& span, int64_t part) {
    const int64_t start = part * kPart, rest = span.count - start;
    return {span.row, span.first + start, rest < kPart ? rest : kPart, span.grad + start};
}

// The sums of all parts of a sequence, in their order.
template <class Result, class Function>
Result sum_parts(const Span& span, bool parallel, Function part) {
    const int64_t parts = (span.count + kPart - 1) / kPart;
    Result total;
    if (!parallel) {
        for (int64_t p = 0; p < parts; ++p) total.add(part(part_of(span, p)));
        return total;
    }
    std::vector<Result> results(parts);
#pragma omp parallel for schedule(dynamic)
    for (int64_t p = 0; p < parts; ++p) results[p] = part(part_of(span, p));
    for (const Result& result : results) total.add(result);
    return total;
}

// Up to kTile tokens as float32: where they lie, or converted into `storage`.
class Column {
public:
    const float* load(const View& view, const Span& span, int64_t start, int count) {
        if (view.dtype == kFloat32 && view.stride1 == 1)
            return address<float>(view, span.row, span.first + start);
        load_steps(view, span.row, span.first + start, count, storage_);
        return storage_;
    }

private:
    alignas(64) float storage_[kTile];
};

struct Tile {
    Column logp_storage, old_storage, advantage_storage, ref_storage, sampler_storage;
    const float *logp, *old, *advantage, *ref, *sampler;
    alignas(64) float log_ratio[kTile], correction[kTile], unwanted[kTile];
    alignas(64) int32_t keep[kTile];

    void load_keep(const PolicyLoss& a, const Span& span, int64_t start, int count) {
        if (!a.mask.data) {
            for (int i = 0; i < count; ++i) keep[i] = 1;
            return;
        }
        const uint8_t* mask = address<uint8_t>(a.mask, span.row, span.first + start);
        if (a.mask.stride1 == 1) {
#pragma omp simd
            for (int i = 0; i < count; ++i) keep[i] = mask[i] != 0;
        } else {
            for (int i = 0; i < count; ++i) keep[i] = mask[i * a.mask.stride1] != 0;
        }
    }

    int count_valid(int count) const {
        int valid = 0;
#pragma omp simd reduction(+ : valid)
        for (int i = 0; i < count; ++i) valid += keep[i];
        return valid;
    }

    // Log ratios of the tokens; masked ones hold anything.
    void load_log_ratio(const PolicyLoss& a, const Span& span, int64_t start, int count) {
        logp = logp_storage.load(a.logprobs, span, start, count);
        old = old_storage.load(a.old_logprobs, span, start, count);
        const float *now = logp, *then = old;
#pragma omp simd
        for (int i = 0; i < count; ++i) log_ratio[i] = now[i] - then[i];
    }

    void load_advantage(const PolicyLoss& a, const Span& span, int64_t start, int count) {
        advantage = advantage_storage.load(a.advantages, span, start, count);
    }
};

template <class Function>
void for_each_tile(const Span& span, Function body) {
    for (int64_t start = 0; start < span.count; start += kTile)
        body(start, span.count - start < kTile ? (int)(span.count - start) : kTile);
}

}  // namespace
}  // namespace warpo::cpu::WARPO_ISA
