// What a Runge-Kutta step does around a field that PyTorch evaluates: combinations of its slopes, and their error over
// the tolerance, each in one pass over the memory.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "team.h"

namespace neuralode {

// A step's slopes and their weights, over states of `count` numbers.
struct Slopes {
    const void* const* k;
    const double* weights;
    int32_t used;
    int64_t count;
};

struct Workers {
    Runtime runtime;
    int32_t threads;
};

constexpr int64_t PIECE = 1024;       // numbers that stay in the first cache
constexpr int SIDE_BY_SIDE = 16;
constexpr int64_t A_THREADS = 32768;  // least numbers that are worth a thread

// Calls work(from, to, part) for the threads' shares of `items`, which hold `count` numbers; part is the thread's index.
template <typename Work>
inline void share(int64_t items, int64_t count, const Workers& workers, Work work) {
    Team team;
    const int threads = (int)std::max<int64_t>(1, std::min<int64_t>(workers.threads, count / A_THREADS));
    team.run(workers.runtime, threads,
             [&](int index) { work(items * index / team.count, items * (index + 1) / team.count, index); });
}

// Calls work(start, size, part) for the pieces of `count` numbers.
template <typename Work>
inline void each_piece(int64_t count, const Workers& workers, Work work) {
    share((count + PIECE - 1) / PIECE, count, workers, [&](int64_t from, int64_t to, int part) {
        for (int64_t i = from; i < to; i++) work(i * PIECE, std::min(PIECE, count - i * PIECE), part);
    });
}

// sum = Σ w k over a piece.
template <typename T>
inline void combine(const Slopes& s, int64_t start, int64_t size, T* sum) {
    std::fill_n(sum, size, T(0));
    auto slope = [&](int j) { return (const T*)s.k[j] + start; };
    int j = 0;
    for (; j + 2 < s.used; j += 3) {  // by threes, for the sum is read and written each time
        const T *a = slope(j), *b = slope(j + 1), *c = slope(j + 2);
        const T wa = T(s.weights[j]), wb = T(s.weights[j + 1]), wc = T(s.weights[j + 2]);
        for (int64_t i = 0; i < size; i++) sum[i] += wa * a[i] + wb * b[i] + wc * c[i];
    }
    for (; j < s.used; j++) {
        const T* a = slope(j);
        const T wa = T(s.weights[j]);
        for (int64_t i = 0; i < size; i++) sum[i] += wa * a[i];
    }
}

// out = y + Σ w k.
template <typename T>
inline void take_stage(const Slopes& s, const T* y, T* out, const Workers& workers) {
    each_piece(s.count, workers, [&](int64_t start, int64_t size, int) {
        T sum[PIECE];
        combine(s, start, size, sum);
        for (int64_t i = 0; i < size; i++) out[start + i] = y[start + i] + sum[i];
    });
}

// The transpose: to[j] = w[j] g.
template <typename T>
inline void pull_stage(const Slopes& s, const T* g, T* const* to, const Workers& workers) {
    each_piece(s.count, workers, [&](int64_t start, int64_t size, int) {
        for (int j = 0; j < s.used; j++) {
            const T w = T(s.weights[j]);
            for (int64_t i = start; i < start + size; i++) to[j][i] = w * g[i];
        }
    });
}

// Step-size control of rows that have steps of their own: the controller's numbers, and [rows] each of the rest.
struct RowControl {
    double rtol, atol, integral, proportional, derivative, safety, min_factor, max_factor;
    int32_t order;  // of the error's estimate
    const double *step, *size, *ceiling, *last, *before;  // step: signed; last, before: error ratios of accepted steps
    uint8_t *accepted, *broken;                           // broken: the error is not finite
    double *next_size, *next_ceiling, *next_last, *next_before;
};

// Root mean square of h Σ w k over rtol · max(|y|, |y1|) + atol for a row; NaN where one of them is.
template <typename T>
inline double row_ratio(const Slopes& s, const T* y, const T* y1, int64_t start, int64_t width, T h, T rtol, T atol) {
    double total = 0;
    for (int64_t from = start; from < start + width; from += PIECE) {
        const int64_t size = std::min(PIECE, start + width - from);
        T sum[PIECE];
        combine(s, from, size, sum);
        T squares = 0;
        for (int64_t i = 0; i < size; i++) {
            const T a = std::fabs(y[from + i]), b = std::fabs(y1[from + i]);
            const T ratio = h * sum[i] / ((a > b || a != a ? a : b) * rtol + atol);
            squares += ratio * ratio;
        }
        total += squares;
    }
    return std::sqrt(total / std::max<int64_t>(1, width));
}

// Whether each row's step stands, and how long its next one may be; returns the number of broken rows.
template <typename T>
inline int64_t judge_rows(const Slopes& s, const T* y, const T* y1, int64_t rows, const RowControl& c,
                          const Workers& workers) {
    const int64_t width = s.count / rows;
    const bool remembers = c.proportional != 0 || c.derivative != 0;
    const double now = -(c.integral + c.proportional + c.derivative) / c.order;
    const double then = (c.proportional + 2 * c.derivative) / c.order, earlier = -c.derivative / c.order;
    auto judge = [&](int64_t r) {
        double ratio = row_ratio(s, y, y1, r * width, width, T(c.step[r]), T(c.rtol), T(c.atol));
        const bool accepted = ratio <= 1;
        c.accepted[r] = accepted;
        c.broken[r] = !std::isfinite(ratio);
        ratio = std::isfinite(ratio) ? std::min(std::max(ratio, 1e-10), 1e10) : 1e10;
        double factor = c.safety * std::pow(ratio, now);
        if (remembers) factor *= std::pow(c.last[r], then) * std::pow(c.before[r], earlier);
        factor = std::max(factor, c.min_factor);
        if (accepted && !remembers) factor = std::max(factor, 1.0);  // an accepted step does not shrink the next
        c.next_ceiling[r] = accepted ? c.max_factor : 1;             // after a rejected one no step grows
        c.next_size[r] = c.size[r] * std::min(factor, std::min(c.ceiling[r], c.next_ceiling[r]));
        if (!remembers) return;
        c.next_before[r] = accepted ? c.last[r] : c.before[r];
        c.next_last[r] = accepted ? ratio : c.last[r];
    };
    share(rows, s.count, workers, [&](int64_t from, int64_t to, int) {
        for (int64_t r = from; r < to; r++) judge(r);
    });
    return std::count(c.broken, c.broken + rows, 1);
}

// Root mean square of Σ w k over rtol · max(|y|, |y1|) + atol; NaN where one of them is.
template <typename T>
inline double error_ratio(const Slopes& s, const T* y, const T* y1, double rtol, double atol, const Workers& workers) {
    std::vector<double> parts(std::max(1, workers.threads), 0.0);
    each_piece(s.count, workers, [&](int64_t start, int64_t size, int index) {
        T ratio[PIECE] = {}, squares[SIDE_BY_SIDE] = {};  // sums side by side, as vectors need them
        combine(s, start, size, ratio);
        for (int64_t i = 0; i < size; i++) {
            const T a = std::fabs(y[start + i]), b = std::fabs(y1[start + i]);
            ratio[i] /= (a > b || a != a ? a : b) * T(rtol) + T(atol);
        }
        for (int64_t i = 0; i < PIECE; i += SIDE_BY_SIDE)
            for (int l = 0; l < SIDE_BY_SIDE; l++) squares[l] += ratio[i + l] * ratio[i + l];
        for (T x : squares) parts[index] += x;
    });
    double total = 0;
    for (double part : parts) total += part;
    return std::sqrt(total / std::max<int64_t>(1, s.count));
}

}  // namespace neuralode
