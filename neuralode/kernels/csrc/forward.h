// The forward pass, where the threads take shared steps together, and where a tile goes through the solve by itself.
#pragma once
#include "solve.h"

namespace neuralode::PRECISION {

// Adds up over all tiles, in order, what each put into its part; every thread gets the same.
inline void Solve::add_parts(const std::vector<double>& part, int which, double* sums) const {
    for (int g = 0; g < p.groups; g++) sums[g] = 0;
    for (int64_t i = 0; i < tiles; i++)
        for (int g = 0; g < p.groups; g++) sums[g] += part[(i * 2 + which) * p.groups + g];
}

inline void Solve::put_part(std::vector<double>& part, int64_t index, int which, T (*sums)[TILE]) const {
    for (int g = 0; g < p.groups; g++) {
        double sum = 0;
        for (int l = 0; l < valid(index); l++) sum += sums[g][l];
        part[(index * 2 + which) * p.groups + g] = sum;
    }
}

// Squares of x over the tolerance at y, for every part of the state and every row.
inline void Solve::squares(const Vec* x, const Vec* y, T (*sums)[TILE]) const {
    Vec total[MOST_GROUPS][VECS] = {};
    for (int i = 0; i < p.width * VECS; i++) {
        Vec ratio = x[i] / (absolute(y[i]) * T(p.limits.rtol) + T(p.limits.atol));
        total[p.group[i / VECS]][i % VECS] += ratio * ratio;
    }
    memcpy(sums, total, p.groups * TILE * sizeof(T));
}

// f after an Euler step, less f: to y1, which is free for the time being.
inline void Solve::change_of_slope(Worker& w, int64_t index, Tile& tile, const Steps& steps) {
    for (int i = 0; i < p.width * VECS; i++) w.spare[i] = tile.y[i] + steps.size[i % VECS] * tile.k[0][i];
    evaluate_slot(index, w.spare, steps, 1, tile.y1);
    for (int i = 0; i < p.width * VECS; i++) tile.y1[i] -= tile.k[0][i];
    tile.evaluations++;
}

inline void Solve::begin_shared(Worker& w, int64_t from, int64_t to, Progress& progress) {
    T sums[MOST_GROUPS][TILE];
    for (int64_t i = from; i < to; i++) {
        prepare(w.scratch, state[i]);
        begin(w, i, state[i]);
        squares(state[i].y, state[i].y, sums), put_part(parts[0], i, 0, sums);
        squares(state[i].k[0], state[i].y, sums), put_part(parts[0], i, 1, sums);
    }
    progress.t = p.ts[0], progress.end = p.ts[p.times - 1];
    progress.size = p.limits.first_step;
    team.meet();
    if (progress.size || failed) return;
    double size[MOST_GROUPS], slope[MOST_GROUPS], change[MOST_GROUPS];
    add_parts(parts[0], 0, size), add_parts(parts[0], 1, slope);
    const double y_norm = norm(size, p.rows), f_norm = norm(slope, p.rows), h0 = first_guess(y_norm, f_norm);
    Steps steps;
    steps.set(progress.t, h0 * direction());
    for (int64_t i = from; i < to; i++) {
        change_of_slope(w, i, state[i], steps);
        squares(state[i].y1, state[i].y, sums), put_part(parts[1], i, 0, sums);
    }
    team.meet();
    add_parts(parts[1], 0, change);
    progress.size = first_step(y_norm, f_norm, h0, norm(change, p.rows), m.order);
}

inline void Solve::forward_shared(int index) {
    Worker& w = *workers[index];
    prepare(w);
    const int64_t from = first_tile(index), to = first_tile(index + 1);
    Progress progress = common;
    if (!begun) begin_shared(w, from, to, progress);
    const Limits& limits = p.limits;
    T sums[MOST_GROUPS][TILE];
    Steps steps;
    for (int round = 0; !progress.done && !failed; round++) {
        if (progress.tried >= limits.max_steps || progress.tried - progress.tried_at_output >= limits.max_steps_between) {
            fail(MAX_STEPS);
            break;
        }
        const double target = p.ts[m.lands ? progress.next : p.times - 1], rest = target - progress.t;
        const double wanted = progress.size;
        const double h = wanted >= std::fabs(rest) * (1 - 1e-9) ? rest : direction() * wanted;
        if (progress.t + h == progress.t || !std::isfinite(h)) {
            fail(STEP_UNDERFLOW);
            break;
        }
        steps.set(progress.t, h);
        std::vector<double>& part = parts[round & 1];
        for (int64_t i = from; i < to; i++) {
            attempt(w, i, state[i], steps);
            square_errors(state[i], steps, sums);
            put_part(part, i, 0, sums);
        }
        if (index == 0 && now() > deadline) stop = true;
        team.meet();
        double total[MOST_GROUPS];
        add_parts(part, 0, total);
        const double ratio = norm(total, p.rows);
        const bool leave = stop;
        progress.size = std::fabs(h);
        if (progress.accepts(limits, m.error_order, ratio)) {
            accept_shared(w, from, to, progress, steps, h, wanted);
            if (index == 0) sizes.push_back(std::fabs(h));
        } else if (!std::isfinite(ratio)) {
            if (hopeless(progress, h, from, to)) fail(NON_FINITE);
            team.meet();  // so that all threads see the same of `failed`
        }
        if (leave && !progress.done) {
            if (index == 0) paused = !failed;
            break;
        }
    }
    for (int64_t i = from; i < to && progress.done; i++)
        if (!finite(state[i].y)) fail(NON_FINITE);
    if (index == 0) common = progress, begun = true;
}

inline void Solve::accept_shared(Worker& w, int64_t from, int64_t to, Progress& progress, const Steps& steps, double h,
                   double wanted) {
    const double end = progress.t + h, rounding = 1e-12 * std::max(std::fabs(end), std::fabs(h));
    int32_t last = progress.next;
    while (last < p.times && (p.ts[last] - end) * direction() <= rounding) last++;
    const bool lands = last > progress.next && std::fabs(p.ts[last - 1] - end) <= rounding;
    if (lands && wanted > std::fabs(h)) progress.size = std::max(progress.size, wanted);
    int32_t first_of[TILE], last_of[TILE];
    std::fill_n(first_of, TILE, progress.next), std::fill_n(last_of, TILE, last);
    for (int64_t i = from; i < to; i++)
        commit(w, i, state[i], steps, first_of, last_of, ~0u, last == p.times);
    if (last > progress.next) progress.tried_at_output = progress.tried;
    progress.next = last;
    progress.t = lands ? p.ts[last - 1] : end;
    progress.done = last == p.times;
}

// Whether no shorter step can help: the state is not finite already, or the step is as short as can be told.
inline bool Solve::hopeless(const Progress& progress, double h, int64_t from, int64_t to) const {
    const double eps = sizeof(T) == 4 ? 1.1920929e-7 : 2.220446049250313e-16;
    const double span = std::fabs(p.ts[p.times - 1] - p.ts[0]);
    if (std::fabs(h) <= eps * std::max(std::fabs(progress.t), span)) return true;
    for (int64_t i = from; i < to; i++)
        if (!finite(state[i].y) || !finite(state[i].k[0])) return true;
    return false;
}

inline bool Solve::finite(const Vec* x) const {
    for (int i = 0; i < p.width * TILE; i++)
        if (!std::isfinite(((const T*)x)[i])) return false;
    return true;
}

inline void Solve::forward_tiles(int index) {
    Worker& w = *workers[index];
    prepare(w);
    const int64_t end = first_tile(index + 1);
    if (w.next_tile < 0) w.next_tile = (int)first_tile(index);
    const int start = w.next_tile;  // every call gets somewhere
    for (; w.next_tile < end && !failed; w.next_tile++) {
        if (w.next_tile > start && now() > deadline) {
            stop = true;
            break;
        }
        Tile& tile = state[w.next_tile];
        if (!w.inside) {
            prepare(w.scratch, w.tile);
            std::swap(tile.y, w.tile.y), std::swap(tile.y1, w.tile.y1), std::swap(tile.k, w.tile.k);
            begin(w, w.next_tile, tile);
            w.inside = true, w.taken = 0, w.next = 1;
        }
        if (!(p.grid ? through_grid(w, w.next_tile, tile) : through_rows(w, w.next_tile, tile))) {
            stop = true;
            break;
        }
        w.inside = false;
        if (!failed && !finite(tile.y)) fail(NON_FINITE);
        if (failed) break;
        if (p.records) {  // the backward pass may want the last state
            Vec* y = w.kept.take<Vec>(p.width * VECS);
            memcpy(y, tile.y, p.width * VECS * sizeof(Vec));
            std::swap(tile.y, w.tile.y), std::swap(tile.y1, w.tile.y1), std::swap(tile.k, w.tile.k);
            tile.y = y;
        } else {
            std::swap(tile.y, w.tile.y), std::swap(tile.y1, w.tile.y1), std::swap(tile.k, w.tile.k);
        }
    }
    team.meet();
    if (index == 0) paused = stop && !failed;
}

// Both give false where time is up, and go on from there when they are called again.
inline bool Solve::through_grid(Worker& w, int64_t index, Tile& tile) {
    Steps steps;
    int32_t next[TILE], last[TILE];
    for (int64_t n = w.taken; n + 1 < p.grid_count; n++) {
        if (n > w.taken && now() > deadline) return w.taken = n, false;
        std::fill_n(next, TILE, w.next);
        const double t = p.grid[n], h = p.grid[n + 1] - t, end = t + h;
        const double rounding = 1e-12 * std::max(std::fabs(end), std::fabs(h));
        int32_t to = next[0];
        while (to < p.times && (p.ts[to] - end) * direction() <= rounding) to++;
        std::fill_n(last, TILE, to);
        steps.set(t, h);
        attempt(w, index, tile, steps);
        commit(w, index, tile, steps, next, last, ~0u, n + 2 == p.grid_count);
        w.next = to;
    }
    return true;
}

inline void Solve::begin_rows(Worker& w, int64_t index, Tile& tile) {
    tile.progress.assign(TILE, Progress{});
    Progress* rows = tile.progress.data();
    for (int l = 0; l < TILE; l++) {
        rows[l].t = times(index, l)[0], rows[l].end = times(index, l)[p.times - 1];
        rows[l].size = p.limits.first_step;
        rows[l].done = l >= valid(index);
    }
    if (!p.limits.first_step) first_steps(w, index, tile);
}

inline bool Solve::through_rows(Worker& w, int64_t index, Tile& tile) {
    if (!w.taken) begin_rows(w, index, tile);
    Progress* rows = tile.progress.data();
    Steps steps;
    T sums[MOST_GROUPS][TILE];
    double each[MOST_GROUPS];
    for (int64_t tried = w.taken;; tried++) {
        if (tried > w.taken && now() > deadline) return w.taken = tried, false;
        bool done = true;
        for (int l = 0; l < TILE; l++) done &= rows[l].done;
        if (done) return true;
        for (int l = 0; l < TILE; l++) {
            Progress& r = rows[l];
            const double rest = std::fabs(r.end - r.t), side = r.end > times(index, l)[0] ? 1 : -1;
            steps.t[l] = r.t;
            steps.h[l] = r.done ? 0 : side * std::min(r.size, rest);
            if (r.done) continue;
            if (tried >= p.limits.max_steps) return fail(MAX_STEPS), true;
            if (r.t + steps.h[l] == r.t || !std::isfinite(steps.h[l]))
                return fail(STEP_UNDERFLOW), true;
        }
        steps.spread();
        attempt(w, index, tile, steps);
        square_errors(tile, steps, sums);
        uint32_t moved = 0, rejected = 0;
        int32_t first[TILE], last[TILE];
        for (int l = 0; l < TILE; l++) {
            Progress& r = rows[l];
            first[l] = last[l] = r.next;
            if (r.done) continue;
            for (int g = 0; g < p.groups; g++) each[g] = sums[g][l];
            const double ratio = norm(each, 1);
            const bool lands = r.size * (1 + 1e-9) >= std::fabs(r.end - r.t);
            r.size = std::fabs(steps.h[l]);
            if (!r.accepts(p.limits, m.error_order, ratio)) {
                rejected |= 1u << l;
                if (!std::isfinite(ratio) && lost(tile, l, r, steps.h[l], index))
                    return fail(NON_FINITE), true;
                continue;
            }
            moved |= 1u << l;
            const double t = lands ? r.end : r.t + steps.h[l], side = steps.h[l] > 0 ? 1 : -1;
            while (last[l] < p.times - 1 && (times(index, l)[last[l]] - t) * side <= 0) last[l]++;
            if (lands) last[l] = p.times;
            r.next = last[l], r.t = t, r.done = lands;
        }
        if (!moved) continue;
        for (int l = 0; l < TILE; l++)
            if (!(moved >> l & 1)) steps.h[l] = 0;
        const uint32_t overwritten = moved | ~rejected;  // rows that have ended stand still, and can be kept
        steps.spread();
        commit_rows(w, index, tile, steps, first, last, moved, overwritten);
    }
}

inline void Solve::commit_rows(Worker& w, int64_t index, Tile& tile, const Steps& steps, const int32_t* first,
                 const int32_t* last, uint32_t moved, uint32_t sound) {
    commit(w, index, tile, steps, first, last, sound == ~0u ? ~0u : moved, false);
    if (p.records) tile.records.back()->moved = moved;
}

inline bool Solve::row_finite(const Tile& tile, int l) const {
    for (int d = 0; d < p.width; d++)
        if (!std::isfinite(((const T*)tile.y)[d * TILE + l]) || !std::isfinite(((const T*)tile.k[0])[d * TILE + l]))
            return false;
    return true;
}

inline bool Solve::lost(const Tile& tile, int l, const Progress& r, double h, int64_t index) const {
    const double eps = sizeof(T) == 4 ? 1.1920929e-7 : 2.220446049250313e-16;
    const double span = std::fabs(r.end - times(index, l)[0]);
    return !row_finite(tile, l) || std::fabs(h) <= eps * std::max(std::fabs(r.t), span);
}

inline void Solve::first_steps(Worker& w, int64_t index, Tile& tile) {
    T size[MOST_GROUPS][TILE], slope[MOST_GROUPS][TILE], change[MOST_GROUPS][TILE];
    double each[MOST_GROUPS], y_norm[TILE], f_norm[TILE], h0[TILE];
    auto norm_of = [&](T(*sums)[TILE], int l) {
        for (int g = 0; g < p.groups; g++) each[g] = sums[g][l];
        return norm(each, 1);
    };
    squares(tile.y, tile.y, size), squares(tile.k[0], tile.y, slope);
    Steps steps;
    for (int l = 0; l < TILE; l++) {
        const Progress& r = tile.progress[l];
        y_norm[l] = norm_of(size, l), f_norm[l] = norm_of(slope, l), h0[l] = first_guess(y_norm[l], f_norm[l]);
        steps.t[l] = r.t, steps.h[l] = r.end > r.t ? h0[l] : -h0[l];
    }
    steps.spread();
    change_of_slope(w, index, tile, steps);
    squares(tile.y1, tile.y, change);
    for (int l = 0; l < TILE; l++)
        tile.progress[l].size = first_step(y_norm[l], f_norm[l], h0[l], norm_of(change, l), m.order);
}

inline void Solve::finish_report() {
    report.status = failed;
    report.evaluations = 0;
    for (const Tile& tile : state) report.evaluations = std::max(report.evaluations, tile.evaluations);
    for (const auto& w : workers) report.kept_bytes += w->kept.taken;
    if (shared) {
        report.accepted = common.accepted, report.rejected = common.tried - common.accepted;
    } else if (p.grid) {
        report.accepted = p.grid_count - 1;
    } else {
        accepted_rows.assign(p.rows, 0), tried_rows.assign(p.rows, 0);
        for (int64_t row = 0; row < p.rows; row++) {
            const auto& rows = state[row / TILE].progress;
            if (rows.empty()) continue;
            accepted_rows[row] = rows[row % TILE].accepted, tried_rows[row] = rows[row % TILE].tried;
            report.accepted = std::max(report.accepted, accepted_rows[row]);
            report.rejected = std::max(report.rejected, tried_rows[row] - accepted_rows[row]);
        }
    }
    report.steps = (int64_t)sizes.size();
}

}  // namespace neuralode::PRECISION
