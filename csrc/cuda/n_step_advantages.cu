// Advantages of n steps: a thread a step walks to the steps after it, which lie in the caches.
//   A_t = sum_{l < m} gamma^l r_t+l + gamma^m V_t+m - V_t,  m = n, or the steps up to the end
// https://arxiv.org/abs/1506.02438 eq. 14.
#include "cuda/device.h"
#include "cuda/launch.h"
#include "math/offsets.h"

namespace warpo::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ bool is_kept(const Gae& a, int64_t row, int64_t t) {
    return !a.mask.data || load_flag(a.mask, row, t);
}

// The return of n steps from the valid step t of a row that ends at `end`.
__device__ __forceinline__ float walk(const NStepAdvantages& s, int64_t row, int64_t t,
                                      int64_t end) {
    const Gae& a = s.gae;
    float sum = 0.0f, decay = 1.0f;
    // of the last step that counts, to which the rewards of a masked tail belong
    float weight = 1.0f, tail = 0.0f;
    int64_t counted = 0;
    // nothing behind a discount of 0 is read
    const int64_t n = a.gamma == 0.0f ? 1 : s.n;
    for (; t < end; ++t) {
        const bool keep = is_kept(a, row, t);
        if (!keep && a.mask_mode == kCompact) tail += load_float(a.rewards, row, t);
        if (!keep && a.mask_mode != kZero) continue;
        if (counted == n) break;
        if (keep) {
            sum = fmaf(decay, load_float(a.rewards, row, t), sum);
            tail = 0.0f;
        }
        weight = decay;
        decay *= a.gamma;
        ++counted;
    }
    if (t == end) {
        if (a.mask_mode == kCompact) sum = fmaf(weight, tail, sum);
        if (!a.last_values.data || decay == 0.0f) return sum;
        return fmaf(decay, load_float(a.last_values, row, 0), sum);
    }
    if (decay == 0.0f || !is_kept(a, row, t)) return sum;
    return fmaf(decay, load_float(a.values, row, t), sum);
}

__device__ __forceinline__ void fill(const Gae& a, int64_t row, int64_t begin, int64_t end,
                                     float value) {
    for (int64_t t = begin + threadIdx.x; t < end; t += kThreads) {
        store_float(a.advantages, row, t, value);
        store_float(a.returns, row, t, value);
    }
}

// `blocks` of them for each row, one where the rows are packed.
__global__ __launch_bounds__(kThreads, 4) void forward_kernel(const NStepAdvantages s,
                                                              const int64_t blocks) {
    const Gae& a = s.gae;
    const int64_t row = blockIdx.x / blocks, block = blockIdx.x % blocks;
    Extent at = {0, a.steps, false};
    if (a.cu_seqlens) {
        at = extent_of(a.cu_seqlens, a.rows, row, a.steps);
        if (at.malformed) return fill(a, row, at.first, at.end, NAN);
        if (row == 0) fill(a, row, 0, at.first, 0.0f);
        if (row + 1 == a.rows) fill(a, row, at.end, a.steps, 0.0f);
    }
    for (int64_t t = at.first + block * kThreads + threadIdx.x; t < at.end;
         t += blocks * kThreads) {
        const bool keep = is_kept(a, row, t);
        const float found = keep ? walk(s, row, t, at.end) : 0.0f;
        store_float(a.returns, row, t, found);
        store_float(a.advantages, row, t, keep ? found - load_float(a.values, row, t) : 0.0f);
    }
}

}  // namespace

void n_step_advantages(const NStepAdvantages& s, Stream stream) {
    const Gae& a = s.gae;
    DeviceGuard guard(stream.device, "n_step_advantages");
    if (a.rows == 0 || a.steps == 0) return;
    const int64_t blocks = a.cu_seqlens ? 1 : (a.steps + kThreads - 1) / kThreads;
    launch("n_step_advantages", stream, a.rows * blocks, kThreads, forward_kernel, s, blocks);
}

}  // namespace warpo::cuda
