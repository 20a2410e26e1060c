// Chooses the instruction set once and forwards every call to it.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/cpu.h"

namespace warpo::cpu {
namespace {

enum Isa { kPortable, kAvx2, kAvx512 };
const char* const kNames[] = {"portable", "avx2", "avx512"};

Isa detect() {
    Isa best = kPortable;
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
        best = kAvx2;
    if (best == kAvx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        best = kAvx512;
#endif
    const char* wanted = std::getenv("WARPO_ISA");
    if (!wanted) return best;
    for (int isa = kPortable; isa <= best; ++isa)
        if (!std::strcmp(wanted, kNames[isa])) return static_cast<Isa>(isa);
    throw std::runtime_error(
        std::string("WARPO_ISA must be portable, avx2 or avx512, at most the ") + kNames[best] +
        " of this processor; got " + wanted);
}

Isa chosen() {
    static const Isa isa = detect();
    return isa;
}

}  // namespace

const char* instruction_set() { return kNames[chosen()]; }

#ifdef __x86_64__
#define CALL(function, ...)                                 \
    switch (chosen()) {                                     \
        case kAvx512: return avx512::function(__VA_ARGS__); \
        case kAvx2: return avx2::function(__VA_ARGS__);     \
        default: return portable::function(__VA_ARGS__);    \
    }
#else
#define CALL(function, ...) portable::function(__VA_ARGS__);
#endif

void logprobs_forward(const Logprobs& a) { CALL(logprobs_forward, a) }
void logprobs_backward(const Logprobs& a, const LogprobsBackward& g) {
    CALL(logprobs_backward, a, g)
}
void gae_forward(const Gae& a) { CALL(gae_forward, a) }
void gae_backward(const Gae& a, const GaeBackward& g) { CALL(gae_backward, a, g) }
void policy_loss(const PolicyLoss& a) { CALL(policy_loss, a) }
void group_advantages_forward(const GroupAdvantages& a) { CALL(group_advantages_forward, a) }
void group_advantages_backward(const GroupAdvantages& a, const GroupAdvantagesBackward& g) {
    CALL(group_advantages_backward, a, g)
}

}  // namespace warpo::cpu
