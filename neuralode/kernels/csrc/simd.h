// The precision of a translation unit, which defines REAL (float or double) and PRECISION (a namespace).
//
// Vectors as long as the machine's, and the shape of a tile: 32 rows of the state, one feature after the other, so that
// a feature of a tile is a few whole vectors.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX2__
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

// The smaller and the larger of two; b where one is NaN. GCC does not find the instructions by itself.
#if defined(__AVX512F__)
#define BY(op) SINGLE ? (Vec)_mm512_##op##_ps((__m512)a, (__m512)b) : (Vec)_mm512_##op##_pd((__m512d)a, (__m512d)b)
inline Vec minimum(Vec a, Vec b) { return BY(min); }
inline Vec maximum(Vec a, Vec b) { return BY(max); }
#undef BY
#elif defined(__AVX2__)
#define BY(op) SINGLE ? (Vec)_mm256_##op##_ps((__m256)a, (__m256)b) : (Vec)_mm256_##op##_pd((__m256d)a, (__m256d)b)
inline Vec minimum(Vec a, Vec b) { return BY(min); }
inline Vec maximum(Vec a, Vec b) { return BY(max); }
#undef BY
#else
inline Vec minimum(Vec a, Vec b) { return a < b ? a : b; }
inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
#endif

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

// Lanes of two vectors that change places as a square is transposed, in blocks of 1, 2, 4 and 8.
struct Exchange {
    alignas(BYTES) Int low[4][LANES] = {}, high[4][LANES] = {};
    constexpr Exchange() {
        for (int b = 0; b < 4; b++)
            for (int p = 0, d = 1 << b; p < LANES; p++) {
                low[b][p] = p & d ? LANES + p - d : p;
                high[b][p] = p & d ? LANES + p : p + d;
            }
    }
};

// Transposes a square of as many entries as a vector has lanes.
inline void transpose_square(Vec* a) {
    constexpr int N = LANES;
#ifdef __AVX512F__
    static constexpr Exchange exchange{};
#pragma GCC unroll 4
    for (int b = 0; 1 << b < N; b++) {
        const Ints low = *(const Ints*)exchange.low[b], high = *(const Ints*)exchange.high[b];
#pragma GCC unroll 16
        for (int i = 0; i < N; i++) {
            if (i >> b & 1) continue;
            Vec upper = a[i], lower = a[i + (1 << b)];
            a[i] = __builtin_shuffle(upper, lower, low);
            a[i + (1 << b)] = __builtin_shuffle(upper, lower, high);
        }
    }
#else
    Vec from[N];
    for (int i = 0; i < N; i++) from[i] = a[i];
    for (int l = 0; l < N; l++)
        for (int i = 0; i < N; i++) a[l][i] = from[i][l];
#endif
}

// x [features][TILE] to out [TILE][stride], zeros behind the features.
inline void transpose(const Vec* x, int features, T* out, int stride) {
    constexpr int N = LANES;
    for (int f = 0; f < features; f += N)
        for (int v = 0; v < VECS; v++) {
            Vec a[N];
            if (f + N <= features)
#pragma GCC unroll 16
                for (int i = 0; i < N; i++) a[i] = x[(f + i) * VECS + v];
            else
                for (int i = 0; i < N; i++) a[i] = f + i < features ? x[(f + i) * VECS + v] : Vec{};
            transpose_square(a);
#pragma GCC unroll 16
            for (int i = 0; i < N; i++) memcpy(out + (v * N + i) * stride + f, &a[i], sizeof a[i]);
        }
}

// Rows of [features] to a tile [features][TILE]; row(l) points to row l.
template <typename Row>
inline void load_rows(Row row, int features, Vec* x) {
    constexpr int N = LANES;
    int f = 0;
    for (; f + N <= features; f += N)
        for (int v = 0; v < VECS; v++) {
            Vec a[N];
#pragma GCC unroll 16
            for (int i = 0; i < N; i++) memcpy(&a[i], row(v * N + i) + f, sizeof a[i]);
            transpose_square(a);
#pragma GCC unroll 16
            for (int i = 0; i < N; i++) x[(f + i) * VECS + v] = a[i];
        }
    for (int l = 0; l < TILE && f < features; l++)
        for (int d = f; d < features; d++) ((T*)x)[d * TILE + l] = row(l)[d];
}

// The first `count` rows of a tile, back again.
template <typename Row>
inline void store_rows(const Vec* x, int features, int count, Row row) {
    constexpr int N = LANES;
    int f = 0;
    for (; f + N <= features; f += N)
        for (int v = 0; v * N < count; v++) {
            Vec a[N];
#pragma GCC unroll 16
            for (int i = 0; i < N; i++) a[i] = x[(f + i) * VECS + v];
            transpose_square(a);
            for (int i = 0; i < N && v * N + i < count; i++) memcpy(row(v * N + i) + f, &a[i], sizeof a[i]);
        }
    for (int l = 0; l < count && f < features; l++)
        for (int d = f; d < features; d++) row(l)[d] = ((const T*)x)[d * TILE + l];
}

}  // namespace neuralode::PRECISION
