// One step of the method around a field that PyTorch evaluates: the states at the stages, the end with its error, and
// the transposed combinations. Time and step lie on the device, so that nobody waits for the host between steps.
//
// The source that includes this defines T, the tableau, and how many of its STAGES are EVALUATED afresh in a step.
#pragma once
#include "control.h"

namespace neuralode {

enum Status { SUCCESS, NON_FINITE, STEP_UNDERFLOW, MAX_STEPS };

// Where a solve stands.
struct Control {
    Progress progress;
    double h, direction;   // the step that is under way, with its sign
    long long lands;       // whether it ends at the last time
    long long moved;       // whether the last step stood
    long long kept;        // steps that stood in this chunk
    long long status, done;
};

struct Problem {
    long long count;       // of numbers in the state
    int stage, records;
    const T* slopes[STAGES];
    T *y, *slope;          // the state and the slope at the start of the step
    T *point, *time;       // of the stage
    T* end;                // the state at the end of the step
    T* kept_y;             // [chunk][count]: the starts of the steps of the chunk that stood
    double *kept_t, *kept_h;
    T* kept_k;             // [chunk][STAGES][count]: their slopes, where output times are read between the steps
    double* parts;         // [block]
    unsigned* tickets;
    Control* control;
    const T* adjoints[STAGES];  // of the states at the stages
    const T* adjoint;           // of the state at the end
    const T* extra;             // [EVALUATED][count]: adjoints of the slopes that come from output times, if any do
    T* result;
    Limits limits;
};

#define OWN_NUMBERS(p) for (long long i = (long long)block() * threads() + thread(); i < (p).count; \
                            i += (long long)blocks() * threads())

// Σ weights[j] x[j][i] over the first n.
DEVICE T weighted(const double* weights, const T* const* x, int n, long long i) {
    T sum = 0;
    for (int j = 0; j < n; j++)
        if (weights[j] != 0) sum += T(weights[j]) * x[j][i];
    return sum;
}

DEVICE bool first_thread() { return block() == 0 && thread() == 0; }

// Chooses the first step, from the size that the host, or a first guess, has put into the control.
DEVICE void choose_step(Control& control, const Limits& limits);
KERNEL void rk_begin(Problem p) {
    if (first_thread()) choose_step(*p.control, p.limits);
}

// y + h Σ a[j] k[j], and t + c h.
KERNEL void rk_stage(Problem p) {
    const Control& control = *p.control;
    const T h = T(control.h);
    OWN_NUMBERS(p) p.point[i] = p.y[i] + h * weighted(A[p.stage], p.slopes, p.stage, i);
    if (first_thread()) *p.time = T(control.progress.t + C[p.stage] * control.h);
}

// Chooses the next step; all is done where none is left, or none can be taken.
DEVICE void choose_step(Control& control, const Limits& limits) {
    Progress& progress = control.progress;
    const double rest = progress.end - progress.t;
    control.lands = progress.size >= fabs(rest) * (1 - 1e-9);
    control.h = control.lands ? rest : control.direction * progress.size;
    const bool stuck = progress.t + control.h == progress.t || !is_finite(control.h);
    control.status = progress.done ? SUCCESS : progress.tried >= limits.max_steps ? MAX_STEPS : STEP_UNDERFLOW;
    control.done = progress.done || control.status == MAX_STEPS || stuck;
}

// The decision on a step, by one thread.
DEVICE void decide(const Problem& p, double ratio) {
    Control& control = *p.control;
    Progress& progress = control.progress;
    const double wanted = progress.size;
    progress.size = fabs(control.h);
    control.moved = progress.accepts(p.limits, ERROR_ORDER, ratio);
    if (control.moved) {
        p.kept_t[control.kept] = progress.t, p.kept_h[control.kept] = control.h;
        control.kept++;
        progress.t = control.lands ? progress.end : progress.t + control.h;
        progress.done = control.lands;
        // cut short to end at the last time, so no sign of a hard stretch
        if (control.lands) progress.size = fmax(progress.size, wanted);
    }
    choose_step(control, p.limits);
}

// The sum over the threads of a block, whose number is a power of two.
DEVICE double block_sum(double* sums, double mine) {
    meet();  // the sums of before have been read
    sums[thread()] = mine;
    meet();
    for (int n = threads() / 2; n > 0; n /= 2) {
        if (thread() < n) sums[thread()] += sums[thread() + n];
        meet();
    }
    return sums[0];
}

// The state at the end of the step, the norm of its error, and the decision, which the last block takes.
KERNEL void rk_finish(Problem p) {
    if (p.control->done) {  // steps of a chunk that nobody needs any more do nothing
        if (first_thread()) p.control->moved = 0;
        return;
    }
    SHARED_MEMORY(memory)
    double* sums = (double*)memory;
    const T h = T(p.control->h), rtol = T(p.limits.rtol), atol = T(p.limits.atol);
    double mine = 0;
    OWN_NUMBERS(p) {
        const T y = p.y[i], end = y + h * weighted(B, p.slopes, STAGES, i);
        p.end[i] = end;
        const T error = h * weighted(ERROR, p.slopes, STAGES, i);
        const T ratio = error / (atol + rtol * T(fmax(fabs(y), fabs(end))));
        mine += double(ratio) * double(ratio);
    }
    const double own = block_sum(sums, mine);
    if (thread() == 0) p.parts[block()] = own;
    if (!last_block(p.tickets)) return;
    mine = 0;
    for (int b = thread(); b < blocks(); b += threads()) mine += ((volatile double*)p.parts)[b];
    const double total = block_sum(sums, mine);
    if (thread() != 0) return;
    *p.tickets = 0;  // all have drawn theirs; the next launch begins anew
    decide(p, sqrt(total / p.count));
}

// Goes to the end of a step that stood.
KERNEL void rk_move(Problem p) {
    const Control& control = *p.control;
    if (!control.moved) return;
    T* kept = p.kept_y + (control.kept - 1) * p.count;
    OWN_NUMBERS(p) {
        if (p.records) kept[i] = p.y[i];
        if (p.kept_k)
            for (int j = 0; j < STAGES; j++)
                p.kept_k[((control.kept - 1) * STAGES + j) * p.count + i] = p.slopes[j][i];
        p.y[i] = p.end[i];
        if (FSAL) p.slope[i] = p.slopes[STAGES - 1][i];
    }
}

// The adjoint of the slope of a stage: h (b λ + Σ a[j] μ[j]) over the stages after it, and what output times add.
KERNEL void rk_stage_bwd(Problem p) {
    const T h = T(p.control->h);
    OWN_NUMBERS(p) {
        T sum = T(B[p.stage]) * p.adjoint[i];
        for (int j = p.stage + 1; j < EVALUATED; j++)
            if (A[j][p.stage] != 0) sum += T(A[j][p.stage]) * p.adjoints[j][i];
        p.result[i] = h * sum + (p.extra ? p.extra[p.stage * p.count + i] : T(0));
    }
}

// The adjoint of the state at the start: λ + Σ μ[j].
KERNEL void rk_start_bwd(Problem p) {
    OWN_NUMBERS(p) {
        T sum = p.adjoint[i];
        for (int j = 0; j < EVALUATED; j++) sum += p.adjoints[j][i];
        p.result[i] = sum;
    }
}

}  // namespace neuralode
