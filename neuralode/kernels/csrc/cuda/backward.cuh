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

// du, the adjoint of the state that lies in the slot, from that of its slope.
DEVICE void reverse_slot(const Given& given, double t, Adjoints& at, const T* to_slope, T* du) {
    if constexpr (TIME >= 0) EACH(d, 1) at.slot[TIME * PITCH + AT(d)] = T(t);
    meet_rows();
    evaluate(given, at.slot);
    clear_adjoints(at.registers);
    EACH(d, WIDTH) at.registers[OUTPUT * PITCH + AT(d)] = to_slope[AT(d)];
    meet_rows();
    reverse(given, at.slot, at.registers);
    EACH(d, WIDTH) du[AT(d)] = at.registers[AT(d)];
    meet_rows();
}

// Takes in what the outputs of a step were given; true if the slope at its end got something.
DEVICE bool pull_outputs(const Problem& p, const Tile& tile, double t, double h, int first, int last, Adjoints& at) {
    const double* ts = times_of(p, tile.row);
    bool found = false;
    for (int j = first; j < last && tile.real; j++) {
        const Reading r = reading(ts, j, t, h);
        const T* g = p.cotangents + (j * p.rows + tile.row) * WIDTH;
        const T start = T(r.start()), finish = T(r.finish());
        EACH(d, WIDTH) at.to_start[AT(d)] += start * g[d], at.to_end[AT(d)] += finish * g[d];
        if (r.at_end || BETWEEN == LINE) continue;
        for (int i = 0; i < SLOPES; i++) {
            const T weight = T(h * r.slope(i));
            EACH(d, WIDTH) at.k[i * WIDTH * PITCH + AT(d)] += weight * g[d];
        }
        found |= r.slope(END) != 0;
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

DEVICE void reverse_step(const Problem& p, const Given& given, const Tile& tile, long long n, long long count, double t,
                         double h, int first, int last, Adjoints& at, T* u, T* values) {
    EACH(d, WIDTH) at.to_end[AT(d)] = at.lambda[AT(d)], at.to_start[AT(d)] = 0;
    EACH(d, SLOPES * WIDTH) at.k[AT(d)] = 0;
    meet_rows();
    if constexpr (!KEEP_STAGES) make_stages(p, given, tile, n, t, h, u, values, at.slot);
    bool ends = pull_outputs(p, tile, t, h, first, last, at);
    if constexpr (TILED) ends = meet_or(ends);
    if (ends) {
        const T* y1 = n + 1 < count ? nullptr : p.end_state + tile.row * WIDTH;
        if (y1) EACH(d, WIDTH) at.slot[AT(d)] = y1[d];
        else load_stage(p, n + 1, 0, tile.row, at.slot);
        reverse_slot(given, t + h, at, at.k + END * WIDTH * PITCH, at.du);
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
        reverse_slot(given, t + c[i] * h, at, at.k + i * WIDTH * PITCH, at.du);
        EACH(d, WIDTH) {
            const T g = at.du[AT(d)];
            at.to_start[AT(d)] += g;
            for (int j = 0; j < INNER; j++)
                if (j < i) at.k[j * WIDTH * PITCH + AT(d)] += T(h) * a[i][j] * g;
        }
        meet_rows();
    }
    EACH(d, WIDTH) at.lambda[AT(d)] = at.to_start[AT(d)];
    meet_rows();
}

DEVICE void reverse_tile(const Problem& p, const Given& given, const Tile& tile, Adjoints& at, T* u, T* values) {
    EACH(d, WIDTH) at.lambda[AT(d)] = 0;
    EACH(d, OWN_ROWS) given.row_sums[AT(d)] = 0;
    meet_rows();
    const bool own = STEPS == OWN;
    const long long count = STEPS == GIVEN ? p.steps : p.step_count[own ? tile.row : 0];
    for (long long n = count - 1; n >= 0; n--) {
        const long long row = own ? n * p.rows + tile.row : n, before = own ? row - p.rows : row - 1;
        reverse_step(p, given, tile, n, count, p.step_t[row], p.step_h[row], n ? p.until[before] : 1, p.until[row], at, u,
                     values);
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
