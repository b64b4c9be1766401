// The backward pass: the exact gradient of the steps that were taken, the tiles of a block one after the other.
//
// Only the states of the stages were kept, so that every stage is evaluated again before it is reversed.
#pragma once
#include "step.cuh"

namespace neuralode {

// A tile's adjoints: of the state, and of everything in a step.
struct Adjoints {
    T *slot, *registers;           // registers and their adjoints
    T *lambda, *to_start, *to_end; // of the state at both ends of a step
    T *k, *du;                     // of the slopes, and of a stage's state
};

// A step that is reversed, and this thread's share of what it gives to the times.
struct Span {
    double t, h;
    int first, last;            // the output times in it
    double start = 0, size = 0; // the adjoints of t and h
    double* each;               // [times]: those of the output times

    // From an output j that is read at θ = (t_j - t) / h.
    DEVICE void give(int j, double theta, double by_time) {
        each[j] += by_time;
        start -= by_time, size -= theta * by_time;
    }
};

// Slope q as a function of time, of the step's size, and of where between its ends the outputs are read. Its adjoint is
// h times a sum, which is what the state at a stage, at the end or at an output changes by with h.
DEVICE void pull_times(const Problem& p, const Tile& tile, Span& span, const Adjoints& at, int q, double fraction,
                       const T* to_slope) {
    const T* k = at.slot + OUTPUT * PITCH;
    double along = 0;
    EACH(d, WIDTH) along += double(k[AT(d)]) * double(to_slope[AT(d)]);
    span.size += along / span.h;
    if constexpr (TIME >= 0) EACH(d, 1) {
        const double by_time = at.registers[TIME * PITCH + AT(d)];
        span.start += by_time, span.size += fraction * by_time;
    }
    const double* ts = times_of(p, tile.row);
    for (int j = span.first; j < span.last && tile.real; j++) {
        const Reading r = reading(p, ts, j, span.t, span.h);
        const double rate = r.at_end ? 0 : r.slope_rate(q);
        if (rate == 0) continue;
        const T* g = p.cotangents + (j * p.rows + tile.row) * WIDTH;
        double change = 0;
        EACH(d, WIDTH) change += double(k[AT(d)]) * double(g[d]);
        span.give(j, r.theta, rate * change);
    }
}

// The grid moves with the first time, or with the output that a step ended at before; a step that ends at an output
// stretches with it.
DEVICE void give_times(const Problem& p, const Tile& tile, const Span& span) {
    if (!tile.real) return;
    double start = span.start;
    if (span.last > span.first && at_end(p, times_of(p, tile.row), span.last - 1, span.t, span.h))
        span.each[span.last - 1] += span.size, start -= span.size;
    span.each[LANDS ? span.first - 1 : 0] += start;
}

// du, the adjoint of the state that lies in the slot, from that of its slope, the q-th of the step.
DEVICE void reverse_slot(const Problem& p, const Given& given, const Tile& tile, Span& span, int q, double fraction,
                         Adjoints& at, T* du) {
    const T* to_slope = at.k + q * WIDTH * PITCH;
    if constexpr (TIME >= 0) EACH(d, 1) at.slot[TIME * PITCH + AT(d)] = T(span.t + fraction * span.h);
    meet_rows();
    evaluate(given, at.slot);
    clear_adjoints(at.registers);
    EACH(d, WIDTH) at.registers[OUTPUT * PITCH + AT(d)] = to_slope[AT(d)];
    meet_rows();
    reverse(given, at.slot, at.registers);
    EACH(d, WIDTH) du[AT(d)] = at.registers[AT(d)];
    if constexpr (TIMES_MOVE) pull_times(p, tile, span, at, q, fraction, to_slope);
    meet_rows();
}

// Takes in what the outputs of a step were given; true if the slope at its end got something.
DEVICE bool pull_outputs(const Problem& p, const Tile& tile, Span& span, Adjoints& at, const T* y, const T* y1) {
    const double* ts = times_of(p, tile.row);
    bool found = false;
    for (int j = span.first; j < span.last && tile.real; j++) {
        const Reading r = reading(p, ts, j, span.t, span.h);
        const T* g = p.cotangents + (j * p.rows + tile.row) * WIDTH;
        const T start = T(r.start()), finish = T(r.finish());
        EACH(d, WIDTH) at.to_start[AT(d)] += start * g[d], at.to_end[AT(d)] += finish * g[d];
        if (TIMES_MOVE && BETWEEN != POLYNOMIAL && !r.at_end) {
            double change = 0;
            EACH(d, WIDTH) change += (double(y1[d]) - double(y[d])) * double(g[d]);
            span.give(j, r.theta, r.finish_rate() * change / span.h);
        }
        if (r.at_end || BETWEEN == LINE) continue;
        for (int i = 0; i < SLOPES; i++) {
            const T weight = T(span.h * r.slope(i));
            EACH(d, WIDTH) at.k[i * WIDTH * PITCH + AT(d)] += weight * g[d];
        }
        found |= r.slope(END) != 0 || (TIMES_MOVE && r.slope_rate(END) != 0);
    }
    return found;
}

// The states of the stages of a step from its start, where they were not kept.
DEVICE void make_stages(const Problem& p, const Given& given, const Tile& tile, long long n, double t, double h, T* u,
                        T* k, T* slot) {
    load_stage(p, n, 0, tile.row, u);
    for (int i = 0; i < INNER; i++) {
        if (i) stage(i, u, k, T(h), u + i * WIDTH * PITCH);
        EACH(d, WIDTH) slot[AT(d)] = u[i * WIDTH * PITCH + AT(d)];
        evaluate_slot(given, slot, t + c[i] * h, k + i * WIDTH * PITCH);
    }
}

DEVICE void reverse_step(const Problem& p, const Given& given, const Tile& tile, long long n, long long count,
                         Span& span, Adjoints& at, T* u, T* values) {
    const double t = span.t, h = span.h;
    EACH(d, WIDTH) at.to_end[AT(d)] = at.lambda[AT(d)], at.to_start[AT(d)] = 0;
    EACH(d, SLOPES * WIDTH) at.k[AT(d)] = 0;
    meet_rows();
    if constexpr (!KEEP_STAGES) make_stages(p, given, tile, n, t, h, u, values, at.slot);
    const T* y1 = n + 1 < count ? stage_of(p, n + 1, 0, tile.row) : p.end_state + tile.row * WIDTH;
    bool ends = pull_outputs(p, tile, span, at, stage_of(p, n, 0, tile.row), y1);
    if constexpr (TILED) ends = meet_or(ends);
    if (ends) {
        EACH(d, WIDTH) at.slot[AT(d)] = y1[d];
        reverse_slot(p, given, tile, span, END, 1, at, at.du);
        EACH(d, WIDTH) at.to_end[AT(d)] += at.du[AT(d)];
    }
    EACH(d, WIDTH) {
        const T g = at.to_end[AT(d)];
        at.to_start[AT(d)] += g;
        for (int i = 0; i < INNER; i++) at.k[i * WIDTH * PITCH + AT(d)] += T(h) * b[i] * g;
    }
    meet_rows();
    STAGE_LOOP
    for (int i = INNER - 1; i >= 0; i--) {
        if constexpr (KEEP_STAGES) load_stage(p, n, i, tile.row, at.slot);
        else EACH(d, WIDTH) at.slot[AT(d)] = u[i * WIDTH * PITCH + AT(d)];
        reverse_slot(p, given, tile, span, i, c[i], at, at.du);
        EACH(d, WIDTH) {
            const T g = at.du[AT(d)];
            at.to_start[AT(d)] += g;
            for (int j = 0; j < INNER; j++)
                if (j < i) at.k[j * WIDTH * PITCH + AT(d)] += T(h) * a[i][j] * g;
        }
        meet_rows();
    }
    EACH(d, WIDTH) at.lambda[AT(d)] = at.to_start[AT(d)];
    if constexpr (TIMES_MOVE) give_times(p, tile, span);
    meet_rows();
}

DEVICE void reverse_tile(const Problem& p, const Given& given, const Tile& tile, Adjoints& at, T* u, T* values) {
    EACH(d, WIDTH) at.lambda[AT(d)] = 0;
    EACH(d, OWN_ROWS) given.row_sums[AT(d)] = 0;
    meet_rows();
    const bool own = STEPS == OWN;
    double* each = nullptr;
    if constexpr (TIMES_MOVE) each = p.grad_times + ((TILED ? warp() : 0) * p.rows + tile.row) * p.times;
    const long long count = STEPS == GIVEN ? p.steps : p.step_count[own ? tile.row : 0];
    for (long long n = count - 1; n >= 0; n--) {
        const long long row = own ? n * p.rows + tile.row : n, before = own ? row - p.rows : row - 1;
        Span span{p.step_t[row], p.step_h[row], n ? p.until[before] : 1, p.until[row], 0, 0, each};
        reverse_step(p, given, tile, n, count, span, at, u, values);
    }
    if (!tile.real) return;
    EACH(d, WIDTH) {
        const long long to = tile.row * WIDTH + d;
        p.grad_y0[to] = at.lambda[AT(d)] + p.cotangents[to];
    }
    EACH(d, OWN_ROWS) p.grad_rows[tile.row * OWN_ROWS + d] = given.row_sums[AT(d)];
}

constexpr int AGAIN = KEEP_STAGES ? 0 : INNER * WIDTH;  // features of the stages that are made again

KERNEL void neuralode_backward(const Problem p) {
    SHARED_MEMORY(memory)
    Room room{memory, p.overflow + (long long)block() * OVERFLOW};
    const T* tensors = load_tensors(p, room);
    T* scratch = room.take(THREADS * (8 / (int)sizeof(T)));
    FEATURES(slot, SLOT);
    FEATURES(registers, SLOT);
    FEATURES(ends, 4 * WIDTH);
    FEATURES(k, SLOPES * WIDTH);
    FEATURES(row_sums, OWN_ROWS);
    FEATURES(u, AGAIN);
    FEATURES(values, AGAIN);
    T* total = p.grad_tensors + (long long)block() * SUMS;
#if TILED
    T* sums = SHARED_SUMS ? room.take(SUMS) : total;
    for (int i = thread(); i < SUMS; i += THREADS) sums[i] = 0;
    meet();
#else
    T sums[SUMS > 0 ? SUMS : 1] = {};
#endif
    constexpr int PART = WIDTH * PITCH;
    Adjoints at{slot, registers, ends, ends + PART, ends + 2 * PART, k, ends + 3 * PART};
    OWN_TILES(p) {
        const Tile tile(p, i);
        reverse_tile(p, given_for(p, tensors, tile.row, sums, row_sums), tile, at, u, values);
        meet_rows();
    }
#if TILED
    if constexpr (SHARED_SUMS)
        for (int i = thread(); i < SUMS; i += THREADS) total[i] = sums[i];
#else
    for (int i = 0; i < SUMS; i++) {
        const double sum = over_block(sums[i], scratch);
        if (thread() == 0) total[i] = T(sum);
    }
#endif
}

}  // namespace neuralode
