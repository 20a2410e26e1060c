// Policy loss: a block a sequence, or a part of one where sequences are few and long, gives
// gradients and partial sums; the last one adds the sums up in the order of the sequences.
//
// Where a term needs the whole sequence, each of its blocks reads all of it (from the L2 cache), in
// one order: no gradient depends on the number of blocks.
#include <algorithm>

#include "cuda/counter.h"
#include "cuda/policy_loss_sums.h"
#include "cuda/sequences.h"
#include "math/policy_loss.h"

namespace warpo::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
// Tokens that a thread reads at once where it sums over a whole sequence.
constexpr int kAtOnce = 4;

// The tokens of a block: steps [begin, end) of a sequence.
struct Part {
    Span sequence;
    int begin, end;
};

__device__ __forceinline__ Part find_part(const PolicyLoss& a, unsigned parts) {
    const unsigned sequence = blockIdx.x / parts, index = blockIdx.x % parts;
    Part p = {find_span(a.cu_seqlens, a.sequences, a.steps, sequence), 0, 0};
    const int length = static_cast<int>(p.sequence.count);
    const unsigned tiles = (length + kThreads - 1u) / kThreads;
    const unsigned size = (tiles + parts - 1) / parts * kThreads;
    p.begin = static_cast<int>(min(static_cast<int64_t>(index) * size, int64_t{length}));
    p.end = static_cast<int>(min(static_cast<int64_t>(p.begin) + size, int64_t{length}));
    return p;
}

__device__ __forceinline__ GeometricTerm clip_geometric(const PolicyLoss& a, float log_ratio,
                                                        float advantage) {
    return geometric_log_ratio(log_ratio, advantage, logf(a.ratio_low), logf(a.ratio_high));
}

// The correction of a token. log_weight: of its sequence.
__device__ __forceinline__ CorrectionTerm correct(const PolicyLoss& a, float log_weight, float old,
                                                  float sampler) {
    if (a.correction == kNoCorrection) return {1.0f, 0.0f};
    return correction_weight(a.correction_sequence ? log_weight : old - sampler, a.correction,
                             a.correction_low, a.correction_high, a.log_ratio_limit);
}

struct SequenceTerms {
    float tokens;                 // valid ones, 1 at least
    float log_ratio, log_weight;  // mean or sum of the log ratio, sum of the log correction
    float by_log_ratio;           // what the surrogates of all change by with the token's own
    KlTerm kl;                    // of the whole sequence
};

// Their kernels know estimators beyond kK3 and the KL of a sequence; the others save registers.
bool has_any_kl(const PolicyLoss& a) { return a.kl > kK3 || (a.kl != kNoKl && a.kl_sequence); }

// Of sums over the tokens of a sequence: the mean, or the sum itself.
__device__ __forceinline__ float divisor_of(const PolicyLoss& a, const SequenceTerms& s) {
    return a.ratio_level == kSequenceRatio ? s.tokens : 1.0f;
}

template <int kSurrogate>
__device__ __forceinline__ void sum_logarithms(const PolicyLoss& a, const Part& p, SequenceTerms& s,
                                               float* scratch) {
    const bool with_ratio = shares_ratio(a.ratio_level);
    const bool with_weight = a.correction != kNoCorrection && a.correction_sequence;
    float tokens = 0.0f, log_ratio = 0.0f, log_weight = 0.0f;
    const int length = static_cast<int>(p.sequence.count);
    for (int start = 0; start < length; start += kThreads * kAtOnce) {
        const int t = start + static_cast<int>(threadIdx.x);
        const auto load = [&](auto& bits, const View& view) {
            load_tokens<kThreads>(bits, view, p.sequence, t, length);
        };
        bool keep[kAtOnce];
        uint32_t logp[kAtOnce] = {}, old[kAtOnce] = {}, advantage[kAtOnce] = {};
        uint32_t sampler[kAtOnce] = {};
        if (with_ratio || with_weight) load(old, a.old_logprobs);
        if (with_ratio) load(logp, a.logprobs);
        if (kSurrogate == kGeometric) load(advantage, a.advantages);
        if (with_weight) load(sampler, a.sampler_logprobs);
        load_valid<kThreads>(keep, a.mask, p.sequence, t, length);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            if (!keep[i]) continue;
            tokens += 1.0f;
            const float old_logp = to_float(a.old_logprobs, old[i]);
            float own = to_float(a.logprobs, logp[i]) - old_logp;
            if (kSurrogate == kGeometric) {
                own = clip_geometric(a, own, to_float(a.advantages, advantage[i])).log_ratio;
            }
            log_ratio += own;
            log_weight += old_logp - to_float(a.sampler_logprobs, sampler[i]);
        }
    }
    s.tokens = fmaxf(block_sum<kWarps>(tokens, scratch), 1.0f);
    if (with_ratio) s.log_ratio = block_sum<kWarps>(log_ratio, scratch) / divisor_of(a, s);
    if (with_weight) s.log_weight = block_sum<kWarps>(log_weight, scratch);
}

