// Clipped value loss: one block a sequence gives gradients and partial results, a second launch
// merges them in the order of the sequences.
#include "cuda/sequences.h"
#include "math/value_loss.h"

namespace warpo::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

struct Token {
    float value, old, target;
};

__device__ __forceinline__ Token load(const ValueLoss& a, const Span& s, int64_t t) {
    Token token;
    token.value = load_token(a.values, s, t);
    token.old = a.old_values.data ? load_token(a.old_values, s, t) : token.value;
    token.target = load_token(a.returns, s, t);
    return token;
}

__global__ __launch_bounds__(kThreads) void value_loss_kernel(const ValueLoss a) {
    __shared__ float scratch[kWarps];
    const Span s = find_span(a.cu_seqlens, a.sequences, a.steps, blockIdx.x);

    float count = 0.0f, return_sum = 0.0f, error_sum = 0.0f;
    for (int64_t t = threadIdx.x; t < s.count; t += kThreads) {
        if (!is_valid(a.mask, s, t)) continue;
        const float target = load_token(a.returns, s, t);
        count += 1.0f;
        return_sum += target;
        error_sum += target - load_token(a.values, s, t);
    }
    count = block_sum<kWarps>(count, scratch);
    const float share = inverse_or_zero(count);
    const float return_mean = block_sum<kWarps>(return_sum, scratch) * share;
    const float error_mean = block_sum<kWarps>(error_sum, scratch) * share;
    const float weight = poison_if(
        s.malformed,
        inverse_or_zero(*a.denominator) * (a.sequence_mean && count > 0.0f ? share : 1.0f));

    float loss = 0.0f, clipped = 0.0f, return_m2 = 0.0f, error_m2 = 0.0f;
    float* const grad = a.grad_values ? a.grad_values + s.offset : nullptr;
    for (int64_t t = threadIdx.x; t < s.count; t += kThreads) {
        float derivative = 0.0f;
        if (is_valid(a.mask, s, t)) {
            const Token token = load(a, s, t);
            const ValueTerm term = clipped_value_loss(token.value, token.old, token.target,
                                                      a.clip_range, a.huber_delta);
            const float centred = token.target - return_mean;
            const float error = token.target - token.value - error_mean;
            derivative = weighted(weight, term.derivative);
            loss += term.loss;
            clipped += term.clipped;
            return_m2 = fmaf(centred, centred, return_m2);
            error_m2 = fmaf(error, error, error_m2);
        }
        if (grad) grad[t] = derivative;
    }
    loss = weighted(weight, block_sum<kWarps>(loss, scratch));
    clipped = block_sum<kWarps>(clipped, scratch);
    return_m2 = block_sum<kWarps>(return_m2, scratch);
    error_m2 = block_sum<kWarps>(error_m2, scratch);
    if (threadIdx.x != 0) return;
    float* const out = a.partials + static_cast<int64_t>(blockIdx.x) * kNumValueMetrics;
    out[kValueLoss] = loss;
    out[kValueTokens] = count;
    out[kValueClipped] = clipped;
    out[kReturnMean] = return_mean;
    out[kReturnM2] = return_m2;
    out[kErrorMean] = error_mean;
    out[kErrorM2] = error_m2;
}

}  // namespace

void value_loss(const ValueLoss& a, Stream stream) {
    DeviceGuard guard(stream.device, "value_loss");
    if (a.sequences > 0) launch("value_loss", stream, a.sequences, kThreads, value_loss_kernel, a);
    launch_merge<kNumValueMetrics, kValueTokens, kReturnMean>("value_loss", stream, a.partials,
                                                              a.sequences, a.loss, a.metrics);
}

}  // namespace warpo::cuda
