// Products of matrices with a tile: x [inputs][TILE] to [outputs][TILE], and the gradients of their weights.
#pragma once
#include "simd.h"

namespace neuralode::PRECISION {

// W [outputs][inputs] in blocks of OUTPUTS rows, each block column by column, so that a product reads it in order.
inline void pack(const T* w, int outputs, int inputs, bool transposed, T* out) {
    const int rows = transposed ? inputs : outputs, columns = transposed ? outputs : inputs;
    for (int j = 0; j < rows; j += OUTPUTS) {
        const int block = rows - j < OUTPUTS ? rows - j : OUTPUTS;
        for (int k = 0; k < columns; k++)
            for (int r = 0; r < block; r++) *out++ = transposed ? w[k * inputs + j + r] : w[(j + r) * inputs + k];
    }
}

// Outputs j to j + R: out[j][v] = finish(j, Σ_k W[j][k] x[k][v], out[j][v]).
template <int R, typename Finish>
inline void product_block(const T* w, int inputs, const Vec* x, int j, Vec* out, Finish finish) {
    const char* room = (const char*)(out + j * VECS);  // it comes near while the products keep the processor busy
    for (int i = 0; i < R * TILE * (int)sizeof(T); i += 64) __builtin_prefetch(room + i, 1);
    for (int v = 0; v < VECS; v += PANEL) {
        Vec sum[R][PANEL] = {};
        const Vec* from = x + v;
        const T* weight = w;
        for (int k = 0; k < inputs; k++, from += VECS, weight += R) {
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 2
                for (int p = 0; p < PANEL; p++) sum[r][p] += weight[r] * from[p];
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
            for (int p = 0; p < PANEL; p++) {
                Vec& to = out[(j + r) * VECS + v + p];
                to = finish(j + r, sum[r][p], to);
            }
    }
}

// The same for every output; W is packed.
template <typename Finish>
inline void product(const T* packed, int outputs, int inputs, const Vec* x, Vec* out, Finish finish) {
    int j = 0;
    for (; j + OUTPUTS <= outputs; j += OUTPUTS, packed += OUTPUTS * inputs)
        product_block<OUTPUTS>(packed, inputs, x, j, out, finish);
    switch (outputs - j) {
        case 1: return product_block<1>(packed, inputs, x, j, out, finish);
        case 2: return product_block<2>(packed, inputs, x, j, out, finish);
        case 3: return product_block<3>(packed, inputs, x, j, out, finish);
        case 4: return product_block<4>(packed, inputs, x, j, out, finish);
        case 5: return product_block<5>(packed, inputs, x, j, out, finish);
        case 6: return product_block<6>(packed, inputs, x, j, out, finish);
        case 7: return product_block<7>(packed, inputs, x, j, out, finish);
        default: return;
    }
}

template <int R, int Q>
inline void gradient_block(const T* g, const T* x, int stride, T* total) {
    constexpr int N = LANES;
    Vec sum[R][Q] = {};
    for (int s = 0; s < TILE; s++) {
        Vec row[Q];
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) row[q] = *(const Vec*)(x + s * stride + q * N);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int q = 0; q < Q; q++) sum[r][q] += g[r * TILE + s] * row[q];
    }
    // the sum over a tile comes first, so that rounding errors do not pile up in a long chain
    for (int r = 0; r < R; r++)
        for (int q = 0; q < Q; q++) *(Vec*)(total + r * stride + q * N) += sum[r][q];
}

// Memory that is needed soon, brought near a piece at a time while products keep the processor busy.
struct Ahead {
    const char* at = nullptr;
    int64_t bytes = 0;
    void fetch() {
        for (int i = 0; i < 16 && bytes > 0; i++, at += 64, bytes -= 64) __builtin_prefetch(at);
    }
};

template <int Q>
inline void gradient_columns(const T* g, int outputs, const T* x, int stride, T* total, Ahead& ahead) {
    int j = 0;
    for (; j + GRAD_OUTPUTS <= outputs; j += GRAD_OUTPUTS) {
        ahead.fetch();
        gradient_block<GRAD_OUTPUTS, Q>(g + j * TILE, x, stride, total + j * stride);
    }
    for (; j < outputs; j++) gradient_block<1, Q>(g + j * TILE, x, stride, total + j * stride);
}

// total [outputs][stride] += Σ over the tile of g [outputs][TILE] times x [TILE][stride]; the stride is whole vectors.
inline void weight_gradient(const T* g, int outputs, const T* x, int stride, T* total, Ahead& ahead) {
    constexpr int N = LANES;
    int k = 0;
    for (; k + GRAD_INPUTS * N <= stride; k += GRAD_INPUTS * N)
        gradient_columns<GRAD_INPUTS>(g, outputs, x + k, stride, total + k, ahead);
    static_assert(GRAD_INPUTS == 4);
    switch ((stride - k) / N) {
        case 1: return gradient_columns<1>(g, outputs, x + k, stride, total + k, ahead);
        case 2: return gradient_columns<2>(g, outputs, x + k, stride, total + k, ahead);
        case 3: return gradient_columns<3>(g, outputs, x + k, stride, total + k, ahead);
        default: return;
    }
}

// The products of R features with `count` others, summed over the vectors of a tile; the R stay in registers.
template <int R>
inline void outer_products(const Vec* few, const Vec* many, int count, Vec* total, int step_few, int step_many) {
    Vec held[R][VECS];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECS; v++) held[r][v] = few[r * VECS + v];
    for (int i = 0; i < count; i++, many += VECS, total += step_many)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            Vec sum = many[0] * held[r][0];
#pragma GCC unroll 16
            for (int v = 1; v < VECS; v++) sum += many[v] * held[r][v];
            total[r * step_few] += sum;
        }
}

constexpr int NARROW = 4;  // inputs, or outputs, up to which the gradient of a weight keeps its lanes apart

// The same for few inputs or outputs: the lanes are summed at the very end, total [outputs][inputs][lanes].
inline void narrow_gradient(const Vec* g, int outputs, const Vec* x, int inputs, Vec* total) {
    const bool by_inputs = inputs <= NARROW;
    const Vec *few = by_inputs ? x : g, *many = by_inputs ? g : x;
    const int count = by_inputs ? outputs : inputs;
    const int step_few = by_inputs ? 1 : inputs, step_many = by_inputs ? inputs : 1;
    static_assert(NARROW == 4);
    switch (by_inputs ? inputs : outputs) {
        case 1: return outer_products<1>(few, many, count, total, step_few, step_many);
        case 2: return outer_products<2>(few, many, count, total, step_few, step_many);
        case 3: return outer_products<3>(few, many, count, total, step_few, step_many);
        default: return outer_products<4>(few, many, count, total, step_few, step_many);
    }
}

}  // namespace neuralode::PRECISION