template <int kSurrogate>
__device__ __forceinline__ void sum_derivatives(const PolicyLoss& a, const Part& p,
                                                SequenceTerms& s, float* scratch) {
    const bool with_weight = a.correction != kNoCorrection && !a.correction_sequence;
    float total = 0.0f;
    const int length = static_cast<int>(p.sequence.count);
    for (int start = 0; start < length; start += kThreads * kAtOnce) {
        const int t = start + static_cast<int>(threadIdx.x);
        const auto load = [&](auto& bits, const View& view) {
            load_tokens<kThreads>(bits, view, p.sequence, t, length);
        };
        bool keep[kAtOnce];
        uint32_t advantage[kAtOnce], old[kAtOnce] = {}, sampler[kAtOnce] = {};
        load(advantage, a.advantages);
        if (with_weight) {
            load(old, a.old_logprobs);
            load(sampler, a.sampler_logprobs);
        }
        load_valid<kThreads>(keep, a.mask, p.sequence, t, length);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            if (!keep[i]) continue;
            const float weight = correct(a, s.log_weight, to_float(a.old_logprobs, old[i]),
                                         to_float(a.sampler_logprobs, sampler[i]))
                                     .weight;
            // logp does not enter the derivative
            total += token_terms<kSurrogate>(surrogate_options(a), s.log_ratio, 0.0f,
                                             to_float(a.advantages, advantage[i]), weight)
                         .by_log_ratio;
        }
    }
    s.by_log_ratio = block_sum<kWarps>(total, scratch) / divisor_of(a, s);
}

// Every token has this KL, and moves that of all.
__device__ __forceinline__ void find_kl(const PolicyLoss& a, const Part& p, SequenceTerms& s,
                                        float* scratch) {
    float tokens = 0.0f, difference = 0.0f;
    const int length = static_cast<int>(p.sequence.count);
    for (int start = 0; start < length; start += kThreads * kAtOnce) {
        const int t = start + static_cast<int>(threadIdx.x);
        bool keep[kAtOnce];
        uint32_t logp[kAtOnce], ref[kAtOnce];
        load_tokens<kThreads>(logp, a.logprobs, p.sequence, t, length);
        load_tokens<kThreads>(ref, a.ref_logprobs, p.sequence, t, length);
        load_valid<kThreads>(keep, a.mask, p.sequence, t, length);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            if (!keep[i]) continue;
            tokens += 1.0f;
            difference += to_float(a.ref_logprobs, ref[i]) - to_float(a.logprobs, logp[i]);
        }
    }
    tokens = block_sum<kWarps>(tokens, scratch);
    s.kl = kl_of_difference(block_sum<kWarps>(difference, scratch), a.kl, a.kl_straight_through,
                            a.log_ratio_limit);
    s.kl.derivative *= tokens;
}

// What the tokens of a part need of their whole sequence.
template <int kSurrogate, bool kAnyKl>
__device__ __forceinline__ SequenceTerms find_sequence_terms(const PolicyLoss& a, const Part& p,
                                                             float* scratch) {
    SequenceTerms s = {fmaxf(static_cast<float>(p.sequence.count), 1.0f), 0.0f, 0.0f, 0.0f, {0.0f, 0.0f}};
    if (p.begin == p.end) return s;
    if (kAnyKl && a.kl_sequence) find_kl(a, p, s, scratch);
    const bool with_ratio = shares_ratio(a.ratio_level);
    const bool with_weight = a.correction != kNoCorrection && a.correction_sequence;
    if (with_ratio || with_weight || (a.sequence_mean && a.mask.data)) {
        sum_logarithms<kSurrogate>(a, p, s, scratch);
    }
    constexpr bool kThroughRatio =
        kSurrogate != kStopGradient && kSurrogate != kReinforce && kSurrogate != kGamma;
    if (kThroughRatio && with_ratio && a.grad_logprobs) {
        sum_derivatives<kSurrogate>(a, p, s, scratch);
    }
    return s;
}

