// Advantages from rewards of steps: one block an output, which computes the statistics of its group
// anew, in an order that is the same for all outputs of the group.
#include "cuda/device.h"
#include "cuda/launch.h"
#include "math/offsets.h"

namespace warpo::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

__device__ __forceinline__ Extent steps_of(const ProcessAdvantages& a, int64_t output) {
    return extent_of(a.step_offsets, a.outputs, output, a.steps);
}

// Where the advantages of an output lie.
__device__ __forceinline__ Extent tokens_of(const ProcessAdvantages& a, int64_t output) {
    if (a.cu_seqlens) return extent_of(a.cu_seqlens, a.outputs, output, a.tokens);
    return {output * a.tokens, (output + 1) * a.tokens, false};
}

__device__ __forceinline__ int64_t member(const ProcessAdvantages& a, int64_t i) {
    return a.order ? a.order[i] : i;
}

struct Group {
    float mean, std, scale;  // scale 0: nothing to tell its steps apart
    bool degenerate;         // it has steps
};

// A warp an output, a lane a step. NaN where the steps of a member are malformed.
__device__ __forceinline__ Group find_group(const ProcessAdvantages& a, const Extent& members,
                                            float* scratch) {
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    // Sums differences from some reward of the group, so that a common offset costs no digits.
    float pivot = 0.0f;
    for (int64_t i = members.first; i < members.end; ++i) {
        const Extent steps = steps_of(a, member(a, i));
        if (steps.first == steps.end) continue;
        pivot = load_float(a.step_rewards, 0, steps.first);
        break;
    }
    float count = 0.0f, differs = 0.0f, sum = 0.0f;
    for (int64_t i = members.first + warp; i < members.end; i += kWarps) {
        const Extent steps = steps_of(a, member(a, i));
        if (steps.malformed) differs = sum = NAN;
        for (int64_t step = steps.first + lane; step < steps.end; step += 32) {
            const float reward = load_float(a.step_rewards, 0, step);
            count += 1.0f;
            differs += reward == pivot ? 0.0f : 1.0f;
            sum += reward - pivot;
        }
    }
    count = block_sum<kWarps>(count, scratch);
    differs = block_sum<kWarps>(differs, scratch);
    sum = block_sum<kWarps>(sum, scratch);
    if (differs == 0.0f) return {pivot, 0.0f, 0.0f, count > 0.0f};
    const float mean = pivot + sum / count;
    if (a.std_mode == kNoStd) return {mean, 0.0f, 1.0f, false};
    float squares = 0.0f;
    for (int64_t i = members.first + warp; i < members.end; i += kWarps) {
        const Extent steps = steps_of(a, member(a, i));
        for (int64_t step = steps.first + lane; step < steps.end; step += 32) {
            const float centred = load_float(a.step_rewards, 0, step) - mean;
            squares = fmaf(centred, centred, squares);
        }
    }
    squares = block_sum<kWarps>(squares, scratch);
    const float std = sqrtf(squares / (a.std_mode == kSampleStd ? count - 1.0f : count));
    return {mean, std, 1.0f / (std + a.eps), false};
}

// The sum over the threads up to this one.
__device__ __forceinline__ float block_scan(float value, float* scratch) {
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes <<= 1) {
        const float before = __shfl_sync(kAllLanes, value, (lane - lanes) & 31);
        value += lane >= lanes ? before : 0.0f;
    }
    if (lane == 31) scratch[warp] = value;
    __syncthreads();
    float before = 0.0f;
    for (int w = 0; w < warp; ++w) before += scratch[w];
    __syncthreads();
    return before + value;
}

// First token that step belongs to: the one after the end of the step before it.
__device__ __forceinline__ int64_t begin_of(const ProcessAdvantages& a, const Extent& steps,
                                            int64_t step, int64_t length) {
    return step > steps.first ? clamp_index(index_at(a.step_ends, step - 1) + 1, length) : 0;
}

