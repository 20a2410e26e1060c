// The matrix product of bfloat16 with float32 sums, on the instruction that processors have for it.
#include "cpu/cpu.h"

#ifdef WARPO_AVX512_BF16
#define WARPO_TARGET __attribute__((target("bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#include "cpu/matrix_product.h"

namespace warpo::cpu {
namespace {

constexpr uint16_t kPairs[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                               8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

// The first `count` of 16 elements, as bfloat16; the others are 0.
WARPO_TARGET inline __m256i load_half(const float* source, int64_t count) {
    return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(first(count), source));
}
WARPO_TARGET inline __m256i load_half(const uint16_t* source, int64_t count) {
    return _mm256_maskz_loadu_epi16(first(count), source);
}

// The instruction takes pairs of neighbours in depth.
struct Pairs {
    using Element = uint16_t;
    static constexpr int kDepth = 2;

    // `count` elements in depth.
    template <class T>
    WARPO_TARGET static __m512i load(const T* source, int64_t count) {
        return _mm512_inserti64x4(_mm512_castsi256_si512(load_half(source, count)),
                                  load_half(source + kLanes, count - kLanes), 1);
    }
    // Of `lines` that lie together.
    template <class T>
    WARPO_TARGET static __m512i join(const T* source, int64_t stride, int64_t depth,
                                     int64_t lines) {
        const __m512i both =
            _mm512_inserti64x4(_mm512_castsi256_si512(load_half(source, lines)),
                               load_half(source + stride, depth > 1 ? lines : 0), 1);
        return _mm512_permutexvar_epi16(_mm512_loadu_si512(kPairs), both);
    }
    WARPO_TARGET static __m512 add(__m512 sum, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    }
    WARPO_TARGET static void store(const View& out, int64_t at, __mmask16 lanes, __m512 sum) {
        if (out.dtype == kBFloat16)
            _mm256_mask_storeu_epi16((uint16_t*)out.data + at, lanes,
                                     (__m256i)_mm512_cvtneps_pbh(sum));
        else
            _mm512_mask_storeu_ps((float*)out.data + at, lanes, sum);
    }
};

}  // namespace

void bfloat16_product(const MatrixProduct& p) { multiply<Pairs>(p); }

}  // namespace warpo::cpu
#endif
