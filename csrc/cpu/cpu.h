// The CPU library: the functions that the bindings call, and the same functions for each
// instruction set.
#pragma once

#include "kernels.h"

#define WARPO_CPU_FUNCTIONS                                           \
    void logprobs_forward(const Logprobs&);                           \
    void logprobs_backward(const Logprobs&, const LogprobsBackward&); \
    void gae_forward(const Gae&);                                     \
    void gae_backward(const Gae&, const GaeBackward&);                \
    void policy_loss(const PolicyLoss&);                              \
    void group_advantages_forward(const GroupAdvantages&);            \
    void group_advantages_backward(const GroupAdvantages&, const GroupAdvantagesBackward&);

namespace warpo::cpu {

WARPO_CPU_FUNCTIONS

// "avx512", "avx2" or "portable": the best that this processor has, or what WARPO_ISA asks for if
// that is less.
const char* instruction_set();

namespace portable {
WARPO_CPU_FUNCTIONS
}
#ifdef __x86_64__
namespace avx2 {
WARPO_CPU_FUNCTIONS
}
namespace avx512 {
WARPO_CPU_FUNCTIONS
}
#endif

}  // namespace warpo::cpu
