// Results that are fresh memory: in pages of 4 KiB, most of the time would go to page faults.
#pragma once

#include <stdint.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace warpo::cpu {

inline void advise_huge_pages(const void* first, const void* last) {
#ifdef __linux__
    constexpr uintptr_t kHugePage = 2u << 20;
    const uintptr_t begin = ((uintptr_t)first + kHugePage - 1) & ~(kHugePage - 1);
    const uintptr_t end = (uintptr_t)last & ~(kHugePage - 1);
    if (end > begin + 8 * kHugePage) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace warpo::cpu
