// The CUDA implementations under the names of the CPU library, so that csrc/bindings.cpp builds as
// warpo.kernels._cpu and the tests of the backend "cpu" run the CUDA kernels.
// Not shown: the CPU library, and what csrc/bindings.cpp does differently for _cuda.
#include <mutex>

#include "cpu/cpu.h"
#include "cuda/cuda.h"

namespace warpo::cpu {
namespace {

// One operation at a time: there is one set of fibers.
template <typename Operation, typename... Arguments>
void run(Operation* operation, const Arguments&... arguments) {
    static std::mutex running;
    const std::lock_guard<std::mutex> lock(running);
    operation(arguments..., cuda::Stream{});
}

}  // namespace

void logprobs_forward(const Logprobs& a) { run(cuda::logprobs_forward, a); }
void logprobs_backward(const Logprobs& a, const LogprobsBackward& b) {
    run(cuda::logprobs_backward, a, b);
}
void gae_forward(const Gae& a) { run(cuda::gae_forward, a); }
void gae_backward(const Gae& a, const GaeBackward& b) { run(cuda::gae_backward, a, b); }
void policy_loss(const PolicyLoss& a) { run(cuda::policy_loss, a); }
void group_advantages_forward(const GroupAdvantages& a) { run(cuda::group_advantages_forward, a); }
void group_advantages_backward(const GroupAdvantages& a, const GroupAdvantagesBackward& b) {
    run(cuda::group_advantages_backward, a, b);
}

// What a test asks for, so as not to pass on the CPU library by accident.
const char* instruction_set() { return "emulated"; }

}  // namespace warpo::cpu
