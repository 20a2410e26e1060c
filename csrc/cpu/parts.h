// The parts of a list of tensors, shared out among the threads.
#pragma once

#include "cpu/load.h"
#include "math/tiles.h"

namespace warpo::cpu::WARPO_ISA {

// body(tensor, part of it).
template <class Body>
inline void for_each_part(const Parts& parts, const Body& body) {
    const bool parallel = parts.elements >= kParallelWork;
    // Parts of one tensor are alike: each thread gets as many, the same ones in the next call, which
    // it may find in its cache.
    if (parts.first.size() == 2) {
#pragma omp parallel for schedule(static) if (parallel)
        for (int64_t p = 0; p < parts.count(); ++p) body(0, p);
        return;
    }
#pragma omp parallel for schedule(dynamic, 4) if (parallel)
    for (int64_t p = 0; p < parts.count(); ++p) {
        const int64_t tensor = parts.tensor_of(p);
        body(tensor, p - parts.first[tensor]);
    }
}

}  // namespace warpo::cpu::WARPO_ISA
