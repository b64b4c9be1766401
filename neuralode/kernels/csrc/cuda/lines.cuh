// The lines of a program, forwards and in reverse, on the features of some rows.
//
// Two layouts. TILED: a block's WARPS warps share a tile of 32 rows in shared memory, feature after feature; a thread
// works for the row of its lane, and warps take turns with the features. Otherwise: a thread has a row for itself, in
// registers. EACH(d, n) goes through those of n features that are the thread's own, AT(d) is where a feature lies.
#pragma once
#include "functions.cuh"

#if TILED
#define EACH(d, n) for (int d = warp(); d < (n); d += WARPS)
#define AT(d) ((d) * PITCH + lane())
#else
#define EACH(d, n) _Pragma("unroll") for (int d = 0; d < (n); d++)
#define AT(d) (d)
#endif

namespace neuralode {

constexpr int LANES = 32;
constexpr int PITCH = TILED ? 36 : 1;  // not 32, so that features lie in different banks
constexpr int ROWS_OF_BLOCK = TILED ? LANES : THREADS;

DEVICE int lane() { return thread() % LANES; }
DEVICE int warp() { return thread() / LANES; }
DEVICE int row_of_block() { return TILED ? lane() : thread(); }

// The threads that share a row meet.
DEVICE void meet_rows() {
    if constexpr (TILED) meet();
}

// What a program reads besides registers, and where gradients of it go.
struct Given {
    const T* tensors;     // packed as the program has it
    const T* rows;        // of the tensors that have one row a sample, this row's
    T* sums;              // gradients of the tensors: a block's, or a thread's
    T* row_sums;          // of those that have one row a sample
};

struct alignas(16) Four {
    T v[4];
};

DEVICE constexpr int padded(int n) { return (n + 3) / 4 * 4; }

template <int HOW> DEVICE void give(T* adjoint, T value) {
    if constexpr (HOW == SET) *adjoint = value;
    if constexpr (HOW == INCREASE) *adjoint += value;
}

// --- products of matrices -------------------------------------------------------------------------------------------

// Calls store(j, row, Σ_k w[k][j] x[k][row]); w is [IN][padded(OUT)].
template <int IN, int OUT, typename Store> DEVICE void product(const T* w, const T* x, Store store) {
    constexpr int STRIDE = padded(OUT);
    if constexpr (!TILED) {
#pragma unroll
        for (int j = 0; j < OUT; j++) {
            T sum = 0;
#pragma unroll
            for (int k = 0; k < IN; k++) sum += w[k * STRIDE + j] * x[k];
            store(j, 0, sum);
        }
    } else if constexpr (OUT * LANES <= WARPS * LANES * 4) {  // few outputs: one a thread
        for (int j = warp(); j < OUT; j += WARPS) {
            T sum = 0;
#pragma unroll 8
            for (int k = 0; k < IN; k++) sum += w[k * STRIDE + j] * x[k * PITCH + lane()];
            store(j, lane(), sum);
        }
    } else {  // four outputs of four rows a thread
        const int row = thread() % 8 * 4;
        for (int j = thread() / 8 * 4; j < OUT; j += WARPS * 16) {
            T sum[4][4] = {};
#pragma unroll 4
            for (int k = 0; k < IN; k++) {
                const Four a = *(const Four*)(w + k * STRIDE + j), b = *(const Four*)(x + k * PITCH + row);
#pragma unroll
                for (int r = 0; r < 4; r++)
#pragma unroll
                    for (int s = 0; s < 4; s++) sum[r][s] += a.v[r] * b.v[s];
            }
#pragma unroll
            for (int r = 0; r < 4; r++)
#pragma unroll
                for (int s = 0; s < 4; s++)
                    if (j + r < OUT) store(j + r, row + s, sum[r][s]);
        }
    }
}

// sums[j][k] += Σ over the rows of g[j] x[k].
template <int IN, int OUT> DEVICE void add_products(const T* g, const T* x, T* sums) {
    if constexpr (!TILED) {
#pragma unroll
        for (int j = 0; j < OUT; j++)
#pragma unroll
            for (int k = 0; k < IN; k++) sums[j * IN + k] += g[j] * x[k];
    } else {
        constexpr int J = OUT >= 16 ? 4 : 1, K = IN >= 16 ? 4 : 1;  // entries a thread works on at once
        constexpr int ACROSS = (IN + K - 1) / K, DOWN = (OUT + J - 1) / J;
        for (int i = thread(); i < ACROSS * DOWN; i += WARPS * LANES) {
            // neighbours take features that lie in different banks, so a thread's own are far apart
            const int k = i % ACROSS, j = i / ACROSS;
            T sum[J][K] = {};
#pragma unroll 2
            for (int row = 0; row < LANES; row += 4) {
                Four a[J], b[K];
#pragma unroll
                for (int r = 0; r < J; r++)
                    if (j + r * DOWN < OUT) a[r] = *(const Four*)(g + (j + r * DOWN) * PITCH + row);
#pragma unroll
                for (int s = 0; s < K; s++)
                    if (k + s * ACROSS < IN) b[s] = *(const Four*)(x + (k + s * ACROSS) * PITCH + row);
#pragma unroll
                for (int r = 0; r < J; r++)
#pragma unroll
                    for (int s = 0; s < K; s++)
#pragma unroll
                        for (int q = 0; q < 4; q++) sum[r][s] += a[r].v[q] * b[s].v[q];
            }
#pragma unroll
            for (int r = 0; r < J; r++)
#pragma unroll
                for (int s = 0; s < K; s++)
                    if (j + r * DOWN < OUT && k + s * ACROSS < IN) sums[(j + r * DOWN) * IN + k + s * ACROSS] += sum[r][s];
        }
    }
}

// sums[j] += Σ over the rows of g[j].
template <int N> DEVICE void add_rows(const T* g, T* sums) {
    if constexpr (!TILED) {
#pragma unroll
        for (int j = 0; j < N; j++) sums[j] += g[j];
    } else {
        for (int j = thread(); j < N; j += WARPS * LANES) {
            T sum = 0;
#pragma unroll
            for (int row = 0; row < LANES; row++) sum += g[j * PITCH + row];
            sums[j] += sum;
        }
    }
}

// --- lines ----------------------------------------------------------------------------------------------------------

// `bias` is null for none, KIND a function of the result, or -1.
template <int IN, int OUT, int KIND> DEVICE void linear(const T* w, const T* bias, const T* x, T* out, T c, T e) {
    product<IN, OUT>(w, x, [&](int j, int row, T sum) {
        out[j * PITCH + row] = apply<KIND>(bias ? sum + bias[j] : sum, c, e);
    });
    meet_rows();
}

template <int KIND, int N> DEVICE void unary(const T* x, T* out, T c, T e) {
    EACH(d, N) out[AT(d)] = apply<KIND>(x[AT(d)], c, e);
    meet_rows();
}

template <int KIND, int N, int WIDE_A, int WIDE_B> DEVICE void binary(const T* a, const T* b, T* out) {
    EACH(d, N) {
        const T x = a[AT(WIDE_A == N ? d : 0)], y = b[AT(WIDE_B == N ? d : 0)];
        out[AT(d)] = KIND == ADD ? x + y : KIND == SUB ? x - y : KIND == MUL ? x * y : x / y;
    }
    meet_rows();
}

template <int N> DEVICE void copy(const T* x, T* out) {
    EACH(d, N) out[AT(d)] = x[AT(d)];
    meet_rows();
}

template <int N> DEVICE void sum(const T* x, T* out) {
    EACH(d, 1) {
        T total = 0;
#pragma unroll
        for (int j = 0; j < N; j++) total += x[AT(j)];
        out[AT(d)] = total;
    }
    meet_rows();
}

template <int N> DEVICE void tensor(const T* values, T* out) {
    EACH(d, N) out[AT(d)] = values[d];
    meet_rows();
}

template <int N> DEVICE void constant(T value, T* out) {
    EACH(d, N) out[AT(d)] = value;
    meet_rows();
}

// --- lines in reverse: `g` is the adjoint of the result ---------------------------------------------------------------

// `w` is [OUT][padded(IN)] here; the sums are null where no gradient is wanted.
template <int IN, int OUT, int KIND, int HOW>
DEVICE void reverse_linear(const T* w, const T* x, const T* out, T* g, T* to_x, T* to_w, T* to_bias, T c, T e) {
    if constexpr (KIND >= 0) {
        EACH(d, OUT) g[AT(d)] *= slope<KIND>(out[AT(d)], out[AT(d)], c, e);
        meet_rows();
    }
    if (to_bias) add_rows<OUT>(g, to_bias);
    if (to_w) add_products<IN, OUT>(g, x, to_w);
    if constexpr (HOW != LEAVE)
        product<OUT, IN>(w, g, [&](int k, int row, T value) { give<HOW>(to_x + k * PITCH + row, value); });
    meet_rows();
}

template <int KIND, int N, int HOW> DEVICE void reverse_unary(const T* x, const T* out, const T* g, T* to_x, T c, T e) {
    EACH(d, N) give<HOW>(to_x + AT(d), g[AT(d)] * slope<KIND>(x[AT(d)], out[AT(d)], c, e));
    meet_rows();
}

// Gives f(d), of a result's feature d, to an input's adjoint; one that is spread over the features gets their sum.
template <int N, int WIDE, int HOW, typename F> DEVICE void pull(T* adjoint, F f) {
    if constexpr (HOW != LEAVE) {
        EACH(d, WIDE) {
            T value = f(d);
            if constexpr (WIDE == 1 && N > 1)
                for (int j = 1; j < N; j++) value += f(j);
            give<HOW>(adjoint + AT(d), value);
        }
        meet_rows();
    }
}

template <int KIND, int N, int WIDE_A, int WIDE_B, int HOW_A, int HOW_B>
DEVICE void reverse_binary(const T* a, const T* b, const T* out, const T* g, T* to_a, T* to_b) {
    pull<N, WIDE_A, HOW_A>(to_a, [&](int d) {
        const T y = b[AT(WIDE_B == N ? d : 0)], by = g[AT(d)];
        return KIND == MUL ? by * y : KIND == DIV ? by / y : by;
    });
    pull<N, WIDE_B, HOW_B>(to_b, [&](int d) {
        const T x = a[AT(WIDE_A == N ? d : 0)], y = b[AT(WIDE_B == N ? d : 0)], by = g[AT(d)];
        return KIND == MUL ? by * x : KIND == DIV ? -by * out[AT(d)] / y : KIND == SUB ? -by : by;
    });
}

template <int N, int HOW> DEVICE void reverse_copy(const T* g, T* to_x) {
    EACH(d, N) give<HOW>(to_x + AT(d), g[AT(d)]);
    meet_rows();
}

template <int N, int HOW> DEVICE void reverse_sum(const T* g, T* to_x) {
    EACH(d, N) give<HOW>(to_x + AT(d), g[AT(0)]);
    meet_rows();
}

template <int N> DEVICE void clear(T* x) {
    EACH(d, N) x[AT(d)] = 0;
    meet_rows();
}

// The gradient of a tensor that has one row a sample.
template <int N> DEVICE void add_own(const T* g, T* sums) {
    EACH(d, N) sums[AT(d)] += g[AT(d)];
    meet_rows();
}

}  // namespace neuralode
