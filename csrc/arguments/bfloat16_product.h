#pragma once
#include "view.h"

namespace warpo {

// out = addend + a b, summed in float32, where a in float32 is rounded to bfloat16 first.
struct BFloat16Product {
    int64_t rows, columns, depth;
    View a;       // (row, d) float32 or bfloat16; one of its strides is 1
    View b;       // (d, column) bfloat16; one of its strides is 1
    View addend;  // (row, column) float32, stride1 is 1, may be out; optional
    View out;     // (row, column) float32 or bfloat16, stride1 is 1
};

}  // namespace warpo
