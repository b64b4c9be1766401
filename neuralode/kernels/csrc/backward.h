// The backward pass: the exact gradient of the steps that were taken, one tile after the other.
#pragma once
#include "solve.h"

namespace neuralode::PRECISION {

inline void Solve::prepare_backward(Worker& w) {
    if (w.adjoints) return;
    const int64_t state_size = (int64_t)p.width * VECS;
    w.adjoints = w.scratch.take<Vec>((int64_t)p.slot * VECS);
    Vec** vectors[] = {&w.lambda, &w.mu, &w.to_end, &w.to_start, &w.cotangent};
    for (Vec** vector : vectors) *vector = w.scratch.take<Vec>(state_size);
    for (int i = 0; i < m.slopes(); i++) {
        w.k[i] = w.scratch.take<Vec>(state_size);
        w.values[i] = w.scratch.take<Vec>(state_size);
    }
    int widest = 1;
    w.gradients.total = w.scratch.take<T*>(std::max(1, p.tensor_count));
    for (int i = 0; i < p.tensor_count; i++) {
        const int64_t size = sums_of(tensors[i]);
        w.gradients.total[i] = nullptr;
        widest = std::max(widest, tensors[i].stride());
        if (!tensors[i].wants_gradient || tensors[i].by_row) continue;
        w.gradients.total[i] = w.scratch.take<T>(size);
    }
    w.gradients.rows = w.scratch.take<T>((int64_t)widest * TILE);
    w.stages = w.scratch.take<Vec>((int64_t)m.slopes() * p.slot * VECS);
    w.ends[0] = w.scratch.take<Vec>(p.slot * VECS), w.ends[1] = w.scratch.take<Vec>(p.slot * VECS);
}

// Entries of a thread's sums for a tensor.
inline int64_t Solve::sums_of(const Tensor& tensor) {
    const bool weight = tensor.packed;
    if (weight && !tensor.narrow()) return (int64_t)tensor.outputs * tensor.stride();
    return (int64_t)tensor.outputs * tensor.inputs * LANES;
}

inline void Solve::backward_tiles(int index) {
    Worker& w = *workers[index];
    prepare_backward(w);
    if (w.next_back < 0) {
        w.next_back = (int)first_tile(index);
        for (int i = 0; i < p.tensor_count; i++)
            if (w.gradients.total[i]) std::fill_n(w.gradients.total[i], sums_of(tensors[i]), T(0));
        w.times.assign(p.times_move && !p.times_per_sample ? p.times : 0, 0.0);
    }
    const int64_t end = first_tile(index + 1);
    const int start = w.next_back;
    for (; w.next_back < end; w.next_back++) {
        if (w.next_back > start && now() > deadline) {
            stop = true;
            break;
        }
        backward_tile(w, w.next_back);
    }
    team.meet();
    if (index == 0) paused = stop;
    if (!stop) w.next_back = -1;
}

inline void Solve::zero(Vec* x) const { memset((void*)x, 0, p.width * VECS * sizeof(Vec)); }

inline void Solve::add(const Vec* x, Vec* to) const {
    for (int i = 0; i < p.width * VECS; i++) to[i] += x[i];
}

inline void Solve::add(double weight, const Vec* x, Vec* to) const {
    for (int i = 0; i < p.width * VECS; i++) to[i] += T(weight) * x[i];
}

inline void Solve::add(double weight, const Vec* size, const Vec* x, Vec* to) const {
    for (int i = 0; i < p.width * VECS; i++) to[i] += T(weight) * size[i % VECS] * x[i];
}

// The adjoint of a slot's state, from that of its slope; that of its time is left among the adjoints. `next` is the slot
// whose turn comes then, if it is kept.
inline const Vec* Solve::reverse_slot(Worker& w, int64_t index, Tile& tile, const Vec* slot, const Vec* slope,
                                      const Vec* next) {
    w.gradients.ahead = {(const char*)next, next ? p.slot * VECS * (int64_t)sizeof(Vec) : 0};
    for (int i = 0; i < p.cleared_count; i++)
        memset((void*)(w.adjoints + p.cleared[2 * i] * VECS), 0, p.cleared[2 * i + 1] * VECS * sizeof(Vec));
    memcpy(w.adjoints + p.output * VECS, slope, p.width * VECS * sizeof(Vec));
    reverse(program, tensors.data(), slot, w.adjoints, w.gradients, [&](int tensor) -> Vec* {
        Vec* all = row_gradients[tensor];
        return all ? all + index * tensors[tensor].outputs * VECS : nullptr;
    });
    tile.products++;
    return w.adjoints;
}

// The slot of the slope at the start of step n, evaluated again into `room` where none was kept.
inline const Vec* Solve::start_slot(int64_t index, Tile& tile, int64_t n, const Vec* y, const Steps& steps, Vec* room) const {
    if (n == 0 && tile.begin) return tile.begin;
    if (n > 0 && tile.records[n - 1]->slots && end_kept(tile, n - 1)) return slot(tile.records[n - 1]->slots, m.end() - 1);
    memcpy(room, y, p.width * VECS * sizeof(Vec));
    evaluate_slot(index, room, steps, 0, nullptr);
    return room;
}

// Whether the slots of step n hold the slope at its end: not always where the last step's is not needed.
inline bool Solve::end_kept(const Tile& tile, int64_t n) const {
    return m.first_same_as_last || n + 1 < (int64_t)tile.records.size();
}

inline void Solve::backward_tile(Worker& w, int64_t index) {
    Tile& tile = state[index];
    for (int i = 0; i < p.tensor_count; i++)
        if (row_gradients[i]) {
            const int64_t size = (int64_t)tensors[i].outputs * VECS;
            memset((void*)(row_gradients[i] + index * size), 0, size * sizeof(Vec));
        }
    Vec *lambda = w.lambda, *mu = w.mu, *to_end = w.to_end, *to_start = w.to_start;
    zero(lambda), zero(mu);
    bool mu_zero = true;
    const Vec* after = nullptr;  // the slot of the slope at the end of the step, if it was evaluated again
    int turn = 0;
    Steps steps;
    TimeGradient dt{};
    for (int64_t n = (int64_t)tile.records.size() - 1; n >= 0; n--) {
        Record& r = *tile.records[n];
        std::copy_n(r.t, TILE, steps.t), std::copy_n(r.h, TILE, steps.h);
        steps.spread();
        for (int i = 0; i < m.slopes(); i++) zero(w.k[i]);
        Vec* to_slope_end = w.k[m.end()];
        if (!mu_zero) std::swap(w.k[m.end()], w.mu), to_slope_end = w.k[m.end()], mu = w.mu;
        if (r.moved != ~0u && !mu_zero) pass_by(r.moved, to_slope_end, w.k[0]);
        memcpy(to_end, lambda, p.width * VECS * sizeof(Vec));
        zero(to_start);
        const Vec *start, *slots = r.slots;
        start = nullptr;
        if (!slots) {
            start = start_slot(index, tile, n, r.y, steps, w.ends[turn]);
            memcpy(w.values[0], start + p.output * VECS, p.width * VECS * sizeof(Vec));
            take_stages(index, r.y, w.values, steps, w.stages);
            slots = w.stages;
        }
        const Vec* y1 = n + 1 < (int64_t)tile.records.size() ? tile.records[n + 1]->y : tile.y;
        if (p.times_move) collect_slopes(w, index, tile, n, steps, start, slots, y1), dt = TimeGradient{};
        const bool reads_end = pull_outputs(w, index, r, y1, dt);
        auto before = [&](int stage) -> const Vec* {  // the slot that was filled before that of a stage
            if (stage > 1) return slot((Vec*)slots, stage - 2);
            const Vec* last = n > 0 ? tile.records[n - 1]->slots : nullptr;
            return last ? slot((Vec*)last, m.end() - 1) : nullptr;
        };
        if (!mu_zero || reads_end) {
            const Vec* end = after;
            if (r.slots && end_kept(tile, n)) end = slot(r.slots, m.end() - 1);
            if (!end) {  // neither kept nor evaluated again
                Vec* room = w.ends[1 - turn];
                memcpy(room, y1, p.width * VECS * sizeof(Vec));
                evaluate_slot(index, room, steps, 1, nullptr);
                end = room;
            }
            add(reverse_slot(w, index, tile, end, to_slope_end, before(m.inner())), to_end);
            pull_time(w, dt, 1);
        }
        add(to_end, to_start);
        for (int i = 0; i < std::min(m.inner(), m.stages); i++)
            if (m.b[i]) add(m.b[i], steps.size, to_end, w.k[i]);
        if (p.times_move) pull_size(dt, to_end, w.values, m.b, std::min(m.inner(), m.stages));
        for (int i = m.inner() - 1; i >= 1; i--) {
            const Vec* to_stage = reverse_slot(w, index, tile, slot((Vec*)slots, i - 1), w.k[i], before(i));
            add(to_stage, to_start);
            const double* a = m.a + i * m.stages;
            for (int j = 0; j < i; j++)
                if (a[j]) add(a[j], steps.size, to_stage, w.k[j]);
            pull_time(w, dt, m.c[i]);
            if (p.times_move) pull_size(dt, to_stage, w.values, a, i);
        }
        if (p.times_move) give_times(w, index, r, dt);
        std::swap(w.lambda, w.to_start), lambda = w.lambda, to_start = w.to_start;
        std::swap(w.mu, w.k[0]), mu = w.mu;
        mu_zero = false;
        after = start;
        if (start) turn = 1 - turn;
    }
    for (int l = 0; l < TILE; l++) steps.t[l] = times(index, l)[0], steps.h[l] = 0;
    if (!mu_zero) {
        const Vec* start = tile.begin ? tile.begin : after;
        const Vec* y = tile.records[0]->y;
        if (!start) start = start_slot(index, tile, 0, y, steps, w.ends[turn]);
        add(reverse_slot(w, index, tile, start, mu, nullptr), lambda);
        if (p.times_move) {
            dt = TimeGradient{};
            pull_time(w, dt, 0);
            for (int l = 0; l < valid(index); l++) time_total(w, index, l)[0] += dt.start[l];
        }
    }
    if (cotangents) {
        load_cotangent(index, 0, w.cotangent);
        add(w.cotangent, lambda);
    }
    if (to_y0) store(index, lambda, to_y0);
}

// Rows that did not move keep the slope of their start: its adjoint belongs there.
inline void Solve::pass_by(uint32_t moved, Vec* from, Vec* to) const {
    for (int l = 0; l < TILE; l++)
        if (!(moved >> l & 1))
            for (int d = 0; d < p.width; d++) {
                T& x = ((T*)from)[d * TILE + l];
                ((T*)to)[d * TILE + l] += x;
                x = 0;
            }
}

inline void Solve::load_cotangent(int64_t index, int j, Vec* to) const {
    load(index, cotangents + (int64_t)j * p.rows * p.width, p.width, to);
    for (int l = valid(index); l < TILE; l++)
        for (int d = 0; d < p.width; d++) ((T*)to)[d * TILE + l] = 0;
}

// Takes in what the outputs of a step were given; true if the slope at its end got something.
inline bool Solve::pull_outputs(Worker& w, int64_t index, const Record& r, const Vec* y1, TimeGradient& dt) {
    bool reads_end = false;
    if (p.per_sample) {
        for (int l = 0; l < valid(index); l++)
            if (r.first[l] < r.last[l]) reads_end |= pull_row(w, index, l, r, y1, dt);
        return reads_end;
    }
    Vec size[VECS], *g = w.cotangent;
    for (int i = 0; i < TILE; i++) ((T*)size)[i] = T(r.h[i]);
    auto pull = [&](int j, const Reading& reading, double theta, bool ends) {
        load_cotangent(index, j, g);
        if (reading.start) add(reading.start, g, w.to_start);
        if (reading.finish) add(reading.finish, g, w.to_end);
        for (int i = 0; i < m.slopes(); i++)
            if (reading.slope[i]) add(reading.slope[i], size, g, w.k[i]), reads_end |= i == m.end();
        if (!p.times_move || ends) return;
        const Slope slope(m, theta);
        for (int l = 0; l < valid(index); l++)
            pull_reading(w, index, l, r, y1, j, reading, slope, theta, (const T*)g + l, TILE, dt);
    };
    each_reading(index, 0, r.t[0], r.h[0], r.first[0], r.last[0], pull);
    return reads_end;
}

// The same for one row; what its outputs were given is summed up first.
inline bool Solve::pull_row(Worker& w, int64_t index, int l, const Record& r, const Vec* y1, TimeGradient& dt) {
    const int width = p.width;
    T to_start[width], to_end[width], to_k[m.slopes() * width];
    std::fill_n(to_start, width, T(0)), std::fill_n(to_end, width, T(0)), std::fill_n(to_k, m.slopes() * width, T(0));
    bool reads_end = false;
    auto pull = [&](int j, const Reading& reading, double theta, bool ends) {
        const T* g = cotangents + ((int64_t)j * p.rows + index * TILE + l) * width;
        const T start = T(reading.start), finish = T(reading.finish);
        for (int d = 0; d < width; d++) to_start[d] += start * g[d], to_end[d] += finish * g[d];
        for (int q = 0; q < m.slopes(); q++)
            if (const T weight = T(reading.slope[q])) {
                for (int d = 0; d < width; d++) to_k[q * width + d] += weight * g[d];
                reads_end |= q == m.end();
            }
        if (p.times_move && !ends)
            pull_reading(w, index, l, r, y1, j, reading, Slope(m, theta), theta, g, 1, dt);
    };
    each_reading(index, l, r.t[l], r.h[l], r.first[l], r.last[l], pull);
    for (int d = 0; d < width; d++) entry(w.to_start, d, l) += to_start[d], entry(w.to_end, d, l) += to_end[d];
    for (int q = 0; q < m.slopes(); q++)
        for (int d = 0; d < width; d++) entry(w.k[q], d, l) += T(r.h[l]) * to_k[q * width + d];
    return reads_end;
}

inline double* Solve::time_total(Worker& w, int64_t index, int l) {
    return p.times_per_sample ? time_rows.data() + std::min<int64_t>(index * TILE + l, p.rows - 1) * p.times
                              : w.times.data();
}

// The slopes of a step as values, for the gradient of its size.
inline void Solve::collect_slopes(Worker& w, int64_t index, Tile& tile, int64_t n, const Steps& steps, const Vec* start,
                    const Vec* slots, const Vec* y1) {
    const int64_t bytes = p.width * VECS * sizeof(Vec);
    if (!start) start = start_slot(index, tile, n, tile.records[n]->y, steps, w.slots);
    memcpy(w.values[0], start + p.output * VECS, bytes);
    for (int i = 1; i < m.inner(); i++) memcpy(w.values[i], slot((Vec*)slots, i - 1) + p.output * VECS, bytes);
    memcpy(w.slots, y1, bytes);
    evaluate_slot(index, w.slots, steps, 1, w.values[m.end()]);
}

inline void Solve::pull_time(Worker& w, TimeGradient& dt, double c) const {
    if (!p.times_move || program.time < 0) return;
    const T* time = (const T*)(w.adjoints + program.time * VECS);
    for (int l = 0; l < TILE; l++) dt.start[l] += time[l], dt.size[l] += c * time[l];
}

inline void Solve::pull_size(TimeGradient& dt, const Vec* adjoint, Vec* const* k, const double* weights, int count) const {
    for (int i = 0; i < count; i++)
        if (weights[i])
            for (int d = 0; d < p.width; d++)
                for (int l = 0; l < TILE; l++)
                    dt.size[l] += weights[i] * ((const T*)adjoint)[d * TILE + l] * ((const T*)k[i])[d * TILE + l];
}

// What a reading at θ of a row gives to the times; the row's cotangent has its features `stride` apart.
inline void Solve::pull_reading(Worker& w, int64_t index, int l, const Record& r, const Vec* y1, int j,
                                const Reading& reading, const Slope& slope, double theta, const T* g, int stride,
                                TimeGradient& dt) {
    double by_theta = 0, by_size = 0;
    for (int d = 0; d < p.width; d++) {
        double along = 0, through = 0;
        for (int q = 0; q < m.slopes(); q++) {
            along += slope.slope[q] * entry(w.values[q], d, l);
            through += reading.slope[q] * entry(w.values[q], d, l);
        }
        along = r.h[l] * along + slope.start * entry(r.y, d, l) + slope.finish * entry(y1, d, l);
        by_theta += along * g[d * stride], by_size += through * g[d * stride];
    }
    dt.size[l] += by_size;
    if (!r.h[l]) return;
    const double by_time = by_theta / r.h[l];  // θ = (t_j - t) / h
    time_total(w, index, l)[j] += by_time;
    dt.start[l] -= by_time, dt.size[l] -= theta * by_time;
}

// A step starts where the grid has it, which moves with the first time, or with the output that a step ended at
// before; a step that ends at an output stretches with it.
inline void Solve::give_times(Worker& w, int64_t index, const Record& r, const TimeGradient& dt) {
    for (int l = 0; l < valid(index); l++) {
        if (!r.h[l]) continue;
        double* total = time_total(w, index, l);
        const double* ts = times(index, l);
        const int anchor = m.lands ? r.first[l] - 1 : 0;
        double start = dt.start[l];
        if (r.last[l] > r.first[l] && at_end(ts, r.last[l] - 1, r.t[l], r.h[l])) {
            total[r.last[l] - 1] += dt.size[l];
            start -= dt.size[l];
        }
        total[anchor] += start;
    }
}

// Adds up the threads' sums, in order.
inline void Solve::collect(void* const* grad_tensors, double* grad_times) {
    for (int i = 0; i < p.tensor_count; i++) {
        T* to = (T*)grad_tensors[i];
        const Tensor& tensor = tensors[i];
        if (!to) continue;
        if (tensor.by_row) {
            for (int64_t tile = 0; tile < tiles; tile++)
                store(tile, row_gradients[i] + tile * tensor.outputs * VECS, tensor.outputs, to);
            continue;
        }
        const bool wide = tensor.packed && !tensor.narrow();
        const int lanes = wide ? 1 : LANES, columns = wide ? tensor.stride() : tensor.inputs;
        std::vector<double> row(columns);
        for (int j = 0; j < tensor.outputs; j++) {
            std::fill(row.begin(), row.end(), 0.0);
            for (int t = 0; t < team.count; t++) {
                const T* total = workers[t]->gradients.total[i] + (int64_t)j * columns * lanes;
                if (wide)
                    for (int k = 0; k < columns; k++) row[k] += total[k];
                else
                    for (int k = 0; k < columns; k++)
                        for (int l = 0; l < LANES; l++) row[k] += total[k * LANES + l];
            }
            std::transform(row.begin(), row.begin() + tensor.inputs, to + (int64_t)j * tensor.inputs,
                           [](double x) { return T(x); });
        }
    }
    report.products = 0;
    for (Tile& tile : state) report.products = std::max(report.products, tile.products), tile.products = 0;
    if (!grad_times) return;
    if (p.times_per_sample) {
        std::copy(time_rows.begin(), time_rows.end(), grad_times);
        return;
    }
    for (int j = 0; j < p.times; j++) {
        grad_times[j] = 0;
        for (int t = 0; t < team.count; t++) grad_times[j] += workers[t]->times[j];
    }
}

}  // namespace neuralode::PRECISION
