// The CPU library: every operation, and the same operations for each instruction set.
#pragma once

#include "kernels.h"

#define WARPO_DECLARE(operation, Arguments) void operation(const Arguments&);

namespace warpo::cpu {

WARPO_OPERATIONS(WARPO_DECLARE)

// "avx512", "avx2" or "portable": the best that this processor has, or what WARPO_ISA asks for if
// that is less.
const char* instruction_set();

namespace portable {
WARPO_OPERATIONS(WARPO_DECLARE)
}
#ifdef __x86_64__
namespace avx2 {
WARPO_OPERATIONS(WARPO_DECLARE)
}
namespace avx512 {
WARPO_OPERATIONS(WARPO_DECLARE)
}
#endif

}  // namespace warpo::cpu

#undef WARPO_DECLARE
