// Log-probability of the target and entropy of each row of logits, and the gradient of the logits.
//
// Forward: one block a row, or where rows are few one a chunk of it; one read, one power of two an
// element. Which thread adds which column, and in what order, depends on the vocabulary and the
// dtype alone: neither on the number of rows nor on the alignment of the row.
// Backward: blocks of columns, one read and one write.
#include "cuda/logits_writer.h"

namespace warpo::cuda {
namespace {

constexpr int kForwardThreads = 512, kBackwardThreads = 256;
constexpr int kBackwardVectors = 2 * kLoads;  // a thread

// chosen: the logit of the target.
__device__ __forceinline__ void finish_token(const Logprobs& a, unsigned index,
                                             const SoftmaxState& state, float chosen) {
    // Loaded for the second time: held over the loop it would take registers of it.
    const Token token = load_token(a, index);
    const SoftmaxRow result = softmax_finish(state);
    const float logp = logp_of(chosen, state.max, result.log_sum, load_temperature(a, token));
    store_token(a, token, index, logp, result.entropy, state.max, result.log_sum);
}

// Three blocks per multiprocessor: with four 16-byte loads a thread, 96 KiB can be in flight,
// several times what latency times bandwidth asks for, so that other rows cover the end of one.
template <int kDType, bool kEntropy>
__global__ __launch_bounds__(kForwardThreads, 3) void forward_kernel(const Logprobs a) {
    __shared__ Chunks<kForwardThreads> parts;
    // Written and read by thread 0 alone: in shared memory it takes no register of the loop.
    __shared__ float chosen;
    const Token token = load_token(a, blockIdx.x);
    if (!token.valid || !token.in_range) {
        if (threadIdx.x == 0) store_unread(a, token, blockIdx.x);
        return;
    }
    const typename Element<kDType>::Bits* row = row_of<kDType>(a.logits, token);
    if (threadIdx.x == 0) chosen = load_logit<kDType>(row, token.target);
    const float scale = kLog2e / load_temperature(a, token);
    const SoftmaxState state =
        read_row<kDType, kForwardThreads, kEntropy>(parts, row, static_cast<int>(a.vocab), scale);
    if (threadIdx.x == 0) finish_token(a, blockIdx.x, state, chosen);
}

// A block a chunk. Rows are few: registers serve better than a third block on a multiprocessor.
template <int kDType, bool kEntropy>
__global__ __launch_bounds__(kForwardThreads, 2) void chunk_kernel(const Logprobs a, int chunks) {
    __shared__ Chunks<kForwardThreads> parts;
    const unsigned index = blockIdx.x / static_cast<unsigned>(chunks);
    const int chunk = static_cast<int>(blockIdx.x % static_cast<unsigned>(chunks));
    const Token token = load_token(a, index);
    if (!token.valid || !token.in_range) return;
    const float scale = kLog2e / load_temperature(a, token);
    const int vocab = static_cast<int>(a.vocab),
              columns = chunk_columns<kDType, kForwardThreads>(vocab);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int start = chunk * columns, end = min(vocab - start, columns) + start;
    const SoftmaxState state = read_chunk<kDType, kForwardThreads, kEntropy>(
        row_of<kDType>(a.logits, token), start, end, vocab, scale);
    if (lane == 0) parts[0][warp] = state;
    __syncthreads();
    if (warp > 0) return;
    const SoftmaxState merged = merge_warps<kForwardThreads, kEntropy>(parts, 0, scale);
    float4* out = reinterpret_cast<float4*>(a.partials) + index * kLogprobsChunks + chunk;
    if (lane == 0) *out = make_float4(merged.max, merged.sum, merged.weighted, 0.0f);
}

// A warp a row: its chunks in one.
template <int kDType, bool kEntropy>
__global__ void finish_kernel(const Logprobs a, int chunks) {
    const Token token = load_token(a, blockIdx.x);
    const int lane = threadIdx.x;
    if (!token.valid || !token.in_range) {
        if (lane == 0) store_unread(a, token, blockIdx.x);
        return;
    }
    const float chosen = load_logit<kDType>(row_of<kDType>(a.logits, token), token.target);
    SoftmaxState state = softmax_empty();
    if (lane < chunks) {
        const float4 part =
            reinterpret_cast<const float4*>(a.partials)[blockIdx.x * kLogprobsChunks + lane];
        state = {part.x, part.y, part.z};
    }
    state = merge_lanes<kEntropy>(state, kLog2e / load_temperature(a, token));
    if (lane == 0) finish_token(a, blockIdx.x, state, chosen);
}

// What the gradient of a token depends on beside its logits. All of it is loaded at once, also of a
// token that turns out to be masked: only its logits cost more than the wait for the mask.
struct TokenStats {
    Token token;
    float2 stats;
    float temperature, entropy, grad_logp, grad_entropy;
};

template <bool kEntropy>
__device__ __forceinline__ TokenStats load_stats(const LogprobsBackward& b, unsigned index) {
    const Logprobs& a = b.forward;
    const int64_t row = index / static_cast<unsigned>(a.steps);
    const int64_t step = index % static_cast<unsigned>(a.steps);
    TokenStats s;
    s.stats = reinterpret_cast<const float2*>(a.stats)[index];
    s.grad_logp = b.grad_logprobs.data ? load_float32(b.grad_logprobs, row, step) : 0.0f;
    s.grad_entropy = kEntropy ? load_float32(b.grad_entropy, row, step) : 0.0f;
    s.entropy = kEntropy ? load_float32(a.entropy, row, step) : 0.0f;
    s.token = load_token(a, index);
    s.temperature = load_temperature(a, s.token);
    return s;
}

// Four blocks per multiprocessor: with eight 16-byte loads a thread, 128 KiB can be in flight.
template <int kDType, int kOutDType, bool kEntropy>
__global__ __launch_bounds__(kBackwardThreads, 4) void backward_kernel(const LogprobsBackward b,
                                                                       int chunks) {
    const Logprobs& a = b.forward;
    using Out = Element<kOutDType>;
    const unsigned index = blockIdx.x / static_cast<unsigned>(chunks);
    const int chunk = static_cast<int>(blockIdx.x % static_cast<unsigned>(chunks));
    const TokenStats s = load_stats<kEntropy>(b, index);
    const Token& token = s.token;
    const int vocab = static_cast<int>(a.vocab);
    typename Out::Bits* gradient = row_of<kOutDType>(b.grad_logits, token);
    const Columns own =
        own_columns<kDType, kOutDType, kBackwardThreads, kBackwardVectors>(gradient, vocab, chunk);
    const bool unread = !token.valid || !token.in_range;
    // A row of weight 0 is not read, unless its gradient is NaN: 0 times a NaN probability.
    const bool weightless =
        s.grad_logp == 0.0f && s.grad_entropy == 0.0f && isfinite(s.stats.x) && isfinite(s.stats.y);
    if (unread || weightless) {
        const uint32_t pattern = unread && token.valid ? Out::kNaN : 0u;
        fill_columns<kDType, kOutDType, kBackwardThreads, kBackwardVectors>(gradient, own, pattern);
        return;
    }
    const typename Element<kDType>::Bits* row = row_of<kDType>(a.logits, token);
    uint4 v[kBackwardVectors];
    load_columns<kDType, kBackwardThreads>(v, row, own, vocab);
    const SoftmaxGradient g = softmax_gradient(s.stats.x, s.stats.y, s.temperature, s.grad_logp,
                                               s.entropy, s.grad_entropy);
    store_columns<kDType, kOutDType, kBackwardThreads, kEntropy>(v, row, gradient, own, g,
                                                                 static_cast<int>(token.target));
}

template <int kDType, bool kEntropy>
void forward(const Logprobs& a, Stream stream) {
    const int64_t tokens = a.rows * a.steps;
    const int columns = chunk_columns<kDType, kForwardThreads>(static_cast<int>(a.vocab));
    const int chunks = static_cast<int>((a.vocab - 1) / columns + 1);
    if (!a.partials || chunks == 1) {
        return launch("logprobs", stream, tokens, kForwardThreads, forward_kernel<kDType, kEntropy>,
                      a);
    }
    launch("logprobs", stream, tokens * chunks, kForwardThreads, chunk_kernel<kDType, kEntropy>, a,
           chunks);
    launch("logprobs", stream, tokens, 32, finish_kernel<kDType, kEntropy>, a, chunks);
}

template <int kDType>
void forward(const Logprobs& a, Stream stream) {
    if (a.entropy.data) return forward<kDType, true>(a, stream);
    forward<kDType, false>(a, stream);
}

template <int kDType, int kOutDType>
void backward(const LogprobsBackward& b, Stream stream) {
    const Logprobs& a = b.forward;
    const int64_t columns =
        int64_t{kBackwardVectors} * kBackwardThreads * Element<kDType>::kPerVector;
    const int chunks = static_cast<int>((a.vocab + columns - 1) / columns);
    const auto kernel = b.grad_entropy.data ? backward_kernel<kDType, kOutDType, true>
                                            : backward_kernel<kDType, kOutDType, false>;
    launch("logprobs_backward", stream, a.rows * a.steps * chunks, kBackwardThreads, kernel, b,
           chunks);
}

}  // namespace

void logprobs_forward(const Logprobs& a, Stream stream) {
    DeviceGuard guard(stream.device, "logprobs");
    check_sizes(a, "logprobs");
    if (a.rows * a.steps == 0) return;
    switch (a.logits.dtype) {
        case kBFloat16: return forward<kBFloat16>(a, stream);
        case kFloat16: return forward<kFloat16>(a, stream);
        default: return forward<kFloat32>(a, stream);
    }
}

void logprobs_backward(const LogprobsBackward& b, Stream stream) {
    const Logprobs& a = b.forward;
    DeviceGuard guard(stream.device, "logprobs_backward");
    check_sizes(a, "logprobs_backward");
    if (a.rows * a.steps == 0) return;
    switch (a.logits.dtype) {
        case kBFloat16: return backward<kBFloat16, kBFloat16>(b, stream);
        case kFloat16: return backward<kFloat16, kFloat16>(b, stream);
    }
    switch (b.grad_logits.dtype) {
        case kBFloat16: return backward<kFloat32, kBFloat16>(b, stream);
        case kFloat16: return backward<kFloat32, kFloat16>(b, stream);
        default: return backward<kFloat32, kFloat32>(b, stream);
    }
}

}  // namespace warpo::cuda
