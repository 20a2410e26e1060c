// Chooses the instruction set once and forwards every call to it.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/cpu.h"

namespace warpo::cpu {
namespace {

enum Isa { kPortable, kAvx2, kAvx512, kAvx512BFloat16 };
const char* const kNames[] = {"portable", "avx2", "avx512", "avx512bf16"};

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
#ifdef WARPO_AVX512_BF16
    if (best == kAvx512 && __builtin_cpu_supports("avx512bf16")) best = kAvx512BFloat16;
#endif
    const char* wanted = std::getenv("WARPO_ISA");
    if (!wanted) return best;
    for (int isa = kPortable; isa <= best; ++isa)
        if (!std::strcmp(wanted, kNames[isa])) return static_cast<Isa>(isa);
    throw std::runtime_error(
        std::string("WARPO_ISA must be portable, avx2, avx512 or avx512bf16, at most the ") +
        kNames[best] + " of this processor; got " + wanted);
}

Isa chosen() {
    static const Isa isa = detect();
    return isa;
}

}  // namespace

const char* instruction_set() { return kNames[chosen()]; }

#ifdef __x86_64__
#define WARPO_FORWARD(operation, Arguments)                    \
    void operation(const Arguments& arguments) {               \
        switch (chosen()) {                                    \
            case kAvx512BFloat16:                              \
            case kAvx512: return avx512::operation(arguments); \
            case kAvx2: return avx2::operation(arguments);     \
            default: return portable::operation(arguments);    \
        }                                                      \
    }
#else
#define WARPO_FORWARD(operation, Arguments) \
    void operation(const Arguments& arguments) { portable::operation(arguments); }
#endif

WARPO_OPERATIONS(WARPO_FORWARD)

}  // namespace warpo::cpu
