// A matrix product with float32 sums of which both operands are packed, for AVX-512. Each element
// is summed in an order that only the depth gives: neither threads nor the other sizes change its
// bits.
//
// An operand is packed in words of 4 bytes, which hold one or several neighbours in depth, with 0
// past the end. `Words` says how: words from memory, and what is added for two of them.
#pragma once

#include <immintrin.h>
#include <omp.h>
#include <stdlib.h>

#include <algorithm>
#include <memory>

#include "cpu/cpu.h"
#include "cpu/huge_pages.h"

// GCC 12 warns of what its own header leaves undefined on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

// Of single functions, so that the rest of the file runs on every processor.
#ifndef WARPO_TARGET
#error "WARPO_TARGET: the instruction sets of the product"
#endif

namespace warpo::cpu {
namespace {

// 6 x 4 vectors of sums, 4 of b and one of a are 29 of the 32 registers.
constexpr int kLanes = 16, kTileRows = 6, kTileColumns = 4 * kLanes;
// A block of a, a panel of b and the sums of a block fit a second-level cache of 1 MiB.
constexpr int64_t kMaxDepthWords = 512, kMaxPanels = 8, kBlockWords = 65536;
// Fewer products take a thread some microseconds, as waking the others does.
constexpr int64_t kParallelProducts = 1 << 18;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Range {
    int64_t begin, end;
    int64_t size() const { return end - begin; }
};

Range range_of(int64_t begin, int64_t size, int64_t end) {
    return {begin, std::min(begin + size, end)};
}

int64_t size_of(const View& view) { return view.dtype == kFloat32 ? 4 : 2; }

// The part of a view from an element on.
View from(View view, int64_t row, int64_t column) {
    const int64_t elements = row * view.stride0 + column * view.stride1;
    if (view.data) view.data = (char*)view.data + elements * size_of(view);
    return view;
}

// The first `count` of 16 lanes.
WARPO_TARGET inline __mmask16 first(int64_t count) {
    return (__mmask16)_bzhi_u32(0xffff, (unsigned)std::clamp<int64_t>(count, 0, kLanes));
}

// lines x depth, contiguous in depth -> a word of a line lies `stride` from that of the next.
template <class Words, class T>
WARPO_TARGET void pack_lines(const T* source, int64_t source_stride, int64_t lines, int64_t depth,
                             uint32_t* out, int64_t stride) {
    constexpr int64_t kStep = kLanes * Words::kDepth;
    for (int64_t i = 0; i < lines; ++i, source += source_stride, out += stride)
        for (int64_t d = 0; d < depth; d += kStep)
            _mm512_storeu_si512(out + d / Words::kDepth, Words::load(source + d, depth - d));
}

// depth x lines, contiguous in lines -> the words of one depth lie together.
template <class Words, class T>
WARPO_TARGET void pack_depth(const T* source, int64_t source_stride, int64_t lines, int64_t depth,
                             uint32_t* out, int64_t stride) {
    constexpr int kStep = Words::kDepth;
    for (int64_t d = 0; d < depth; d += kStep, source += kStep * source_stride, out += stride)
        for (int64_t i = 0; i < lines; i += kLanes)
            _mm512_store_si512(out + i,
                               Words::join(source + i, source_stride, depth - d, lines - i));
}

WARPO_TARGET inline void transpose(__m512i (&x)[16]) {
    __m512i y[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512i even = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
        const __m512i odd = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        const __m512i even_high = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
        const __m512i odd_high = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
        x[i] = _mm512_shuffle_i32x4(even, even_high, 0x88);
        x[i + 4] = _mm512_shuffle_i32x4(odd, odd_high, 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(even, even_high, 0xdd);
        x[i + 12] = _mm512_shuffle_i32x4(odd, odd_high, 0xdd);
    }
}

// lines x depth, contiguous in depth -> a panel.
template <class Words>
WARPO_TARGET void pack_transposed(const typename Words::Element* source, int64_t source_stride,
                                  int64_t lines, int64_t depth, uint32_t* panel) {
    constexpr int kStep = Words::kDepth;
    for (int64_t i = 0; i < lines; i += kLanes)
        for (int64_t d = 0; d < depth; d += kLanes * kStep) {
            const int64_t left = depth - d;
            __m512i block[16];
#pragma GCC unroll 16
            for (int j = 0; j < 16; ++j)
                block[j] = Words::load(source + (i + j) * source_stride + d,
                                       i + j < lines ? left : 0);
            transpose(block);
#pragma GCC unroll 16
            for (int j = 0; j < 16; ++j)
                if (kStep * j < left)
                    _mm512_store_si512(panel + (d / kStep + j) * kTileColumns + i, block[j]);
        }
}

template <class Words>
WARPO_TARGET void multiply_tile(const uint32_t* a, int64_t row_stride, int64_t word_stride,
                                const uint32_t* panel, int64_t words, const View& addend,
                                const View& out, int64_t rows, int64_t columns) {
    const int64_t out_size = size_of(out);
    for (int i = 0; i < kTileRows && i < rows; ++i)
        for (int j = 0; j < columns; j += kLanes) {
            if (addend.data) __builtin_prefetch((const float*)addend.data + i * addend.stride0 + j);
            __builtin_prefetch((char*)out.data + (i * out.stride0 + j) * out_size, 1);
        }
    __m512 sums[kTileRows][4];
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sums[i][j] = _mm512_setzero_ps();
    for (int64_t p = 0; p < words; ++p, a += word_stride, panel += kTileColumns) {
        __m512i b[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) b[j] = _mm512_load_si512(panel + j * kLanes);
#pragma GCC unroll 6
        for (int i = 0; i < kTileRows; ++i) {
            const __m512i word = _mm512_set1_epi32((int)a[i * row_stride]);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) sums[i][j] = Words::add(sums[i][j], word, b[j]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) {
        if (i >= rows) break;
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const __mmask16 lanes = first(columns - j * kLanes);
            const float* const more = (const float*)addend.data + i * addend.stride0 + j * kLanes;
            __m512 sum = sums[i][j];
            if (addend.data) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes, more));
            Words::store(out, i * out.stride0 + j * kLanes, lanes, sum);
        }
    }
}

// How the product is cut. Only the depth of a block bears on the bits of the result.
struct Plan {
    int64_t depth, words, rows, columns;
    // How far apart lines of a block of a are. No power of two: the rows of a tile would share a
    // set of the first-level cache.
    int64_t word_room, row_room;
};

Plan plan_of(const MatrixProduct& p, int64_t depth_of_word) {
    const int64_t threads = omp_get_max_threads(), panels = ceil_div(p.columns, kTileColumns);
    const int64_t cuts = ceil_div(p.depth, kMaxDepthWords * depth_of_word);
    Plan plan;
    plan.depth = round_up(ceil_div(p.depth, cuts), depth_of_word);
    plan.words = plan.depth / depth_of_word;
    plan.word_room = round_up(plan.words, kLanes) + kLanes;
    int64_t blocks = ceil_div(p.rows, std::clamp<int64_t>(kBlockWords / plan.word_room, 96, 384));
    if (blocks * panels < threads) blocks = ceil_div(threads, panels);
    plan.rows = round_up(ceil_div(p.rows, blocks), kTileRows);
    plan.row_room = round_up(plan.rows, kLanes) + kLanes;
    const int64_t share = blocks >= threads ? panels : ceil_div(panels, threads);
    plan.columns = std::min(share, kMaxPanels) * kTileColumns;
    return plan;
}

struct Buffer {
    explicit Buffer(int64_t words) : data(aligned_alloc(64, round_up(4 * words, 64)), &free) {}
    uint32_t* get() const { return (uint32_t*)data.get(); }
    std::unique_ptr<void, decltype(&free)> data;
};

// Of a thread.
struct Workspace {
    explicit Workspace(const Plan& plan, bool splits_depth)
        : a(std::max(plan.rows * plan.word_room, plan.words * plan.row_room)),
          panel(plan.words * kTileColumns),
          sums(splits_depth ? plan.rows * (plan.columns + kLanes) : 0) {}
    Buffer a, panel, sums;
};

// Lines x depth of an operand, whose line stride is stride0, to where a tile finds them.
template <class Words, class T>
void pack_block(const View& a, Range lines, Range depth, const Plan& plan, uint32_t* out) {
    const T* const source = (const T*)from(a, lines.begin, depth.begin).data;
    if (a.stride1 == 1)
        pack_lines<Words>(source, a.stride0, lines.size(), depth.size(), out, plan.word_room);
    else
        pack_depth<Words>(source, a.stride1, lines.size(), depth.size(), out, plan.row_room);
}

template <class Words>
void pack_panel(const View& b, Range lines, Range depth, uint32_t* panel) {
    const auto* const source =
        (const typename Words::Element*)from(b, lines.begin, depth.begin).data;
    if (b.stride1 == 1)
        pack_transposed<Words>(source, b.stride0, lines.size(), depth.size(), panel);
    else
        pack_depth<Words>(source, b.stride1, lines.size(), depth.size(), panel, kTileColumns);
}

// One part of several of what is packed next. GCC drops calls of a function that does no more.
__attribute__((always_inline)) inline void fetch(const View& x, Range lines, Range depth,
                                                 int64_t part, int64_t parts) {
    const bool by_line = x.stride1 == 1;
    const char* const data = (const char*)from(x, lines.begin, depth.begin).data;
    const int64_t stride = size_of(x) * (by_line ? x.stride0 : x.stride1);
    const int64_t runs = (by_line ? lines : depth).size();
    const int64_t bytes = size_of(x) * (by_line ? depth : lines).size();
    for (int64_t i = part * runs / parts; i < (part + 1) * runs / parts; ++i)
        for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(data + i * stride + at, 0, 2);
}

template <class Words>
void multiply_block(const MatrixProduct& p, const Plan& plan, Range rows, Range columns,
                    const Workspace& workspace) {
    const View b = {p.b.data, p.b.stride1, p.b.stride0, p.b.dtype};
    const View sums = {workspace.sums.get(), plan.columns + kLanes, 1, kFloat32};
    const int64_t row_stride = p.a.stride1 == 1 ? plan.word_room : 1;
    const int64_t word_stride = p.a.stride1 == 1 ? 1 : plan.row_room;
    const int64_t tiles = ceil_div(rows.size(), kTileRows);
    const int64_t panels = ceil_div(columns.size(), kTileColumns);
    for (int64_t d = 0; d < p.depth; d += plan.depth) {
        const Range depth = range_of(d, plan.depth, p.depth);
        const Range next_depth = range_of(depth.end, plan.depth, p.depth);
        auto* const pack = p.a.dtype == kFloat32 ? pack_block<Words, float>
                                                 : pack_block<Words, typename Words::Element>;
        pack(p.a, rows, depth, plan, workspace.a.get());
        const View addend = d == 0 ? from(p.addend, rows.begin, columns.begin) : sums;
        const View out = depth.end < p.depth ? sums : from(p.out, rows.begin, columns.begin);
        for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t j = panel * kTileColumns;
            const Range at = range_of(columns.begin + j, kTileColumns, columns.end);
            const bool last = at.end == columns.end;
            const Range next = range_of(last ? columns.begin : at.end, kTileColumns, columns.end);
            pack_panel<Words>(b, at, depth, workspace.panel.get());
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t i = tile * kTileRows;
                fetch(b, next, last ? next_depth : depth, tile, tiles);
                fetch(p.a, rows, next_depth, panel * tiles + tile, panels * tiles);
                multiply_tile<Words>(workspace.a.get() + i * row_stride, row_stride, word_stride,
                                     workspace.panel.get(), ceil_div(depth.size(), Words::kDepth),
                                     from(addend, i, j), from(out, i, j), rows.size() - i,
                                     at.size());
            }
        }
    }
}

template <class Words>
void multiply(MatrixProduct p) {
    // The stride of a dimension of one element says nothing.
    if (p.depth == 1) p.a.stride1 = p.b.stride0 = 1;
    if (p.columns == 1) p.b.stride1 = 1;
    if (p.out.data != p.addend.data)
        advise_huge_pages(p.out.data, from(p.out, p.rows - 1, p.columns).data);
    const Plan plan = plan_of(p, Words::kDepth);
    const int64_t row_blocks = ceil_div(p.rows, plan.rows);
    const int64_t blocks = row_blocks * ceil_div(p.columns, plan.columns);
#pragma omp parallel if (blocks > 1 && p.rows * p.columns * p.depth >= kParallelProducts)
    {
        const Workspace workspace(plan, plan.depth < p.depth);
#pragma omp for schedule(dynamic)
        for (int64_t block = 0; block < blocks; ++block)
            multiply_block<Words>(
                p, plan, range_of(block % row_blocks * plan.rows, plan.rows, p.rows),
                range_of(block / row_blocks * plan.columns, plan.columns, p.columns), workspace);
    }
}

}  // namespace
}  // namespace warpo::cpu
