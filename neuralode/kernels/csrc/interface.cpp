// The C interface that Python calls: one handle a solve.
#include <algorithm>
#include <new>

#include "problem.h"
#include "stages.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace neuralode;

// 1 for true, 0 for false, -1 where memory ran out.
template <typename Run> static int guarded(Run run) {
    try {
        return run() ? 1 : 0;
    } catch (const std::bad_alloc&) {
        return -1;
    }
}

#ifndef NEURALODE_VERSION  // a checksum of these sources, from setup.py
#define NEURALODE_VERSION 0u
#endif
EXPORT unsigned neuralode_version() { return NEURALODE_VERSION; }

EXPORT int neuralode_vector_bytes(int doubles) { return doubles ? vector_bytes_in_double() : vector_bytes_in_single(); }

EXPORT Solver* neuralode_begin(const Problem* problem, int doubles) {
    try {
        return doubles ? new_double(*problem) : new_single(*problem);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

EXPORT int neuralode_forward(Solver* solver, double seconds, Report* report) {
    const int state = guarded([=] { return solver->forward(seconds); });
    *report = solver->report;
    std::copy_n(solver->sizes.begin(), std::min<size_t>(solver->sizes.size(), FIRST_SIZES), report->sizes);
    return state;
}

EXPORT int neuralode_backward(Solver* solver, const void* ys, void* y0, void* const* tensors, double* times,
                              double seconds, int64_t pass, int threads, int64_t* products) {
    const int state = guarded([=] { return solver->backward(ys, y0, tensors, times, seconds, pass, threads); });
    *products = solver->report.products;
    return state;
}

EXPORT void neuralode_read(const Solver* solver, double* sizes, int64_t* accepted, int64_t* tried) {
    if (sizes) std::copy(solver->sizes.begin(), solver->sizes.end(), sizes);
    if (accepted) std::copy(solver->accepted_rows.begin(), solver->accepted_rows.end(), accepted);
    if (tried) std::copy(solver->tried_rows.begin(), solver->tried_rows.end(), tried);
}

EXPORT void neuralode_end(Solver* solver) { delete solver; }

EXPORT void neuralode_take_stage(int doubles, const Slopes* slopes, const void* y, void* out, const Workers* workers) {
    doubles ? take_stage(*slopes, (const double*)y, (double*)out, *workers)
            : take_stage(*slopes, (const float*)y, (float*)out, *workers);
}

EXPORT void neuralode_pull_stage(int doubles, const Slopes* slopes, const void* g, void* const* to,
                                 const Workers* workers) {
    doubles ? pull_stage(*slopes, (const double*)g, (double* const*)to, *workers)
            : pull_stage(*slopes, (const float*)g, (float* const*)to, *workers);
}

EXPORT int64_t neuralode_judge_rows(int doubles, const Slopes* slopes, const void* y, const void* y1, int64_t rows,
                                    RowControl* control, const Workers* workers) {
    return doubles ? judge_rows(*slopes, (const double*)y, (const double*)y1, rows, *control, *workers)
                   : judge_rows(*slopes, (const float*)y, (const float*)y1, rows, *control, *workers);
}

EXPORT double neuralode_error_ratio(int doubles, const Slopes* slopes, const void* y, const void* y1, double rtol,
                                    double atol, const Workers* workers) {
    return doubles ? error_ratio(*slopes, (const double*)y, (const double*)y1, rtol, atol, *workers)
                   : error_ratio(*slopes, (const float*)y, (const float*)y1, rtol, atol, *workers);
}
