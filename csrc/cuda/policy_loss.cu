// Clipped policy loss: one block a sequence gives gradients and partial sums, a second launch adds
// up the sums in the order of the sequences.
#include "cuda/device.h"
#include "cuda/launch.h"
#include "math/policy_loss.h"

namespace warpo::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kReduceThreads = 32 * kNumMetrics;

// Where the tokens of a sequence lie.
struct Sequence {
    int64_t row, first, length;
    float* grad;  // of token 0, or nullptr
};

__device__ __forceinline__ Sequence find_sequence(const PolicyLoss& a, int64_t index) {
    Sequence s = {index, 0, a.steps, nullptr};
    int64_t grad_row = index;
    if (a.cu_seqlens) {
        // The arrays see the sequence as their row: per token with stride 0, per sequence with
        // stride 1.
        grad_row = 0;
        s.first = a.cu_seqlens[index];
        s.length = a.cu_seqlens[index + 1] - s.first;
    }
    if (a.grad_logprobs) s.grad = a.grad_logprobs + grad_row * a.steps + s.first;
    return s;
}

__device__ __forceinline__ bool is_valid(const PolicyLoss& a, const Sequence& s, int64_t t) {
    return !a.mask.data || load_flag(a.mask, s.row, s.first + t);
}

// A clamped log ratio and what follows from it.
struct Ratio {
    float log_ratio, ratio;
    bool inside;  // not clamped: the gradient passes
};

__device__ __forceinline__ Ratio make_ratio(float log_ratio, float limit) {
    const float bounded = clamp_symmetric(log_ratio, limit);
    return {bounded, exp_f32(bounded), !is_outside(log_ratio, limit)};
}

struct Sums {
    float values[kNumMetrics];
};

__device__ __forceinline__ Sums no_sums() {
    Sums sums = {};
    sums.values[kRatioMin] = INFINITY;
    sums.values[kRatioMax] = -INFINITY;
    return sums;
}

__device__ __forceinline__ float reduce_pair(int metric, float a, float b) {
    // fminf and fmaxf would drop a NaN
    if (metric == kRatioMin) return b < a || b != b ? b : a;
    if (metric == kRatioMax) return b > a || b != b ? b : a;
    return a + b;
}

__device__ __forceinline__ float reduce_warp(int metric, float value) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes >>= 1) {
        value = reduce_pair(metric, value, __shfl_down_sync(kAllLanes, value, lanes));
    }
    return value;
}

// Adds one valid token to the sums; returns the derivative of its surrogate with respect to the log
// ratio.
__device__ __forceinline__ float add_token(Sums& sums, const PolicyLoss& a, const Ratio& r,
                                           float advantage, float weight, const KlTerm& kl) {
    const Surrogate s = clipped_surrogate(r.ratio, advantage, a.ratio_low, a.ratio_high);
    const float terms[kNumMetrics] = {
        weight * -s.value, weight * kl.value, 1.0f,
        s.clipped_low,     s.clipped_high,    r.ratio,
        r.ratio,           r.ratio,           exp_minus_1_minus_x(r.log_ratio),
        kl.value};
#pragma unroll
    for (int m = 0; m < kNumMetrics; ++m) sums.values[m] = reduce_pair(m, sums.values[m], terms[m]);
    return r.inside ? s.derivative : 0.0f;
}

__device__ __forceinline__ KlTerm load_kl(const PolicyLoss& a, const Sequence& s, int64_t t,
                                          float logp) {
    if (a.kl == kNoKl) return {0.0f, 0.0f};
    return kl_estimate(logp, load_float(a.ref_logprobs, s.row, s.first + t), a.kl,
                       a.log_ratio_limit);
}