// Whether a step that this thread looks at ends outside the output or before the step before it.
__device__ __forceinline__ bool has_malformed_end(const ProcessAdvantages& a, const Extent& steps,
                                                  int64_t length) {
    bool found = false;
    for (int64_t step = steps.first + threadIdx.x; step < steps.end; step += kThreads) {
        const int64_t end = index_at(a.step_ends, step);
        const int64_t before = step > steps.first ? index_at(a.step_ends, step - 1) : 0;
        found = found || end < before || end < 0 || end >= length;
    }
    return found;
}

// Steps from the last to the first, a thread a step; then the tokens of these steps, each of which
// looks for its step.
__device__ __forceinline__ void write_tokens(const ProcessAdvantages& a, const Extent& steps,
                                             const Group& group, int64_t length, float* advantages,
                                             float* scratch) {
    __shared__ float sums[kThreads];
    __shared__ int64_t begins[kThreads];
    const int thread = static_cast<int>(threadIdx.x);
    int64_t filled = begin_of(a, steps, steps.end, length);  // tokens from here on are written
    for (int64_t t = filled + thread; t < length; t += kThreads) advantages[t] = 0.0f;
    float carry = 0.0f;
    for (int64_t end = steps.end; end > steps.first; end -= kThreads) {
        const int64_t step = end - 1 - thread;
        float reward = 0.0f;
        if (step >= steps.first && group.scale != 0.0f) {
            reward = (load_float(a.step_rewards, 0, step) - group.mean) * group.scale;
        }
        sums[thread] = carry + block_scan(reward, scratch);
        begins[thread] = begin_of(a, steps, step, length);
        __syncthreads();
        for (int64_t t = begins[kThreads - 1] + thread; t < filled; t += kThreads) {
            int low = 0, high = kThreads - 1;
            while (low < high) {
                const int middle = (low + high) / 2;
                if (begins[middle] <= t) {
                    high = middle;
                } else {
                    low = middle + 1;
                }
            }
            advantages[t] = sums[low];
        }
        filled = min(filled, begins[kThreads - 1]);
        carry = sums[kThreads - 1];
        __syncthreads();
    }
}

// With 1 block a multiprocessor as the least, nvcc for sm_80 takes 48 registers rather than spill.
__global__ __launch_bounds__(kThreads, 1) void output_kernel(const ProcessAdvantages a) {
    __shared__ float scratch[kWarps];
    const int64_t output = blockIdx.x;
    const int64_t index = a.group_ids ? a.group_ids[output] : output / a.group_size;
    Group group = {0.0f, 0.0f, 0.0f, false};
    if (index >= 0 && index < a.groups) {
        const Extent members =
            a.order ? Extent{a.offsets[index], a.offsets[index + 1], false}
                    : Extent{index * a.group_size, (index + 1) * a.group_size, false};
        group = find_group(a, members, scratch);
        if (threadIdx.x == 0 && member(a, members.first) == output) {
            a.mean[index] = group.mean;
            a.std[index] = group.std;
            if (group.degenerate) atomicAdd(a.degenerate, 1);
        }
    }
    const Extent tokens = tokens_of(a, output), steps = steps_of(a, output);
    const int64_t length = tokens.end - tokens.first;
    float* const advantages = a.advantages + tokens.first;
    const bool malformed =
        tokens.malformed || steps.malformed || has_malformed_end(a, steps, length);
    if (block_sum<kWarps>(malformed ? 1.0f : 0.0f, scratch) > 0.0f) {
        for (int64_t t = threadIdx.x; t < length; t += kThreads) advantages[t] = NAN;
        return;
    }
    write_tokens(a, steps, group, length, advantages, scratch);
}

}  // namespace

void process_advantages(const ProcessAdvantages& a, Stream stream) {
    DeviceGuard guard(stream.device, "process_advantages");
    if (a.outputs == 0) return;
    launch("process_advantages", stream, a.outputs, kThreads, output_kernel, a);
}

}  // namespace warpo::cuda
