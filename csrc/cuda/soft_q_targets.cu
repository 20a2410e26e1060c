// r + gamma (1 - terminated) (min(q1, q2) - alpha log pi): a thread a transition.
#include "cuda/device.h"
#include "cuda/launch.h"
#include "math/soft_q_targets.h"

namespace warpo::cuda {
namespace {

constexpr int kThreads = 256;

__global__ __launch_bounds__(kThreads) void soft_q_targets_kernel(const SoftQTargets a) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= a.transitions) return;
    float target = load_float(a.rewards, 0, i);
    if (!load_flag(a.terminated, 0, i)) {
        target = soft_q_target(target, load_float(a.next_q1, 0, i), load_float(a.next_q2, 0, i),
                               load_float(a.next_logprobs, 0, i), *a.alpha, a.gamma);
    }
    a.targets[i] = target;
}

}  // namespace

void soft_q_targets(const SoftQTargets& a, Stream stream) {
    DeviceGuard guard(stream.device, "soft_q_targets");
    if (a.transitions == 0) return;
    launch("soft_q_targets", stream, (a.transitions + kThreads - 1) / kThreads, kThreads,
           soft_q_targets_kernel, a);
}

}  // namespace warpo::cuda
