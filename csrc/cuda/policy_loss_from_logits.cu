// Log-probabilities, and the gradient of the policy loss from one read of the logits: a row stays
// in the shared memory of a block, or of a cluster of blocks, until its gradient is written. Where
// there are no clusters a part of it does, and the rest is read again from the L2 cache.
#include "cuda/kept_row_writer.h"
#include "cuda/logits_writer.h"
#include "math/policy_loss_from_logits.h"

namespace warpo::cuda {
namespace {

constexpr int kScaleThreads = 256, kScaleBlocks = 2048;

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

// What thread 0 finds and all threads use.
struct Found {
    SoftmaxGradient gradient;
    bool is_zero;
};

__device__ __forceinline__ Found find_gradient(const PolicyLossFromLogits& a,
                                               const SoftmaxState& state, float chosen,
                                               const TokenInputs& inputs, unsigned index,
                                               bool stores) {
    const Logprobs& forward = a.forward;
    const Token token = load_token(forward, index);
    const float temperature = load_temperature(forward, token);
    const SoftmaxRow row = softmax_finish(state);
    const float logp = logp_of(chosen, state.max, row.log_sum, temperature);
    if (stores) store_token(forward, token, index, logp, row.entropy, state.max, row.log_sum);
    const TokenGradient by = token_gradient(a, inputs, logp);
    return {softmax_gradient(state.max, row.log_sum, temperature, by.by_logp, row.entropy,
                             by.by_entropy),
            by.by_logp == 0.0f && by.by_entropy == 0.0f && isfinite(row.log_sum)};
}

struct alignas(16) Header {
    TokenInputs inputs;
    float chosen;
    Found found;
};

// Each block of a cluster finds the same gradient and writes its part of it.
template <int kDType, int kGradient, bool kEntropy>
__global__ __launch_bounds__(kTeamThreads* kMaxTeams, 1) void loss_kernel(
    const PolicyLossFromLogits a, const RowPlan plan) {
    const unsigned index = blockIdx.x / static_cast<unsigned>(plan.blocks);
    const int rank = static_cast<int>(blockIdx.x % static_cast<unsigned>(plan.blocks));
    const int vocab = static_cast<int>(a.forward.vocab);
    const int columns = kShares / plan.blocks * plan.share * Element<kDType>::kPerVector;
    Header& header = *static_cast<Header*>(dynamic_shared());
    const RowMemory memory = row_memory(plan, sizeof(Header));
    {
        Token token = load_token(a.forward, index);
        token.valid = token.valid && in_a_sequence(a, token.step);
        if (!token.valid || !token.in_range) {
            const auto gradient = row_of<kGradient>(a.grad_logits, token);
            fill_part<kGradient>(plan, gradient,
                                 part_of<kGradient>(gradient, rank, columns, vocab),
                                 token.valid ? Element<kGradient>::kNaN : 0u);
            if (rank == 0 && threadIdx.x == 0) store_unread(a.forward, token, index);
            return;
        }
        const typename Element<kDType>::Bits* row = row_of<kDType>(a.forward.logits, token);
        // Here, so that they are there when the row has been read.
        if (threadIdx.x == 0) {
            header.chosen = load_logit<kDType>(row, token.target);
            header.inputs = load_inputs(a, token);
        }
        const float scale = kLog2e / load_temperature(a.forward, token);
        read_shares<kDType>(plan, memory, row, rank, vocab, scale);
        if (plan.blocks > 1) {
            cluster_arrive();
            cluster_wait();
        } else {
            __syncthreads();
        }
        if (threadIdx.x < 32) {
            const SoftmaxState state = merge_shares(plan, memory, scale);
            if (threadIdx.x == 0) {
                header.found =
                    find_gradient(a, state, header.chosen, header.inputs, index, rank == 0);
            }
        }
        __syncthreads();
        // The shares of other blocks have been read: they may end when all are here.
        if (plan.blocks > 1) cluster_arrive_relaxed();
    }
    // Loaded for the second time: held over the loop it would take registers of it.
    const Token token = load_token(a.forward, index);
    const auto gradient = row_of<kGradient>(a.grad_logits, token);
    const Part part = part_of<kGradient>(gradient, rank, columns, vocab);
    if (header.found.is_zero) {
        fill_part<kGradient>(plan, gradient, part, 0u);
    } else {
        const SoftmaxGradient softmax = header.found.gradient;
        write_part<kDType, kGradient, kEntropy>(
            plan, memory.kept, row_of<kDType>(a.forward.logits, token), gradient, part,
            rank * columns, softmax, vocab, static_cast<int>(token.target));
    }
    if (plan.blocks > 1) cluster_wait();
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

template <int kDType, int kGradient>
void loss(const PolicyLossFromLogits& a, Stream stream) {
    constexpr int kPerVector = Element<kDType>::kPerVector;
    const auto kernel = a.entropy_coef != 0.0f ? loss_kernel<kDType, kGradient, true>
                                               : loss_kernel<kDType, kGradient, false>;
    const Logprobs& forward = a.forward;
    const RowPlan plan = plan_row((forward.vocab - 1) / kPerVector + 1, sizeof(Header),
                                  chip_for("policy_loss_from_logits", kernel));
    const Grid grid = {forward.rows * forward.steps, plan.blocks, plan.threads, plan.shared_bytes};
    launch_clusters("policy_loss_from_logits", stream, grid, kernel, a, plan);
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
        default: break;
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
