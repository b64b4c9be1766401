// One step of the method for the rows of a block, and what is read between its ends.
#pragma once
#include "control.h"
#include "lines.cuh"

namespace neuralode {

constexpr int SLOPES = INNER + 1;  // those of the stages, and the one at the end of the step
constexpr int END = INNER;
enum Steps { GIVEN, SHARED, OWN };  // the steps are given, chosen for all rows together, or for each row

// A solve. Arrays are [rows][width] unless they say otherwise; the device's memory, but for the numbers.
struct Problem {
    long long rows, steps;     // steps: their number where they are given, else how many there is room for
    long long tiles;
    int times, times_per_sample;
    const T *tensors, *own_rows, *y0, *slope;
    T* ys;                     // [times][rows][width]
    const double *ts, *grid;   // [times] or [rows][times]; ends of the steps that are given
    T *stages, *end_state;     // [step][stage][rows][width], and the state at the end
    double *step_t, *step_h;   // [step], or [step][rows]
    int *until, *step_count;   // the output time after the step; the number of steps, one or one a block's rows
    double* parts;             // [2][tiles][groups]
    T* workspace;              // [tile][WORKSPACE][rows of a block]
    char* overflow;            // [block][OVERFLOW]
    unsigned* tickets;
    int* status;
    int* counts;               // accepted, rejected, evaluations: [3][rows]
    const T* cotangents;       // [times][rows][width]
    T *grad_y0, *grad_rows;
    T* grad_tensors;           // [block][SUMS]
    double* grad_times;        // [warp of a row][rows][times]: each thread's share
    Limits limits;
};

// Hands out memory: that which a block's threads share, and a block's own part of the device's for what does not fit.
struct Room {
    char *shared, *overflow;
    DEVICE T* take(int n, bool fits = true) {
        char*& next = fits ? shared : overflow;
        T* at = (T*)next;
        next += (n * (int)sizeof(T) + 31) / 32 * 32;
        return at;
    }
};

// Room for so many features of the block's rows; FITS_... says whether they lie in shared memory.
#if TILED
#define FEATURES(name, n) T* name = room.take((n) * PITCH, FITS_##name)
#else
#define FEATURES(name, n) T name[(n) > 0 ? (n) : 1]
#endif

struct Tile {
    long long index, row;
    bool real;  // whether this thread's row is one; a row that is missing in the last tile repeats the last
    DEVICE Tile(const Problem& p, long long tile) : index(tile), row(tile * ROWS_OF_BLOCK + row_of_block()) {
        real = row < p.rows;
        if (!real) row = p.rows - 1;
    }
};

DEVICE const T* load_tensors(const Problem& p, Room& room) {
    if constexpr (!SHARED_TENSORS) return p.tensors;
    T* tensors = room.take(TENSORS);
    for (int i = thread(); i < TENSORS; i += THREADS) tensors[i] = p.tensors[i];
    meet();
    return tensors;
}

DEVICE Given given_for(const Problem& p, const T* tensors, long long row, T* sums = nullptr, T* row_sums = nullptr) {
    return {tensors, p.own_rows + row * OWN_ROWS, sums, row_sums};
}

// The tiles of a block.
#define OWN_TILES(p) for (long long i = block(); i < (p).tiles; i += blocks())

// Σ over the warps that share a row.
DEVICE T over_features(T mine, T* scratch) {
    if constexpr (!TILED) return mine;
    scratch[thread()] = mine;
    meet();
    T sum = 0;
    for (int i = 0; i < WARPS; i++) sum += scratch[i * LANES + lane()];
    meet();
    return sum;
}

// Σ over the block's threads, in an order that does not change.
DEVICE double over_block(double mine, T* scratch) {
    double* sums = (double*)scratch;
    sums[thread()] = mine;
    meet();
    for (int n = THREADS / 2; n > 0; n /= 2) {
        if (thread() < n) sums[thread()] += sums[thread() + n];
        meet();
    }
    const double sum = sums[0];
    meet();
    return sum;
}

// Squares of value(d) for every part of the state, summed over the features of a row.
template <typename Value> DEVICE void squares(T* sums, T* scratch, Value value) {
    for (int part = 0; part < GROUPS; part++) {
        T sum = 0;
        EACH(d, WIDTH) {
            const T v = GROUPS == 1 || group[d] == part ? value(d) : T(0);
            sum += v * v;
        }
        sums[part] = over_features(sum, scratch);
    }
}

// Largest root mean square of a part, from sums over so many rows.
template <typename Sum> DEVICE double norm(const Sum* sums, double rows) {
    double largest = 0;
    for (int part = 0; part < GROUPS; part++) {
        const double value = sqrt(double(sums[part]) / (rows * group_size[part]));
        if (!(value <= largest)) largest = value;  // a NaN stays
    }
    return largest;
}

DEVICE T tolerance(const Problem& p, T size) { return T(p.limits.rtol) * fabs(size) + T(p.limits.atol); }

// f of the state that lies in the slot; the slope to k.
DEVICE void evaluate_slot(const Given& given, T* slot, double t, T* k) {
    if constexpr (TIME >= 0) EACH(d, 1) slot[TIME * PITCH + AT(d)] = T(t);
    meet_rows();
    evaluate(given, slot);
    EACH(d, WIDTH) k[AT(d)] = slot[OUTPUT * PITCH + AT(d)];
    meet_rows();
}

// The state at stage i.
DEVICE void stage(int i, const T* y, const T* k, T h, T* out) {
    EACH(d, WIDTH) {
        T sum = 0;
        for (int j = 0; j < INNER; j++)
            if (j < i) sum += a[i][j] * k[j * WIDTH * PITCH + AT(d)];
        out[AT(d)] = y[AT(d)] + h * sum;
    }
}

DEVICE T* stage_of(const Problem& p, long long step, int i, long long row) {
    return p.stages + ((step * (KEEP_STAGES ? INNER : 1) + i) * p.rows + row) * WIDTH;
}

// Writes the state of a stage to the record of a step.
DEVICE void keep_stage(const Problem& p, long long step, int i, long long row, bool real, const T* u) {
    if (!p.stages || !real || (!KEEP_STAGES && i)) return;
    T* to = stage_of(p, step, i, row);
    EACH(d, WIDTH) to[d] = u[AT(d)];
}

DEVICE void load_stage(const Problem& p, long long step, int i, long long row, T* u) {
    const T* from = stage_of(p, step, i, row);
    EACH(d, WIDTH) u[AT(d)] = from[d];
}

// From y and its slope k[0]: the other slopes, and y1. Every row has its own t and h.
DEVICE void attempt(const Problem& p, const Given& given, double t, double h, long long step, long long row, bool real,
                    const T* y, T* k, T* slot, T* y1) {
    keep_stage(p, step, 0, row, real, y);
    STAGE_LOOP
    for (int i = 1; i < INNER; i++) {
        stage(i, y, k, T(h), slot);
        keep_stage(p, step, i, row, real, slot);
        evaluate_slot(given, slot, t + c[i] * h, k + i * WIDTH * PITCH);
    }
    EACH(d, WIDTH) {
        T sum = 0;
        for (int j = 0; j < INNER; j++) sum += b[j] * k[j * WIDTH * PITCH + AT(d)];
        y1[AT(d)] = y[AT(d)] + T(h) * sum;
    }
    if constexpr (FSAL) {
        EACH(d, WIDTH) slot[AT(d)] = y1[AT(d)];
        evaluate_slot(given, slot, t + h, k + END * WIDTH * PITCH);
    }
}

// The error of a step over its tolerance, feature d.
DEVICE T error_ratio(const Problem& p, int d, T h, const T* y, const T* y1, const T* k) {
    T sum = 0;
    for (int i = 0; i < STAGES; i++) sum += error[i] * k[i * WIDTH * PITCH + AT(d)];
    if constexpr (HAS_LOW) {
        T low = 0;
        for (int i = 0; i < STAGES; i++) low += error_low[i] * k[i * WIDTH * PITCH + AT(d)];
        sum *= sqrt(sum * sum / (sum * sum + T(0.01) * low * low + T(1e-30)));
    }
    return h * sum / (T(p.limits.rtol) * fmax(fabs(y[AT(d)]), fabs(y1[AT(d)])) + T(p.limits.atol));
}

// How y(t + θh) = start · y + finish · y1 + h Σ slope(i) k[i] is read.
struct Reading {
    double theta;
    bool at_end;
    DEVICE double finish() const {
        if (at_end) return 1;
        return BETWEEN == LINE ? theta : BETWEEN == HERMITE ? theta * theta * (3 - 2 * theta) : 0;
    }
    DEVICE double start() const { return at_end ? 0 : 1 - finish(); }
    DEVICE double slope(int i) const {
        if (at_end || BETWEEN == LINE) return 0;
        if constexpr (BETWEEN == HERMITE) {
            if (i == 0) return theta * (1 - theta) * (1 - theta);
            return i == END ? theta * theta * (theta - 1) : 0;
        }
        if (i >= STAGES) return 0;
        double value = 0;
        for (int n = DEGREE - 1; n >= 0; n--) value = (value + interpolant[i][n]) * theta;
        return value;
    }
    // Their derivatives by θ, of a reading that is not at the end.
    DEVICE double finish_rate() const {
        return BETWEEN == LINE ? 1 : BETWEEN == HERMITE ? 6 * theta * (1 - theta) : 0;
    }
    DEVICE double slope_rate(int i) const {
        if (BETWEEN == LINE) return 0;
        if constexpr (BETWEEN == HERMITE) {
            if (i == 0) return (1 - theta) * (1 - 3 * theta);
            return i == END ? theta * (3 * theta - 2) : 0;
        }
        if (i >= STAGES) return 0;
        double value = 0;
        for (int n = DEGREE - 1; n >= 0; n--) value = value * theta + (n + 1) * interpolant[i][n];
        return value;
    }
};

DEVICE const double* times_of(const Problem& p, long long row) { return p.times_per_sample ? p.ts + row * p.times : p.ts; }

// A step that meets an output time by chance does not move with it.
DEVICE bool at_end(const Problem& p, const double* ts, int j, double t, double h) {
    const bool bound = !TIMES_MOVE || LANDS || j == p.times - 1;
    return bound && fabs(ts[j] - (t + h)) <= 1e-12 * fmax(fabs(t + h), fabs(h));
}

DEVICE Reading reading(const Problem& p, const double* ts, int j, double t, double h) {
    return {h != 0 ? (ts[j] - t) / h : 0, at_end(p, ts, j, t, h)};
}

// Writes the states at the output times first, ..., last - 1, which lie in a step.
DEVICE void read_outputs(const Problem& p, long long row, bool real, double t, double h, int first, int last, const T* y,
                         const T* y1, const T* k) {
    const double* ts = times_of(p, row);
    for (int j = first; j < last && real; j++) {
        const Reading r = reading(p, ts, j, t, h);
        T* to = p.ys + (j * p.rows + row) * WIDTH;
        if (r.at_end) {
            EACH(d, WIDTH) to[d] = y1[AT(d)];
            continue;
        }
        const T start = T(r.start()), finish = T(r.finish());
        EACH(d, WIDTH) {
            T sum = 0;
            for (int i = 0; i < SLOPES; i++) sum += T(r.slope(i)) * k[i * WIDTH * PITCH + AT(d)];
            to[d] = start * y[AT(d)] + finish * y1[AT(d)] + T(h) * sum;
        }
    }
}

}  // namespace neuralode