__global__ __launch_bounds__(kThreads) void sequence_kernel(const PolicyLoss a) {
    __shared__ float scratch[kWarps];
    __shared__ float partial[kWarps][kNumMetrics];
    const Sequence s = find_sequence(a, blockIdx.x);
    float weight = *a.denominator > 0.0f ? 1.0f / fmaxf(*a.denominator, 1e-30f) : 0.0f;

    float count = 0.0f, log_ratio_sum = 0.0f;
    if (a.sequence_level || a.sequence_mean) {
        for (int64_t t = threadIdx.x; t < s.length; t += kThreads) {
            if (!is_valid(a, s, t)) continue;
            count += 1.0f;
            log_ratio_sum += load_float(a.logprobs, s.row, s.first + t) -
                             load_float(a.old_logprobs, s.row, s.first + t);
        }
        count = fmaxf(block_sum<kWarps>(count, scratch), 1.0f);
        log_ratio_sum = block_sum<kWarps>(log_ratio_sum, scratch);
    }
    if (a.sequence_mean) weight /= count;
    Ratio ratio = make_ratio(log_ratio_sum / fmaxf(count, 1.0f), a.log_ratio_limit);

    Sums sums = no_sums();
    float derivative_sum = 0.0f;
    for (int64_t t = threadIdx.x; t < s.length; t += kThreads) {
        float grad = 0.0f;
        if (is_valid(a, s, t)) {
            const float logp = load_float(a.logprobs, s.row, s.first + t);
            if (!a.sequence_level) {
                ratio = make_ratio(logp - load_float(a.old_logprobs, s.row, s.first + t),
                                   a.log_ratio_limit);
            }
            const KlTerm kl = load_kl(a, s, t, logp);
            const float advantage = load_float(a.advantages, s.row, s.first + t);
            const float derivative = add_token(sums, a, ratio, advantage, weight, kl);
            derivative_sum += derivative;
            grad = weight * (a.kl_coef * kl.derivative - derivative);
        }
        if (s.grad && !a.sequence_level) s.grad[t] = grad;
    }
    if (s.grad && a.sequence_level) {
        // Every valid token moves the mean log ratio by 1 / count, and with it the surrogates of
        // all.
        const float shared = block_sum<kWarps>(derivative_sum, scratch) / count;
        for (int64_t t = threadIdx.x; t < s.length; t += kThreads) {
            float grad = 0.0f;
            if (is_valid(a, s, t)) {
                const KlTerm kl = load_kl(a, s, t, load_float(a.logprobs, s.row, s.first + t));
                grad = weight * (a.kl_coef * kl.derivative - shared);
            }
            s.grad[t] = grad;
        }
    }

#pragma unroll
    for (int m = 0; m < kNumMetrics; ++m) {
        const float value = reduce_warp(m, sums.values[m]);
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32][m] = value;
    }
    __syncthreads();
    if (threadIdx.x < kNumMetrics) {
        const int m = static_cast<int>(threadIdx.x);
        float value = partial[0][m];
        for (int warp = 1; warp < kWarps; ++warp) value = reduce_pair(m, value, partial[warp][m]);
        a.partials[static_cast<int64_t>(blockIdx.x) * kNumMetrics + m] = value;
    }
}

// One block: warp m adds up metric m.
__global__ __launch_bounds__(kReduceThreads) void reduce_kernel(const PolicyLoss a) {
    __shared__ float totals[kNumMetrics];
    const int metric = static_cast<int>(threadIdx.x / 32),
              lane = static_cast<int>(threadIdx.x % 32);
    float value = metric == kRatioMin ? INFINITY : metric == kRatioMax ? -INFINITY : 0.0f;
    for (int64_t s = lane; s < a.sequences; s += 32) {
        value = reduce_pair(metric, value, a.partials[s * kNumMetrics + metric]);
    }
    value = reduce_warp(metric, value);
    if (lane == 0) a.metrics[metric] = totals[metric] = value;
    __syncthreads();
    if (threadIdx.x == 0) {
        *a.loss = a.kl == kNoKl ? totals[kPolicyLoss]
                                : fmaf(a.kl_coef, totals[kKlLoss], totals[kPolicyLoss]);
    }
}

}  // namespace

void policy_loss(const PolicyLoss& a, Stream stream) {
    DeviceGuard guard(stream.device, "policy_loss");
    if (a.sequences > 0) launch("policy_loss", stream, a.sequences, kThreads, sequence_kernel, a);
    launch("policy_loss", stream, 1, kReduceThreads, reduce_kernel, a);
}

}  // namespace warpo::cuda
