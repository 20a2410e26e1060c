// Losses of a reward model: one thread a pair of scores, one warp a group of ranked scores; what
// the blocks found is merged in their order by the last one.
#include <algorithm>

#include "cuda/counter.h"
#include "cuda/sequences.h"
#include "math/reward_model_loss.h"

namespace warpo::cuda {
namespace {

constexpr int kThreads = kPairsPerBlock, kWarps = kThreads / 32;
constexpr int kWarpsPerBlock = 4;  // groups a block

struct Partial {
    float loss, pairs, correct, margin, scores, mean, m2;
};

__device__ __forceinline__ void write(const Partial& p, float* out) {
    out[kRewardLoss] = p.loss;
    out[kRewardPairs] = p.pairs;
    out[kRewardCorrect] = p.correct;
    out[kRewardMargin] = p.margin;
    out[kScores] = p.scores;
    out[kScoreMean] = p.mean;
    out[kScoreM2] = p.m2;
}

__device__ __forceinline__ bool is_valid(const View& mask, int64_t i) {
    return !mask.data || load_flag(mask, 0, i);
}

__device__ __forceinline__ void write_pairs(const RewardModelLoss& a) {
    __shared__ float scratch[kWarps];
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const float weight = inverse_or_zero(value_of(a.denominator));
    bool valid = i < a.pairs;
    PairTerm term = {0.0f, 0.0f, 0.0f};
    float better = 0.0f, worse = 0.0f;
    if (valid) {
        // Loaded with the mask, so that no load waits for it.
        better = load_float(a.chosen_scores, 0, i);
        worse = load_float(a.rejected_scores, 0, i);
        const float margin = a.margins.data ? load_float(a.margins, 0, i) : 0.0f;
        valid = is_valid(a.mask, i);
        if (valid) term = bradley_terry(better, worse, margin, a.centering_coef);
        if (a.grad_chosen) {
            a.grad_chosen[i] = weighted(weight, term.grad_better);
            a.grad_rejected[i] = weighted(weight, term.grad_worse);
        }
    }
    if (!valid) better = worse = 0.0f;
    Partial p;
    p.loss = weighted(weight, block_sum<kWarps>(term.loss, scratch));
    p.pairs = block_sum<kWarps>(valid ? 1.0f : 0.0f, scratch);
    p.correct = block_sum<kWarps>(better > worse ? 1.0f : 0.0f, scratch);
    p.margin = block_sum<kWarps>(better - worse, scratch);
    p.scores = 2.0f * p.pairs;
    p.mean = block_sum<kWarps>(better + worse, scratch) * inverse_or_zero(p.scores);
    const float above = better - p.mean, below = worse - p.mean;
    p.m2 = block_sum<kWarps>(valid ? above * above + below * below : 0.0f, scratch);
    if (threadIdx.x == 0)
        write(p, a.partials + static_cast<int64_t>(blockIdx.x) * kNumRewardMetrics);
}

// rows: blocks with a partial. blocks: as many, and 1 without any.
__global__ __launch_bounds__(kThreads) void pairs_kernel(const RewardModelLoss a, unsigned rows,
                                                         unsigned blocks, unsigned* counter) {
    if (blockIdx.x < rows) write_pairs(a);
    if (!last_block(counter, blocks)) return;
    merge_rows<kWarps, kNumRewardMetrics, kScores, kScoreMean>(a.partials, rows, a.loss, a.metrics);
}

// The scores of a group, a lane for every 32nd of them: each lane compares its own with all.
struct Group {
    int64_t first, size;
};

// Sum of the gradients of score i over the pairs it is in; adds the pairs that it wins.
__device__ __forceinline__ float compare(const RankingLoss& a, const Group& g, int64_t i,
                                         Partial& p) {
    const float own = load_float(a.scores, 0, g.first + i);
    const int64_t* const ranks = static_cast<const int64_t*>(a.ranks.data);
    const int64_t rank = ranks[offset_of(a.ranks, 0, g.first + i)];
    float grad = 0.0f;
    for (int64_t j = 0; j < g.size; ++j) {
        const int64_t other_rank = ranks[offset_of(a.ranks, 0, g.first + j)];
        if (rank == other_rank || !is_valid(a.mask, g.first + j)) continue;
        const float other = load_float(a.scores, 0, g.first + j);
        const bool wins = rank < other_rank;
        const PairTerm term =
            bradley_terry(wins ? own : other, wins ? other : own, 0.0f, a.centering_coef);
        grad += wins ? term.grad_better : term.grad_worse;
        if (!wins) continue;
        p.loss += term.loss;
        p.pairs += 1.0f;
        p.correct += own > other ? 1.0f : 0.0f;
        p.margin += own - other;
    }
    return grad;
}

// By a warp.
__device__ __forceinline__ void write_group(const RankingLoss& a, int64_t index) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const Extent extent = extent_of(a.cu_groups, a.groups, index, a.num_scores);
    const Group g = {extent.first, extent.end - extent.first};
    Partial p = {};
    float sum = 0.0f;
    for (int64_t i = lane; i < g.size; i += 32) {
        if (!is_valid(a.mask, g.first + i)) continue;
        p.scores += 1.0f;
        sum += load_float(a.scores, 0, g.first + i);
    }
    p.scores = warp_sum(p.scores);
    p.mean = warp_sum(sum) * inverse_or_zero(p.scores);
    const float weight =
        poison_if(extent.malformed, inverse_or_zero(value_of(a.denominator)) *
                                        inverse_or_zero(0.5f * p.scores * (p.scores - 1.0f)));
    for (int64_t i = lane; i < g.size; i += 32) {
        float grad = 0.0f;
        if (is_valid(a.mask, g.first + i)) {
            const float centred = load_float(a.scores, 0, g.first + i) - p.mean;
            p.m2 = fmaf(centred, centred, p.m2);
            grad = weighted(weight, compare(a, g, i, p));
        }
        if (a.grad_scores) a.grad_scores[g.first + i] = grad;
    }
    p.loss = weighted(weight, warp_sum(p.loss));
    p.pairs = warp_sum(p.pairs);
    p.correct = warp_sum(p.correct);
    p.margin = warp_sum(p.margin);
    p.m2 = warp_sum(p.m2);
    if (lane == 0) write(p, a.partials + index * kNumRewardMetrics);
}

__global__ __launch_bounds__(32 * kWarpsPerBlock) void groups_kernel(const RankingLoss a,
                                                                     unsigned blocks,
                                                                     unsigned* counter) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / 32;
    if (index < a.groups) write_group(a, index);
    if (!last_block(counter, blocks)) return;
    merge_rows<kWarpsPerBlock, kNumRewardMetrics, kScores, kScoreMean>(a.partials, a.groups, a.loss,
                                                                       a.metrics);
}

}  // namespace

void reward_model_loss(const RewardModelLoss& a, Stream stream) {
    DeviceGuard guard(stream.device, "reward_model_loss");
    const int64_t rows = (a.pairs + kThreads - 1) / kThreads, blocks = std::max<int64_t>(rows, 1);
    launch("reward_model_loss", stream, blocks, kThreads, pairs_kernel, a,
           static_cast<unsigned>(rows), static_cast<unsigned>(blocks),
           counter_of(stream, "reward_model_loss"));
}

void ranking_loss(const RankingLoss& a, Stream stream) {
    DeviceGuard guard(stream.device, "ranking_loss");
    const int64_t blocks = std::max<int64_t>((a.groups + kWarpsPerBlock - 1) / kWarpsPerBlock, 1);
    launch("ranking_loss", stream, blocks, 32 * kWarpsPerBlock, groups_kernel, a,
           static_cast<unsigned>(blocks), counter_of(stream, "ranking_loss"));
}

}  // namespace warpo::cuda
