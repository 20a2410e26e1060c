// The two ways to walk the reverse scans, with the same results up to rounding.
#pragma once

#include "cpu/cpu.h"
#include "cpu/load.h"

namespace warpo::cpu::WARPO_ISA {

// Steps of one row in the lanes of a vector. `shaped` and `vtrace` hold `a`, or are nullptr.
void forward_along_time(const Gae& a, const ShapedGae* shaped, const Vtrace* vtrace);
void backward_along_time(const GaeBackward& g);

// Rows in the lanes of a vector, for arrays in which neighbouring rows are dense, and short rows.
void forward_across_rows(const Gae& a, const Vtrace* vtrace);
void backward_across_rows(const GaeBackward& g);

}  // namespace warpo::cpu::WARPO_ISA
