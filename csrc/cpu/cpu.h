// The CPU library: every operation, and the same operations for each instruction set.
#pragma once

#include "arguments/matrix_product.h"
#include "kernels.h"

#if defined(__x86_64__) && __has_include(<avx512bf16intrin.h>)
#define WARPO_AVX512_BF16
#endif

#define WARPO_DECLARE(operation, Arguments) void operation(const Arguments&);

namespace warpo::cpu {

WARPO_OPERATIONS(WARPO_DECLARE)

// "avx512bf16", "avx512", "avx2" or "portable": the best that this processor has, or what WARPO_ISA
// asks for if that is less.
const char* instruction_set();

#ifdef __x86_64__
// Runs where the instruction set is "avx512" or more.
void float32_product(const MatrixProduct&);
#endif
#ifdef WARPO_AVX512_BF16
// Runs where the instruction set is "avx512bf16" alone.
void bfloat16_product(const MatrixProduct&);
#endif

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
