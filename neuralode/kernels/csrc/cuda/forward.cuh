// The forward pass: every block takes its tiles of rows through the solve.
#pragma once
#include "step.cuh"

namespace neuralode {

// Whether the program says what the field said; numbers that are not finite are left to the solve.
DEVICE void compare(const Problem& p, const Tile& tile, const T* k) {
    if (!p.slope) return;
    const T* theirs = p.slope + tile.row * WIDTH;
    const T part = sizeof(T) == 4 ? T(1e-3) : T(1e-9);
    T size = 0;
    for (int d = 0; d < WIDTH; d++) size = fmax(size, fabs(theirs[d]));
    EACH(d, WIDTH)
        if (is_finite(theirs[d]) && !(fabs(k[AT(d)] - theirs[d]) <= part * (size + T(1e-2)))) raise(p.status, MISMATCH);
}

// The state of a tile at the start, its slope, and the first output.
DEVICE void begin(const Problem& p, const Given& given, const Tile& tile, T* y, T* k, T* slot) {
    EACH(d, WIDTH) {
        y[AT(d)] = slot[AT(d)] = p.y0[tile.row * WIDTH + d];
        if (tile.real) p.ys[tile.row * WIDTH + d] = y[AT(d)];
    }
    evaluate_slot(given, slot, times_of(p, tile.row)[0], k);
    compare(p, tile, k);
}

// Where f at the end of a step is needed and the method has not evaluated it. `wanted` may differ between the rows.
DEVICE int evaluate_end(const Given& given, double t, double h, bool wanted, const T* y1, T* k, T* slot) {
    if constexpr (TILED) wanted = meet_or(wanted);
    if (!wanted) return 0;
    EACH(d, WIDTH) slot[AT(d)] = y1[AT(d)];
    evaluate_slot(given, slot, t + h, k + END * WIDTH * PITCH);
    return 1;
}

// Whether an output time lies between the ends of a step, where a Hermite polynomial needs the slope at its end.
DEVICE bool reads_end(const Problem& p, const double* ts, int first, int last, double t, double h) {
    bool found = false;
    for (int j = first; j < last; j++) found |= !at_end(p, ts, j, t, h);
    return BETWEEN == HERMITE && !FSAL && found;
}

DEVICE void go_on(T* y, T* k, const T* y1) {
    EACH(d, WIDTH) y[AT(d)] = y1[AT(d)], k[AT(d)] = k[END * WIDTH * PITCH + AT(d)];
    meet_rows();
}

DEVICE void note(const Problem& p, const Tile& tile, int accepted, int rejected, int evaluations) {
    if (!tile.real || (TILED && warp())) return;
    p.counts[tile.row] = accepted, p.counts[p.rows + tile.row] = rejected;
    p.counts[2 * p.rows + tile.row] = evaluations;
}

// Looks whether a state at the end is finite, and keeps it for the backward pass.
DEVICE void keep_end(const Problem& p, const Tile& tile, const T* y) {
    if (!tile.real) return;
    EACH(d, WIDTH) {
        if (!is_finite(y[AT(d)])) raise(p.status, NON_FINITE);
        if (p.end_state) p.end_state[tile.row * WIDTH + d] = y[AT(d)];
    }
}

// --- steps that are given -------------------------------------------------------------------------------------------

DEVICE void through_given(const Problem& p, const Given& given, const Tile& tile, T* y, T* y1, T* k, T* slot) {
    const double* ts = p.ts;
    const double side = ts[p.times - 1] > ts[0] ? 1 : -1;
    int next = 1, evaluations = 1;
    for (long long n = 0; n < p.steps; n++) {
        const double t = p.grid[n], h = p.grid[n + 1] - t, rounding = 1e-12 * fmax(fabs(t + h), fabs(h));
        int last = next;
        while (last < p.times && (ts[last] - (t + h)) * side <= rounding) last++;
        attempt(p, given, t, h, n, tile.row, tile.real, y, k, slot, y1);
        evaluations += SLOPES - 2 + FSAL;
        if constexpr (!FSAL)
            evaluations += evaluate_end(given, t, h, n + 1 < p.steps || reads_end(p, ts, next, last, t, h), y1, k, slot);
        read_outputs(p, tile.row, tile.real, t, h, next, last, y, y1, k);
        if (p.stages && block() == 0 && thread() == 0) p.step_t[n] = t, p.step_h[n] = h, p.until[n] = last;
        next = last;
        go_on(y, k, y1);
    }
    keep_end(p, tile, y);
    note(p, tile, (int)p.steps, 0, evaluations);
}

// --- steps of each row's own ----------------------------------------------------------------------------------------

// A first step size for this thread's row.
DEVICE double first_size(const Problem& p, const Given& given, const Progress& r, const T* y, T* y1, T* k, T* slot,
                         T* scratch) {
    T sums[GROUPS];
    squares(sums, scratch, [&](int d) { return y[AT(d)] / tolerance(p, y[AT(d)]); });
    const double size = norm(sums, 1);
    squares(sums, scratch, [&](int d) { return k[AT(d)] / tolerance(p, y[AT(d)]); });
    const double slope = norm(sums, 1), h0 = first_guess(size, slope), h = r.end > r.t ? h0 : -h0;
    EACH(d, WIDTH) slot[AT(d)] = y[AT(d)] + T(h) * k[AT(d)];
    evaluate_slot(given, slot, r.t + h, y1);
    squares(sums, scratch, [&](int d) { return (y1[AT(d)] - k[AT(d)]) / tolerance(p, y[AT(d)]); });
    return first_step(size, slope, h0, norm(sums, 1), ORDER);
}

DEVICE void through_own(const Problem& p, const Given& given, const Tile& tile, T* y, T* y1, T* k, T* slot, T* scratch) {
    const double* ts = times_of(p, tile.row);
    const double eps = sizeof(T) == 4 ? 1.1920929e-7 : 2.220446049250313e-16;
    Progress r;
    r.t = ts[0], r.end = ts[p.times - 1], r.size = p.limits.first_step;
    int evaluations = 1;
    if (!r.size) r.size = first_size(p, given, r, y, y1, k, slot, scratch), evaluations++;
    const double side = r.end > r.t ? 1 : -1;
    long long n = 0;
    for (long long tried = 0;; tried++) {
        const bool going = TILED ? meet_or(!r.done) : !r.done;
        if (!going) break;
        const double rest = fabs(r.end - r.t), h = r.done ? 0 : side * fmin(r.size, rest);
        int wrong = SUCCESS;
        if (!r.done && tried >= p.limits.max_steps) wrong = MAX_STEPS;
        else if (!r.done && (r.t + h == r.t || !is_finite(h))) wrong = STEP_UNDERFLOW;
        else if (p.stages && n >= p.steps) wrong = FULL;
        if (TILED ? meet_or(wrong) : wrong) {
            raise(p.status, wrong);
            break;
        }
        attempt(p, given, r.t, h, n, tile.row, tile.real, y, k, slot, y1);
        evaluations += SLOPES - 2 + FSAL;
        T sums[GROUPS];
        squares(sums, scratch, [&](int d) { return error_ratio(p, d, T(h), y, y1, k); });
        const double ratio = norm(sums, 1), t = r.t;
        const int first = r.next;
        bool moved = false;
        if (!r.done) {
            const bool lands = r.size * (1 + 1e-9) >= rest;
            r.size = fabs(h);
            moved = r.accepts(p.limits, ERROR_ORDER, ratio);
            if (moved) {
                r.t = lands ? r.end : t + h, r.done = lands;
                while (r.next < p.times - 1 && (ts[r.next] - r.t) * side <= 0) r.next++;
                if (lands) r.next = p.times;
            } else if (!is_finite(ratio) && fabs(h) <= eps * fmax(fabs(t), fabs(r.end - ts[0]))) {
                raise(p.status, NON_FINITE), r.done = true;
            }
        }
        if (!(TILED ? meet_or(moved) : moved)) continue;
        if constexpr (!FSAL) evaluations += evaluate_end(given, t, h, moved, y1, k, slot);
        if (moved) read_outputs(p, tile.row, tile.real, t, h, first, r.next, y, y1, k);
        if (p.stages && tile.real && !(TILED && warp())) {
            const long long at = n * p.rows + tile.row;
            p.step_t[at] = t, p.step_h[at] = moved ? h : 0, p.until[at] = r.next;
        }
        n++;
        if (moved) EACH(d, WIDTH) y[AT(d)] = y1[AT(d)], k[AT(d)] = k[END * WIDTH * PITCH + AT(d)];
        meet_rows();
    }
    keep_end(p, tile, y);
    if (p.stages && tile.real && !(TILED && warp())) p.step_count[tile.row] = (int)n;
    note(p, tile, (int)r.accepted, (int)(r.tried - r.accepted), evaluations);
}

// --- steps that all rows share --------------------------------------------------------------------------------------

// State, new state and slopes of a tile wait in memory while the blocks agree on the error of a step.
constexpr int WORKSPACE = (2 + SLOPES) * WIDTH;

DEVICE T* workspace(const Problem& p, const Tile& tile, int feature) {
    return p.workspace + (tile.index * WORKSPACE + feature) * ROWS_OF_BLOCK + row_of_block();
}
template <int N> DEVICE void put(const Problem& p, const Tile& tile, int feature, const T* from) {
    EACH(d, N) *workspace(p, tile, feature + d) = from[AT(d)];
}
template <int N> DEVICE void get(const Problem& p, const Tile& tile, int feature, T* to) {
    EACH(d, N) to[AT(d)] = *workspace(p, tile, feature + d);
    meet_rows();
}

// A tile's part in the norms that all rows share.
DEVICE void put_part(const Problem& p, int turn, const Tile& tile, const T* sums, T* scratch) {
    for (int part = 0; part < GROUPS; part++) {
        const double sum = over_block(tile.real && !(TILED && warp()) ? double(sums[part]) : 0, scratch);
        if (thread() == 0) p.parts[(turn * p.tiles + tile.index) * GROUPS + part] = sum;
    }
}

// The norm over all tiles, once the blocks have met; every thread gets the same.
DEVICE double common_norm(const Problem& p, int turn, T* scratch) {
    double sums[GROUPS];
    for (int part = 0; part < GROUPS; part++) {
        double mine = 0;
        for (long long i = thread(); i < p.tiles; i += THREADS)
            mine += *(volatile double*)&p.parts[(turn * p.tiles + i) * GROUPS + part];
        sums[part] = over_block(mine, scratch);
    }
    return norm(sums, double(p.rows));
}

DEVICE double common_first_size(const Problem& p, const T* tensors, double side, T* y, T* y1, T* k, T* slot,
                                T* scratch) {
    T sums[GROUPS];
    double found[2];
    for (int turn = 0; turn < 2; turn++) {
        OWN_TILES(p) {
            const Tile tile(p, i);
            get<WIDTH>(p, tile, 0, y), get<WIDTH>(p, tile, 2 * WIDTH, k);
            squares(sums, scratch, [&](int d) { return (turn ? k[AT(d)] : y[AT(d)]) / tolerance(p, y[AT(d)]); });
            put_part(p, turn, tile, sums, scratch);
        }
        meet_all(p.tickets);
        found[turn] = common_norm(p, turn, scratch);
    }
    const double h0 = first_guess(found[0], found[1]), h = side * h0;
    meet_all(p.tickets);  // everybody has read the parts
    OWN_TILES(p) {
        const Tile tile(p, i);
        get<WIDTH>(p, tile, 0, y), get<WIDTH>(p, tile, 2 * WIDTH, k);
        EACH(d, WIDTH) slot[AT(d)] = y[AT(d)] + T(h) * k[AT(d)];
        evaluate_slot(given_for(p, tensors, tile.row), slot, p.ts[0] + h, y1);
        squares(sums, scratch, [&](int d) { return (y1[AT(d)] - k[AT(d)]) / tolerance(p, y[AT(d)]); });
        put_part(p, 0, tile, sums, scratch);
    }
    meet_all(p.tickets);
    const double change = common_norm(p, 0, scratch);
    meet_all(p.tickets);
    return first_step(found[0], found[1], h0, change, ORDER);
}

DEVICE void together(const Problem& p, const T* tensors, T* y, T* y1, T* k, T* slot, T* scratch) {
    const double eps = sizeof(T) == 4 ? 1.1920929e-7 : 2.220446049250313e-16;
    const double side = p.ts[p.times - 1] > p.ts[0] ? 1 : -1, span = fabs(p.ts[p.times - 1] - p.ts[0]);
    OWN_TILES(p) {
        const Tile tile(p, i);
        begin(p, given_for(p, tensors, tile.row), tile, y, k, slot);
        put<WIDTH>(p, tile, 0, y), put<WIDTH>(p, tile, 2 * WIDTH, k);
    }
    Progress r;
    r.t = p.ts[0], r.size = p.limits.first_step;
    int evaluations = 1, wrong = SUCCESS;
    if (!r.size) r.size = common_first_size(p, tensors, side, y, y1, k, slot, scratch), evaluations++;
    for (int turn = 0; !r.done; turn = 1 - turn) {
        const double rest = p.ts[LANDS ? r.next : p.times - 1] - r.t, wanted = r.size, t = r.t;
        const double h = wanted >= fabs(rest) * (1 - 1e-9) ? rest : side * wanted;
        if (r.tried >= p.limits.max_steps || r.tried - r.tried_at_output >= p.limits.max_steps_between) wrong = MAX_STEPS;
        else if (t + h == t || !is_finite(h)) wrong = STEP_UNDERFLOW;
        else if (p.stages && r.accepted >= p.steps) wrong = FULL;
        if (wrong) break;
        OWN_TILES(p) {
            const Tile tile(p, i);
            get<WIDTH>(p, tile, 0, y), get<WIDTH>(p, tile, 2 * WIDTH, k);
            attempt(p, given_for(p, tensors, tile.row), t, h, r.accepted, tile.row, tile.real, y, k, slot, y1);
            T sums[GROUPS];
            squares(sums, scratch, [&](int d) { return error_ratio(p, d, T(h), y, y1, k); });
            put_part(p, turn, tile, sums, scratch);
            put<WIDTH>(p, tile, WIDTH, y1), put<SLOPES * WIDTH>(p, tile, 2 * WIDTH, k);
        }
        evaluations += SLOPES - 2 + FSAL;
        meet_all(p.tickets);
        const double ratio = common_norm(p, turn, scratch);
        r.size = fabs(h);
        const long long n = r.accepted;
        if (!r.accepts(p.limits, ERROR_ORDER, ratio)) {
            if (!is_finite(ratio) && fabs(h) <= eps * fmax(fabs(t), span)) wrong = NON_FINITE;
            if (wrong) break;
            continue;
        }
        const double end = t + h, rounding = 1e-12 * fmax(fabs(end), fabs(h));
        const int first = r.next;
        int last = first;
        while (last < p.times && (p.ts[last] - end) * side <= rounding) last++;
        const bool lands = last > first && fabs(p.ts[last - 1] - end) <= rounding;
        if (lands && wanted > fabs(h)) r.size = fmax(r.size, wanted);
        if (last > first) r.tried_at_output = r.tried;
        r.next = last, r.t = lands ? p.ts[last - 1] : end, r.done = last == p.times;
        const bool need = !FSAL && (!r.done || reads_end(p, p.ts, first, last, t, h));
        OWN_TILES(p) {
            const Tile tile(p, i);
            get<WIDTH>(p, tile, 0, y), get<WIDTH>(p, tile, WIDTH, y1), get<SLOPES * WIDTH>(p, tile, 2 * WIDTH, k);
            if constexpr (!FSAL) evaluate_end(given_for(p, tensors, tile.row), t, h, need, y1, k, slot);
            read_outputs(p, tile.row, tile.real, t, h, first, last, y, y1, k);
            put<WIDTH>(p, tile, 0, y1), put<WIDTH>(p, tile, 2 * WIDTH, k + END * WIDTH * PITCH);
            if (r.done) keep_end(p, tile, y1);
        }
        evaluations += need;
        if (p.stages && block() == 0 && thread() == 0) p.step_t[n] = t, p.step_h[n] = h, p.until[n] = last;
    }
    if (wrong) raise(p.status, wrong);
    if (p.step_count && block() == 0 && thread() == 0) p.step_count[0] = (int)r.accepted;
    OWN_TILES(p) note(p, Tile(p, i), (int)r.accepted, (int)(r.tried - r.accepted), evaluations);
}

// --- all of them ----------------------------------------------------------------------------------------------------

KERNEL void neuralode_forward(const Problem p) {
    SHARED_MEMORY(memory)
    Room room{memory, p.overflow + (long long)block() * OVERFLOW};
    const T* tensors = load_tensors(p, room);
    T* scratch = room.take(THREADS * (8 / (int)sizeof(T)));
    FEATURES(slot, SLOT);
    FEATURES(y, WIDTH);
    FEATURES(y1, WIDTH);
    FEATURES(k, SLOPES * WIDTH);
    if constexpr (STEPS == SHARED) {
        together(p, tensors, y, y1, k, slot, scratch);
    } else {
        OWN_TILES(p) {
            const Tile tile(p, i);
            const Given given = given_for(p, tensors, tile.row);
            begin(p, given, tile, y, k, slot);
            if constexpr (STEPS == GIVEN) through_given(p, given, tile, y, y1, k, slot);
            else through_own(p, given, tile, y, y1, k, slot, scratch);
        }
    }
}

}  // namespace neuralode
