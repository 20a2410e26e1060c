#pragma once
#include "view.h"

namespace warpo {

// out = addend + a b, summed in float32. Of bfloat16: b is, a in float32 is rounded to it first,
// and out may be. Of float32: all are.
struct MatrixProduct {
    int64_t rows, columns, depth;
    View a;       // (row, d); one of its strides is 1
    View b;       // (d, column); one of its strides is 1
    View addend;  // (row, column) float32, stride1 is 1, may be out; optional
    View out;     // (row, column), stride1 is 1
};

}  // namespace warpo
