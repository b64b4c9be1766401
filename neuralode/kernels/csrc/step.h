// What all solves are made of: rows dealt out in tiles, evaluations of the program, and one step of a tile.
#pragma once
#include "solve.h"

namespace neuralode::PRECISION {

inline void Solve::load_tensors() {
    tensors.resize(p.tensor_count);
    row_gradients.assign(p.tensor_count, nullptr);
    for (int i = 0; i < p.tensor_count; i++) {
        Tensor& tensor = tensors[i];
        const int inputs = p.tensor_shapes[2 * i + 1];
        tensor.outputs = p.tensor_shapes[2 * i], tensor.by_row = inputs < 0, tensor.inputs = std::max(inputs, 1);
        tensor.data = (const T*)p.tensors[i];
        tensor.wants_gradient = p.tensor_gradients[i];
        if (tensor.by_row) {
            Vec* all = arena.take<Vec>(tiles * tensor.outputs * VECS);
            for (int64_t tile = 0; tile < tiles; tile++)
                load(tile, tensor.data, tensor.outputs, all + tile * tensor.outputs * VECS);
            tensor.data = (const T*)all;
            if (tensor.wants_gradient) row_gradients[i] = arena.take<Vec>(tiles * tensor.outputs * VECS);
        } else if (inputs > 0) {
            const int64_t size = (int64_t)tensor.outputs * inputs;
            tensor.packed = arena.take<T>(size), tensor.transposed = arena.take<T>(size);
            pack(tensor.data, tensor.outputs, inputs, false, tensor.packed);
            if (p.records) pack(tensor.data, tensor.outputs, inputs, true, tensor.transposed);
        } else {
            T* copy = arena.take<T>(tensor.outputs);
            std::copy_n(tensor.data, tensor.outputs, copy);
            tensor.data = copy;
        }
    }
}

inline int Solve::valid(int64_t tile) const { return (int)std::min<int64_t>(TILE, p.rows - tile * TILE); }

// Rows [rows][width] to a tile; the rows that are missing in the last one repeat its last row.
inline void Solve::load(int64_t tile, const T* from, int width, Vec* to) const {
    load_rows([&](int l) { return from + std::min<int64_t>(tile * TILE + l, p.rows - 1) * width; }, width, to);
}

inline void Solve::store(int64_t tile, const Vec* from, T* to) const { store(tile, from, p.width, to); }

inline void Solve::store(int64_t tile, const Vec* from, int width, T* to) const {
    store_rows(from, width, valid(tile), [&](int l) { return to + (tile * TILE + l) * width; });
}

inline const double* Solve::times(int64_t row) const { return p.times_per_sample ? p.ts + row * p.times : p.ts; }

inline const double* Solve::times(int64_t tile, int l) const { return times(std::min<int64_t>(tile * TILE + l, p.rows - 1)); }

inline double Solve::direction(int64_t row) const { return times(row)[p.times - 1] > times(row)[0] ? 1 : -1; }

inline int64_t Solve::first_tile(int index) const { return tiles * index / team.count; }

inline Vec* Solve::slot(Vec* slots, int i) const { return slots + (int64_t)i * p.slot * VECS; }

inline void Solve::prepare(Worker& w) {
    if (w.slots) return;
    w.slots = w.scratch.take<Vec>((int64_t)m.slopes() * p.slot * VECS);
    w.spare = w.scratch.take<Vec>(p.slot * VECS);
}

inline void Solve::prepare(Arena& from, Tile& tile) {
    if (tile.y) return;
    Vec* room = from.take<Vec>((int64_t)(m.slopes() + 2) * p.width * VECS);
    tile.y = room, tile.y1 = room + p.width * VECS;
    for (int i = 0; i < m.slopes(); i++) tile.k[i] = room + (2 + i) * p.width * VECS;
}

inline void Solve::set_time(Vec* slot, const Steps& steps, double c) const {
    if (program.time < 0) return;
    T* time = (T*)(slot + program.time * VECS);
    for (int l = 0; l < TILE; l++) time[l] = T(steps.t[l] + c * steps.h[l]);
}

// f of the state that lies in the slot, at t + ch; the slope to k, if it is wanted.
inline void Solve::evaluate_slot(int64_t index, Vec* slot, const Steps& steps, double c, Vec* k) const {
    set_time(slot, steps, c);
    evaluate(program, tensors.data(), (int)index, slot);
    if (k) memcpy(k, slot + program.output * VECS, p.width * VECS * sizeof(Vec));
}

// out = y + h Σ weights[i] k[i].
inline void Solve::advance(const Vec* y, Vec* const* k, const double* weights, int count, const Vec* size, Vec* out) const {
    int used[MOST_SLOPES], n = 0;
    T w[MOST_SLOPES];
    for (int i = 0; i < count; i++)
        if (weights[i]) used[n] = i, w[n++] = T(weights[i]);
    for (int i = 0; i < p.width * VECS; i++) {
        Vec sum{};
        for (int q = 0; q < n; q++) sum += w[q] * k[used[q]][i];
        out[i] = y[i] + size[i % VECS] * sum;
    }
}

// The stages 1, 2, ... before the end of a step, into the slots of that number less one.
inline void Solve::take_stages(int64_t index, const Vec* y, Vec* const* k, const Steps& steps, Vec* slots) const {
    for (int i = 1; i < m.inner(); i++) {
        advance(y, k, m.a + i * m.stages, i, steps.size, slot(slots, i - 1));
        evaluate_slot(index, slot(slots, i - 1), steps, m.c[i], k[i]);
    }
}

inline void Solve::begin(Worker& w, int64_t index, Tile& tile) {
    load(index, (const T*)p.y0, p.width, tile.y);
    const int64_t room = (int64_t)p.slot * VECS;
    const bool keeps = p.records && affords(w, room * sizeof(Vec));
    Vec* at = keeps ? tile.begin = w.kept.take<Vec>(room) : w.slots;
    Steps steps;
    for (int l = 0; l < TILE; l++) steps.t[l] = times(index, l)[0], steps.h[l] = 0;
    memcpy(at, tile.y, p.width * VECS * sizeof(Vec));
    evaluate_slot(index, at, steps, 0, tile.k[0]);
    tile.evaluations++;
    compare(index, tile.k[0]);
    store(index, tile.y, (T*)p.ys);
}

// Whether the program says what the field says; non-finite values are left to the solve.
inline void Solve::compare(int64_t index, const Vec* k) {
    if (!p.slope) return;
    T apart = 0, size = 0;
    for (int l = 0; l < valid(index); l++)
        for (int d = 0; d < p.width; d++) {
            const T ours = ((const T*)k)[d * TILE + l];
            const T theirs = ((const T*)p.slope)[(index * TILE + l) * p.width + d];
            if (!std::isfinite(ours) && !std::isfinite(theirs)) continue;
            apart = std::max(apart, std::isfinite(ours - theirs) ? std::fabs(ours - theirs) : T(INFINITY));
            size = std::max(size, std::fabs(theirs));
        }
    if (apart > (sizeof(T) == 4 ? T(1e-3) : T(1e-9)) * (size + T(1e-3))) fail(MISMATCH);
}

inline bool Solve::affords(const Worker& w, int64_t bytes) const { return w.kept.taken + bytes <= p.budget / threads; }

inline void Solve::fail(Status status) {
    int none = 0;
    failed.compare_exchange_strong(none, status);
}

// Tries a step of a tile: slopes and y1.
inline void Solve::attempt(Worker& w, int64_t index, Tile& tile, const Steps& steps) {
    const int64_t room = (int64_t)(m.slopes() - 1) * p.slot * VECS;
    if (p.records && !tile.pending && affords(w, room * sizeof(Vec))) tile.pending = w.kept.take<Vec>(room);
    Vec* slots = tile.pending ? tile.pending : w.slots;
    take_stages(index, tile.y, tile.k, steps, slots);
    advance(tile.y, tile.k, m.b, std::min(m.inner(), m.stages), steps.size, tile.y1);
    tile.evaluations += m.inner() - 1;
    if (m.first_same_as_last) take_end(index, tile, steps, slots);
}

// f at the end of a step.
inline void Solve::take_end(int64_t index, Tile& tile, const Steps& steps, Vec* slots) {
    Vec* at = slot(slots, m.end() - 1);
    memcpy(at, tile.y1, p.width * VECS * sizeof(Vec));
    evaluate_slot(index, at, steps, 1, tile.k[m.end()]);
    tile.evaluations++;
}

// Sums of the squares of error over tolerance, for every part of the state and every row.
inline void Solve::square_errors(const Tile& tile, const Steps& steps, T (*sums)[TILE]) const {
    Vec total[MOST_GROUPS][VECS] = {};
    const T rtol = T(p.limits.rtol), atol = T(p.limits.atol);
    for (int d = 0; d < p.width; d++)
        for (int v = 0; v < VECS; v++) {
            const int i = d * VECS + v;
            Vec error{};
            for (int q = 0; q < m.stages; q++)
                if (m.error[q]) error += T(m.error[q]) * tile.k[q][i];
            if (m.error_low) {
                Vec low{};
                for (int q = 0; q < m.stages; q++) low += T(m.error_low[q]) * tile.k[q][i];
                Vec square = error * error + T(0.01) * low * low + T(1e-30);
                error *= each(error * error / square, [](T x) { return std::sqrt(x); });
            }
            Vec scale = maximum(absolute(tile.y[i]), absolute(tile.y1[i])) * rtol + atol;
            Vec ratio = steps.size[v] * error / scale;
            total[p.group[d]][v] += ratio * ratio;
        }
    memcpy(sums, total, p.groups * TILE * sizeof(T));
}

inline int Solve::group_size(int g) const { return (int)std::count(p.group, p.group + p.width, g); }

// Largest root mean square of a part, from the sums of its squares over so many rows.
inline double Solve::norm(const double* sums, int64_t rows) const {
    double largest = 0;
    for (int g = 0; g < p.groups; g++) {
        const double value = std::sqrt(sums[g] / std::max<int64_t>(1, group_size(g) * rows));
        if (!(value <= largest)) largest = value;  // a NaN stays
    }
    return largest;
}

// Takes the rows that moved to the end of a step; `first` and `last` are the output times in it.
inline void Solve::commit(Worker& w, int64_t index, Tile& tile, const Steps& steps, const int32_t* first, const int32_t* last,
            uint32_t moved, bool ends) {
    const bool all = moved == ~0u;
    if (!all) keep_rows(tile.y1, tile.y, moved);
    Vec* slots = tile.pending ? tile.pending : w.slots;
    bool wanted = !ends;  // by the next step, or by an output between the ends of this one
    if (m.between == HERMITE)
        for (int l = 0; l < TILE; l++)
            for (int j = first[l]; j < last[l]; j++) wanted |= !at_end(times(index, l), j, steps.t[l], steps.h[l]);
    if (wanted && !m.first_same_as_last) take_end(index, tile, steps, slots);
    read_outputs(index, tile, steps, first, last);
    if (p.records) {
        Record* r = w.kept.take<Record>(1);
        std::copy_n(steps.t, TILE, r->t), std::copy_n(steps.h, TILE, r->h);
        std::copy_n(first, TILE, r->first), std::copy_n(last, TILE, r->last);
        r->moved = moved;
        r->y = w.kept.take<Vec>(p.width * VECS);
        memcpy(r->y, tile.y, p.width * VECS * sizeof(Vec));
        r->slots = all ? tile.pending : nullptr;  // those of a row that rejected may hold overflows
        if (all) tile.pending = nullptr;
        tile.records.push_back(r);
    }
    if (!all) keep_rows(tile.k[m.end()], tile.k[0], moved);
    std::swap(tile.y, tile.y1);
    std::swap(tile.k[0], tile.k[m.end()]);
}

// Rows of `to` that did not move become those of `from`.
inline void Solve::keep_rows(Vec* to, const Vec* from, uint32_t moved) const {
    for (int l = 0; l < TILE; l++)
        if (!(moved >> l & 1))
            for (int d = 0; d < p.width; d++) ((T*)to)[d * TILE + l] = ((const T*)from)[d * TILE + l];
}

inline bool Solve::at_end(const double* ts, int j, double t, double h) const {
    const double end = t + h, rounding = 1e-12 * std::max(std::fabs(end), std::fabs(h));
    return std::fabs(ts[j] - end) <= rounding && (!p.times_move || m.lands || j == p.times - 1);
}

// Calls use(j, reading, θ, whether it is the end) for outputs `first` to `last`, which lie in the step (t, h) of row l.
template <typename Use>
inline void Solve::each_reading(int64_t index, int l, double t, double h, int first, int last, Use use) const {
    const double* ts = times(index, l);
    for (int j = first; j < last; j++) {
        const double theta = h ? (ts[j] - t) / h : 0;
        const bool ends = at_end(ts, j, t, h);
        use(j, Reading(m, theta, ends), theta, ends);
    }
}

inline void Solve::read_outputs(int64_t index, const Tile& tile, const Steps& steps, const int32_t* first, const int32_t* last) {
    if (!p.per_sample)
        return each_reading(index, 0, steps.t[0], steps.h[0], first[0], last[0],
                            [&](int j, const Reading& r, double, bool) {
                                Vec out[p.width * VECS];
                                read(r, tile.y, tile.y1, tile.k, steps.size, out);
                                store(index, out, (T*)p.ys + (int64_t)j * p.rows * p.width);
                            });
    for (int l = 0; l < valid(index); l++)
        if (first[l] < last[l]) read_row(index, l, tile, steps, first[l], last[l]);
}

// The outputs of one row; what they are read from is laid side by side first.
inline void Solve::read_row(int64_t index, int l, const Tile& tile, const Steps& steps, int first, int last) {
    const int width = p.width;
    T y[width], y1[width], k[m.slopes() * width], sum[width];
    for (int d = 0; d < width; d++) y[d] = entry(tile.y, d, l), y1[d] = entry(tile.y1, d, l);
    for (int q = 0; q < m.slopes(); q++)
        for (int d = 0; d < width; d++) k[q * width + d] = entry(tile.k[q], d, l);
    each_reading(index, l, steps.t[l], steps.h[l], first, last, [&](int j, const Reading& r, double, bool) {
        T* to = (T*)p.ys + ((int64_t)j * p.rows + index * TILE + l) * width;
        std::fill_n(sum, width, T(0));
        for (int q = 0; q < m.slopes(); q++)
            if (const T weight = T(r.slope[q]))
                for (int d = 0; d < width; d++) sum[d] += weight * k[q * width + d];
        const T start = T(r.start), finish = T(r.finish), h = T(steps.h[l]);
        for (int d = 0; d < width; d++) to[d] = start * y[d] + finish * y1[d] + h * sum[d];
    });
}

inline void Solve::read(const Reading& r, const Vec* y, const Vec* y1, Vec* const* k, const Vec* size, Vec* out) const {
    const Vec* used[MOST_SLOPES];
    T weights[MOST_SLOPES];
    int n = 0;
    for (int q = 0; q < m.slopes(); q++)
        if (r.slope[q]) used[n] = k[q], weights[n++] = T(r.slope[q]);
    const T start = T(r.start), finish = T(r.finish);
    for (int i = 0; i < p.width * VECS; i++) {
        Vec sum{}, value{};
        for (int q = 0; q < n; q++) sum += weights[q] * used[q][i];
        if (start) value += start * y[i];
        if (finish) value += finish * y1[i];
        out[i] = value + size[i % VECS] * sum;
    }
}

}  // namespace neuralode::PRECISION
