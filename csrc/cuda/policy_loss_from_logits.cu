// Log-probabilities, and the gradient of the policy loss from a second read of the row that hits
// the L2 cache: one block a row and a multiprocessor, so that the rows between their two reads are
// about 300 KB for each multiprocessor, less than the L2 cache holds.
#include "cuda/logits_writer.h"
#include "math/policy_loss_from_logits.h"

namespace warpo::cuda {
namespace {

constexpr int kThreads = 1024, kScaleThreads = 256, kScaleBlocks = 2048;

__device__ __forceinline__ bool in_a_sequence(const PolicyLossFromLogits& a, int64_t step) {
    return !a.cu_seqlens || (step >= a.cu_seqlens[0] && step < a.cu_seqlens[a.sequences]);
}

__device__ __forceinline__ float load_if_present(const View& view, const Token& token) {
    return view.data ? load_float(view, token.row, token.step) : 0.0f;
}

__device__ __forceinline__ TokenInputs load_inputs(const PolicyLossFromLogits& a,
                                                   const Token& token) {
    return {load_if_present(a.old_logprobs, token), load_if_present(a.advantages, token),
            load_if_present(a.ref_logprobs, token), load_if_present(a.sampler_logprobs, token),
            load_if_present(a.valid_tokens, token)};
}

template <int kDType, int kOutDType>
__device__ __forceinline__ void fill_row(typename Element<kOutDType>::Bits* gradient, int vocab,
                                         uint32_t pattern) {
    constexpr int kColumns = kLoads * kThreads * Element<kDType>::kPerVector;
    for (int chunk = 0; chunk * kColumns < vocab; ++chunk)
        fill_columns<kDType, kOutDType, kThreads>(
            gradient, own_columns<kDType, kOutDType, kThreads>(gradient, vocab, chunk), pattern);
}

// What thread 0 finds and all threads use.
struct Found {
    SoftmaxGradient gradient;
    bool is_zero;
};

__device__ __forceinline__ Found find_gradient(const PolicyLossFromLogits& a,
                                               const SoftmaxState& state, float chosen,
                                               const TokenInputs& inputs) {
    const Logprobs& forward = a.forward;
    const Token token = load_token(forward, blockIdx.x);
    const float temperature = load_temperature(forward, token);
    const SoftmaxRow row = softmax_finish(state);
    const float logp = logp_of(chosen, state.max, row.log_sum, temperature);
    store_token(forward, token, blockIdx.x, logp, row.entropy, state.max, row.log_sum);
    const TokenGradient by = token_gradient(a, inputs, logp);
    return {softmax_gradient(state.max, row.log_sum, temperature, by.by_logp, row.entropy,
                             by.by_entropy),
            by.by_logp == 0.0f && by.by_entropy == 0.0f && isfinite(row.log_sum)};
}

template <int kDType, int kOutDType, bool kEntropy>
__global__ __launch_bounds__(kThreads, 1) void loss_kernel(const PolicyLossFromLogits a) {
    using E = Element<kDType>;
    using Out = Element<kOutDType>;
    __shared__ Chunks<kThreads> parts;
    __shared__ float chosen;
    __shared__ TokenInputs inputs;
    __shared__ Found found;
    const int vocab = static_cast<int>(a.forward.vocab);
    {
        Token token = load_token(a.forward, blockIdx.x);
        token.valid = token.valid && in_a_sequence(a, token.step);
        if (!token.valid || !token.in_range) {
            fill_row<kDType, kOutDType>(row_of<kOutDType>(a.grad_logits, token), vocab,
                                        token.valid ? Out::kNaN : 0u);
            if (threadIdx.x == 0) store_unread(a.forward, token, blockIdx.x);
            return;
        }
        const typename E::Bits* row = row_of<kDType>(a.forward.logits, token);
        // Here, so that they are there when the row has been read.
        if (threadIdx.x == 0) {
            chosen = load_logit<kDType>(row, token.target);
            inputs = load_inputs(a, token);
        }
        const SoftmaxState state = read_row<kDType, kThreads, true>(
            parts, row, vocab, kLog2e / load_temperature(a.forward, token));
        if (threadIdx.x == 0) found = find_gradient(a, state, chosen, inputs);
        __syncthreads();
    }
    // Loaded for the second time: held over the loop it would take registers of it.
    const Token token = load_token(a.forward, blockIdx.x);
    typename Out::Bits* gradient = row_of<kOutDType>(a.grad_logits, token);
    if (found.is_zero) return fill_row<kDType, kOutDType>(gradient, vocab, 0u);

    const SoftmaxGradient softmax = found.gradient;
    constexpr int kColumns = kLoads * kThreads * E::kPerVector;
    // From the end: what was read last is the surest to be in the cache.
    for (int chunk = (vocab - 1) / kColumns; chunk >= 0; --chunk) {
        write_columns<kDType, kOutDType, kThreads, kEntropy>(
            row_of<kDType>(a.forward.logits, token), gradient,
            own_columns<kDType, kOutDType, kThreads>(gradient, vocab, chunk), softmax, vocab,
            static_cast<int>(token.target));
    }
}

// A grid of fixed size: where the factor is 1 it ends at once.
template <int kDType>
__global__ __launch_bounds__(kScaleThreads) void scale_kernel(const ScaleGradient a, int chunks,
                                                              int blocks) {
    using E = Element<kDType>;
    const float factor = *a.factor;
    if (factor == 1.0f) return;
    const int vocab = static_cast<int>(a.vocab);
    const int64_t units = a.rows * a.steps * chunks;
    for (int64_t unit = blockIdx.x; unit < units; unit += blocks) {
        const int64_t token = unit / chunks;
        typename E::Bits* row = static_cast<typename E::Bits*>(a.gradient.data) +
                                offset_of(a.gradient, token / a.steps, token % a.steps);
        const Columns own =
            own_columns<kDType, kDType, kScaleThreads>(row, vocab, static_cast<int>(unit % chunks));
        auto scaled = [factor](uint32_t word) {
            float x[E::kPerWord];
            E::unpack(word, x);
            for (int i = 0; i < E::kPerWord; ++i) x[i] *= factor;
            return E::pack(x);
        };
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
            const int column = own.first + k * kScaleThreads * E::kPerVector;
            if (column >= own.end) break;
            const uint4 v = load_once(row + column);
            store_streaming(row + column,
                            make_uint4(scaled(v.x), scaled(v.y), scaled(v.z), scaled(v.w)));
        }
        if (own.single >= 0)
            row[own.single] = static_cast<typename E::Bits>(scaled(row[own.single]));
    }
}

template <int kDType, int kOutDType>
void loss(const PolicyLossFromLogits& a, Stream stream) {
    const auto kernel = a.entropy_coef != 0.0f ? loss_kernel<kDType, kOutDType, true>
                                               : loss_kernel<kDType, kOutDType, false>;
    launch("policy_loss_from_logits", stream, a.forward.rows * a.forward.steps, kThreads, kernel,
           a);
}

template <int kDType>
void scale(const ScaleGradient& a, Stream stream) {
    const int64_t columns = int64_t{kLoads} * kScaleThreads * Element<kDType>::kPerVector;
    const int chunks = static_cast<int>((a.vocab + columns - 1) / columns);
    const int64_t units = a.rows * a.steps * chunks;
    const int blocks = static_cast<int>(units < kScaleBlocks ? units : kScaleBlocks);
    launch("scale_gradient", stream, blocks, kScaleThreads, scale_kernel<kDType>, a, chunks,
           blocks);
}

}  // namespace

void policy_loss_from_logits(const PolicyLossFromLogits& a, Stream stream) {
    DeviceGuard guard(stream.device, "policy_loss_from_logits");
    check_sizes(a.forward, "policy_loss_from_logits");
    if (a.forward.rows * a.forward.steps == 0) return;
    switch (a.forward.logits.dtype) {
        case kBFloat16: return loss<kBFloat16, kBFloat16>(a, stream);
        case kFloat16: return loss<kFloat16, kFloat16>(a, stream);
    }
    switch (a.grad_logits.dtype) {
        case kBFloat16: return loss<kFloat32, kBFloat16>(a, stream);
        case kFloat16: return loss<kFloat32, kFloat16>(a, stream);
        default: return loss<kFloat32, kFloat32>(a, stream);
    }
}

void scale_gradient(const ScaleGradient& a, Stream stream) {
    DeviceGuard guard(stream.device, "scale_gradient");
    if (a.rows * a.steps == 0) return;
    switch (a.gradient.dtype) {
        case kBFloat16: return scale<kBFloat16>(a, stream);
        case kFloat16: return scale<kFloat16>(a, stream);
        default: return scale<kFloat32>(a, stream);
    }
}

}  // namespace warpo::cuda
