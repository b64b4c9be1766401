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

// Calls work(start, size, part) for the pieces of `count` numbers, part being the thread's index.
template <typename Work>
inline void each_piece(int64_t count, const Workers& workers, Work work) {
    Team team;
    const int threads = (int)std::max<int64_t>(1, std::min<int64_t>(workers.threads, count / A_THREADS));
    const int64_t pieces = (count + PIECE - 1) / PIECE;
    team.run(workers.runtime, threads, [&](int index) {
        for (int64_t i = pieces * index / team.count; i < pieces * (index + 1) / team.count; i++)
            work(i * PIECE, std::min(PIECE, count - i * PIECE), index);
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