// Sum of the values of all threads up to this one, and of the threads of earlier calls.
__device__ __forceinline__ float scan_block(float value, float& carry, float* scratch) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes <<= 1) {
        const float earlier = __shfl_sync(kAllLanes, value, max(lane - lanes, 0));
        if (lane >= lanes) value += earlier;
    }
    if (lane == 31) scratch[warp] = value;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        if (w == warp) value += carry;
        carry += scratch[w];
    }
    __syncthreads();
    return value;
}

struct Sums {
    float values[kNumMetrics];
};

// A valid token.
struct Token {
    float logp, old, advantage, log_ratio;  // log_ratio: at the level of the objective
};

// Adds a token to the sums; returns the derivative of its loss, not yet weighted, in its logp.
template <int kSurrogate, bool kAnyKl>
__device__ __forceinline__ float add_token(Sums& sums, const PolicyLoss& a, const Part& p, int t,
                                           const Token& token, const SequenceTerms& s,
                                           float kl_coef) {
    const auto load = [&](auto& bits, const View& view) {
        load_tokens<kThreads>(bits, view, p.sequence, t, p.end);
    };
    uint32_t sampler[1] = {}, ref[1] = {}, entropy[1] = {};
    if (a.correction != kNoCorrection) load(sampler, a.sampler_logprobs);
    if (a.kl != kNoKl) load(ref, a.ref_logprobs);
    if (a.entropy.data) load(entropy, a.entropy);
    const CorrectionTerm correction =
        correct(a, s.log_weight, token.old, to_float(a.sampler_logprobs, sampler[0]));
    TokenTerms terms = token_terms<kSurrogate>(surrogate_options(a), token.log_ratio, token.logp,
                                               token.advantage, correction.weight);
    constexpr bool kThroughRatio = kSurrogate != kStopGradient && kSurrogate != kReinforce;
    if (kThroughRatio && shares_ratio(a.ratio_level)) terms.by_log_ratio = s.by_log_ratio;
    if (kSurrogate == kGeometric) {
        const GeometricTerm g = clip_geometric(a, token.logp - token.old, token.advantage);
        terms.clipped_low = g.clipped_low;
        terms.clipped_high = g.clipped_high;
        if (g.clipped_low + g.clipped_high != 0.0f) terms.by_log_ratio = 0.0f;
    }
    KlTerm kl = s.kl;
    if (a.kl != kNoKl && !(kAnyKl && a.kl_sequence)) {
        kl = kl_of_difference<kAnyKl>(to_float(a.ref_logprobs, ref[0]) - token.logp, a.kl,
                                      a.kl_straight_through, a.log_ratio_limit);
    }
    // The weighted sums are those of kKl and kEntropy times the weight.
    const float added[kNumMetrics] = {-terms.value,
                                      0.0f,
                                      0.0f,
                                      1.0f,
                                      terms.clipped_low,
                                      terms.clipped_high,
                                      terms.clipped_dual,
                                      terms.ratio,
                                      terms.ratio,
                                      terms.ratio,
                                      terms.approx_kl,
                                      kl.value,
                                      to_float(a.entropy, entropy[0]),
                                      correction.weight,
                                      correction.corrected,
                                      clamp_symmetric(token.logp - token.old, a.log_ratio_limit)};
#pragma unroll
    for (int m = 0; m < kNumMetrics; ++m) {
        if (m == kKlLoss || m == kEntropyLoss) continue;
        sums.values[m] = reduce_pair(m, sums.values[m], added[m]);
    }
    return kl_coef * kl.derivative - terms.by_log_ratio - terms.by_logp;
}

