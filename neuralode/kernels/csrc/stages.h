// What a Runge-Kutta step does around a field that PyTorch evaluates: combinations of its slopes, and their error over
// the tolerance, each in one pass over the memory.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "control.h"
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

// Rows that have steps of their own: tolerances and controller, and [rows] each of the rest.
struct RowControl {
    Limits limits;  // what they say of first steps and of numbers of steps is not asked
    int32_t order;                              // of the error's estimate
    const double *h, *t, *end, *stretch;        // the step that was tried, signed, from t; how far one may reach for the end
    const double *ceiling, *last, *before;      // the most that it may grow; error ratios of accepted steps
    const uint8_t *lands, *ended;               // whether it ends at the row's end; whether the row was there before
    const int64_t* output;                      // the output time that comes next
    double *moved, *next_t, *next_h, *size;     // size: what the controller wants next_h to be
    double *next_ceiling, *next_last, *next_before;
    uint8_t *landed, *accepted, *broken, *now_ended, *next_lands;  // broken: the error is not finite
    int64_t* next_output;
    const double* times;                        // [rows][outputs]
    int32_t outputs;
    int32_t most;                               // output times that a row passed
    double smallest;                            // size of the rows that have not ended; infinite where all have
};

// Root mean squares of h Σ w k over rtol · max(|y|, |y1|) + atol for the rows `from` to `to`; NaN where one of them is.
// A row's numbers are added up in the same order wherever it lies.
template <typename T>
inline void row_ratios(const Slopes& s, const T* y, const T* y1, int64_t from, int64_t to, int64_t width,
                       const RowControl& c, double* ratios) {
    const int64_t together = std::max<int64_t>(1, PIECE / width);  // rows in a piece, or one in several
    for (int64_t first = from; first < to; first += together) {
        const int64_t past = std::min(first + together, to);
        std::fill(ratios + first, ratios + past, 0.0);
        for (int64_t start = first * width; start < past * width; start += PIECE) {
            const int64_t size = std::min(PIECE, past * width - start), part = std::min(size, width);
            T sum[PIECE];
            combine(s, start, size, sum);
            for (int64_t i = 0; i < size; i += part) {
                const int64_t r = (start + i) / width;
                const T h = T(c.h[r]);
                T squares = 0;
                for (int64_t k = i; k < i + part; k++) {
                    const T a = std::fabs(y[start + k]), b = std::fabs(y1[start + k]);
                    const T ratio = h * sum[k] / ((a > b || a != a ? a : b) * T(c.limits.rtol) + T(c.limits.atol));
                    squares += ratio * ratio;
                }
                ratios[r] += squares;
            }
        }
    }
    for (int64_t r = from; r < to; r++) ratios[r] = std::sqrt(ratios[r] / width);
}

// What becomes of the step of each row: whether it stands, where the row is then, and which step is the next; returns
// the number of broken rows.
template <typename T>
inline int64_t judge_rows(const Slopes& s, const T* y, const T* y1, int64_t rows, RowControl& c,
                          const Workers& workers) {
    const int64_t width = s.count / rows;
    auto judge = [&](int64_t r, double ratio) {
        Progress row;
        row.size = std::fabs(c.h[r]), row.rejected = c.ceiling[r] == 1;
        if (c.next_last) row.last = c.last[r], row.before = c.before[r];
        const bool stands = row.accepts(c.limits, c.order, ratio);
        c.broken[r] = !std::isfinite(ratio);
        c.size[r] = row.size;
        c.next_ceiling[r] = stands ? c.limits.max_factor : 1;
        if (c.next_last) c.next_last[r] = row.last, c.next_before[r] = row.before;
        c.accepted[r] = stands && !c.ended[r];
        c.moved[r] = c.accepted[r] ? c.h[r] : 0;
        c.landed[r] = c.lands[r] && c.accepted[r];
        c.now_ended[r] = c.ended[r] || c.landed[r];
        c.next_t[r] = c.landed[r] ? c.end[r] : c.t[r] + c.moved[r];
        const double rest = c.end[r] - c.next_t[r];
        c.next_lands[r] = !c.now_ended[r] && c.size[r] * c.stretch[r] >= std::fabs(rest);
        c.next_h[r] = c.now_ended[r] ? 0 : c.next_lands[r] ? rest : std::copysign(c.size[r], rest);
        const double* times = c.times + r * c.outputs;
        const double direction = times[c.outputs - 1] > times[0] ? 1 : -1;
        int64_t output = c.output[r];
        while (output < c.outputs - 1 && (times[output] - c.next_t[r]) * direction <= 0) output++;
        c.next_output[r] = output;
    };
    std::vector<double> ratios(rows);
    share(rows, s.count, workers, [&](int64_t from, int64_t to, int) {
        row_ratios(s, y, y1, from, to, width, c, ratios.data());
        for (int64_t r = from; r < to; r++) judge(r, ratios[r]);
    });
    c.smallest = INFINITY, c.most = 0;
    for (int64_t r = 0; r < rows; r++) {
        if (!c.now_ended[r]) c.smallest = std::min(c.smallest, c.size[r]);
        c.most = std::max(c.most, (int32_t)(c.next_output[r] - c.output[r]));
    }
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
