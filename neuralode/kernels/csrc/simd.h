// The precision of a translation unit, which defines REAL (float or double) and PRECISION (a namespace).
//
// Vectors as long as the machine's, and the shape of a tile: 32 rows of the state, one feature after the other, so that
// a feature of a tile is a few whole vectors.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace neuralode::PRECISION {

// How long a vector is, and how many outputs by how many vectors a product of matrices holds in registers.
#if defined(__AVX512F__)
constexpr int BYTES = 64;
constexpr int OUTPUTS = 8, PANEL = 2;
constexpr int GRAD_OUTPUTS = 4, GRAD_INPUTS = 4;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
constexpr int OUTPUTS = 6, PANEL = 2;
constexpr int GRAD_OUTPUTS = 3, GRAD_INPUTS = 4;
#else
constexpr int BYTES = 16;
constexpr int OUTPUTS = 4, PANEL = 2;
constexpr int GRAD_OUTPUTS = 2, GRAD_INPUTS = 4;
#endif

typedef REAL T;
typedef T Vec __attribute__((vector_size(BYTES)));
using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
typedef Int Ints __attribute__((vector_size(BYTES)));

constexpr bool SINGLE = sizeof(T) == 4;
constexpr int TILE = 32;
constexpr int LANES = BYTES / sizeof(T);
constexpr int VECS = TILE / LANES;  // vectors of one feature of a tile

inline Vec select(Ints where, Vec yes, Vec no) { return where ? yes : no; }
inline Vec minimum(Vec a, Vec b) { return a < b ? a : b; }
inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
inline Vec absolute(Vec x) { return (Vec)((Ints)x & ~(Int(1) << (8 * sizeof(T) - 1))); }

inline Vec inverse(Vec x) {
#ifdef __AVX512F__
    if constexpr (SINGLE) {
        // a table's 14 bits and one Newton step: a division takes three times as long
        Vec r = (Vec)_mm512_rcp14_ps((__m512)x);
        return r * (T(2) - x * r);
    }
#endif
    return T(1) / x;
}

// x [n][TILE], of which only n features count, to out [TILE][stride]; rows of 16 (8) by 16 (8) entries at a time.
inline void transpose(const Vec* x, int features, T* out, int stride) {
    constexpr int N = LANES;
    for (int f = 0; f < features; f += N) {
        for (int v = 0; v < VECS; v++) {
            Vec a[N];
            for (int i = 0; i < N; i++) a[i] = f + i < features ? x[(f + i) * VECS + v] : Vec{};
#ifdef __AVX512F__
#pragma GCC unroll 4
            for (int d = 1; d < N; d *= 2) {
                Ints low, high;
                for (int p = 0; p < N; p++) {
                    low[p] = p & d ? N + p - d : p;
                    high[p] = p & d ? N + p : p + d;
                }
#pragma GCC unroll 16
                for (int i = 0; i < N; i++) {
                    if (i & d) continue;
                    Vec upper = a[i], lower = a[i + d];
                    a[i] = __builtin_shuffle(upper, lower, low);
                    a[i + d] = __builtin_shuffle(upper, lower, high);
                }
            }
            for (int i = 0; i < N; i++) memcpy(out + (v * N + i) * stride + f, &a[i], sizeof a[i]);
#else
            for (int l = 0; l < N; l++)
                for (int i = 0; i < N; i++) out[(v * N + l) * stride + f + i] = a[i][l];
#endif
        }
    }
}

}  // namespace neuralode::PRECISION