template <int kSurrogate, bool kAnyKl>
__device__ __forceinline__ void write_part(const PolicyLoss& a, unsigned parts) {
    __shared__ float scratch[kWarps];
    __shared__ float partial[kWarps][kNumMetrics];
    const Part p = find_part(a, parts);
    const SequenceTerms s = find_sequence_terms<kSurrogate, kAnyKl>(a, p, scratch);
    const float weight = poison_if(
        p.sequence.malformed, token_weight(value_of(a.denominator), a.sequence_mean, s.tokens));
    const float kl_coef = a.adaptive_kl_coef ? *a.adaptive_kl_coef : a.kl_coef;

    Sums sums;
#pragma unroll
    for (int m = 0; m < kNumMetrics; ++m) sums.values[m] = first_of(m);
    float carry = 0.0f;
    for (int start = p.begin; start < p.end; start += kThreads) {
        const int t = start + static_cast<int>(threadIdx.x);
        const auto load = [&](auto& bits, const View& view) {
            load_tokens<kThreads>(bits, view, p.sequence, t, p.end);
        };
        bool keep[1];
        uint32_t logp[1], old[1], advantage[1];
        load(logp, a.logprobs);
        load(old, a.old_logprobs);
        load(advantage, a.advantages);
        load_valid<kThreads>(keep, a.mask, p.sequence, t, p.end);
        Token token = {to_float(a.logprobs, logp[0]), to_float(a.old_logprobs, old[0]),
                       to_float(a.advantages, advantage[0]), s.log_ratio};
        if (!shares_ratio(a.ratio_level))
            token.log_ratio = keep[0] ? token.logp - token.old : 0.0f;
        if (kSurrogate == kStopGradient && a.ratio_level == kPrefixRatio) {
            token.log_ratio = scan_block(token.log_ratio, carry, scratch);
        }
        float grad = 0.0f;
        if (keep[0]) {
            grad = weighted(weight, add_token<kSurrogate, kAnyKl>(sums, a, p, t, token, s, kl_coef));
        }
        if (t >= p.end) continue;
        const int64_t out = p.sequence.offset + t;
        if (a.grad_logprobs) a.grad_logprobs[out] = grad;
        if (a.grad_entropy) a.grad_entropy[out] = keep[0] ? -weight * a.entropy_coef : 0.0f;
    }

    sums.values[kPolicyLoss] = weighted(weight, sums.values[kPolicyLoss]);
    sums.values[kKlLoss] = weighted(weight, sums.values[kKl]);
    sums.values[kEntropyLoss] = weighted(weight, sums.values[kEntropy]);
#pragma unroll
    for (int m = 0; m < kNumMetrics; ++m) {
        const float value = reduce_warp(m, sums.values[m]);
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32][m] = value;
    }
    __syncthreads();
    if (threadIdx.x < kNumMetrics) {
        const int m = static_cast<int>(threadIdx.x);
        float value = partial[0][m];
#pragma unroll
        for (int warp = 1; warp < kWarps; ++warp) value = reduce_pair(m, value, partial[warp][m]);
        a.partials[static_cast<int64_t>(blockIdx.x) * kNumMetrics + m] = value;
    }
}

// rows: sequences * parts. blocks: as many, and 1 without a sequence.
template <int kSurrogate, bool kAnyKl>
__global__ __launch_bounds__(kThreads) void policy_loss_kernel(const PolicyLoss a, unsigned parts,
                                                               unsigned rows, unsigned blocks,
                                                               unsigned* counter) {
    if (blockIdx.x < rows) write_part<kSurrogate, kAnyKl>(a, parts);
    if (last_block(counter, blocks)) add_rows<kWarps>(a, rows);
}

// Blocks a sequence: one where the rows of partial sums are taken, or where sums up to a token are
// made in the order of the tokens.
int64_t count_parts(const PolicyLoss& a) {
    if (a.ratio_level == kPrefixRatio) return 1;
    const int64_t tiles = (a.steps + kThreads - 1) / kThreads;
    return std::max<int64_t>(1, std::min(kMinPartials / a.sequences, tiles));
}

template <int kSurrogate>
void launch_surrogate(const PolicyLoss& a, Stream stream) {
    const int64_t parts = a.sequences > 0 ? count_parts(a) : 1, rows = a.sequences * parts;
    const int64_t blocks = std::max<int64_t>(rows, 1);
    const auto kernel = has_any_kl(a) ? policy_loss_kernel<kSurrogate, true>
                                      : policy_loss_kernel<kSurrogate, false>;
    launch("policy_loss", stream, blocks, kThreads, kernel, a,
           static_cast<unsigned>(parts), static_cast<unsigned>(rows), static_cast<unsigned>(blocks),
           counter_of(stream, "policy_loss"));
}

}  // namespace

void policy_loss(const PolicyLoss& a, Stream stream) {
    DeviceGuard guard(stream.device, "policy_loss");
    switch (a.surrogate) {
        case kClip: return launch_surrogate<kClip>(a, stream);
        case kDualClip: return launch_surrogate<kDualClip>(a, stream);
        case kStopGradient: return launch_surrogate<kStopGradient>(a, stream);
        case kMaskOutside: return launch_surrogate<kMaskOutside>(a, stream);
        case kReinforce: return launch_surrogate<kReinforce>(a, stream);
        case kGeometric: return launch_surrogate<kGeometric>(a, stream);
        case kSoftGate: return launch_surrogate<kSoftGate>(a, stream);
        case kDivergenceTv: return launch_surrogate<kDivergenceTv>(a, stream);
        case kDivergenceKl: return launch_surrogate<kDivergenceKl>(a, stream);
        case kGamma: return launch_surrogate<kGamma>(a, stream);
        default: return launch_surrogate<kUnclipped>(a, stream);
    }
}

}  // namespace warpo::cuda
