// What Python and the kernels hand each other; the same for both precisions.
#pragma once
#include <cstdint>
#include <vector>

#include "kinds.h"
#include "method.h"
#include "team.h"

namespace neuralode {

struct Operation {
    Kind kind;
    int32_t a, b;              // where the inputs lie, in features
    int32_t width_a, width_b;  // 1 beside a wider result: every feature sees the same
    int32_t out, width;
    int32_t tensor, bias;      // indices; -1 for none
    int32_t activation;        // a kind, fused with LINEAR: the result is the function's; -1 for none
    Adjoint adjoint_a, adjoint_b;
};

constexpr int MOST_GROUPS = 16;

// A solve; it outlives the kernels' work on it. Rows are samples, and arrays are [rows][width] unless they say otherwise.
struct Problem {
    int64_t rows;
    int32_t width, slot, output, time, operation_count, cleared_count, tensor_count, groups;
    const Operation* operations;
    const double* constants;                 // three an operation
    const int32_t *cleared, *group;          // group[d]: the part of a tuple state that feature d belongs to
    const void* const* tensors;
    const int32_t* tensor_shapes;            // (outputs, inputs) of each; inputs 0 for no weight, -1 for one row a sample
    const int32_t* tensor_gradients;         // whether each wants one
    Method method;
    Limits limits;
    int32_t per_sample, times, times_per_sample, records, times_move, threads;
    const double* ts;                        // [times] or [rows][times]
    const double* grid;                      // ends of the steps, where they are given
    int64_t grid_count, budget;
    Runtime runtime;
    const void *y0, *slope;                  // the slope is the field's own f(t0, y0)
    void* ys;                                // [times][rows][width]
};

constexpr int FIRST_SIZES = 64;

struct Report {
    int32_t status;
    int64_t accepted, rejected, evaluations, products, kept_bytes, steps;
    double sizes[FIRST_SIZES];  // of the first steps, so that a short solve need not be asked for them
};

// One solve under way, or done and kept for its backward passes.
class Solver {
  public:
    virtual ~Solver() = default;
    // Both go on for about `seconds` and return whether there is more to do, so that the caller may look at its signals.
    virtual bool forward(double seconds) = 0;
    // A backward pass with another number is another pass: it forgets one that was broken off.
    virtual bool backward(const void* grad_ys, void* grad_y0, void* const* grad_tensors, double* grad_times,
                          double seconds, int64_t pass, int threads) = 0;

    Report report{};
    std::vector<double> sizes;  // of the accepted steps, where samples share them
    std::vector<int64_t> accepted_rows, tried_rows;
};

Solver* new_single(const Problem& problem);
Solver* new_double(const Problem& problem);
int vector_bytes_in_single();  // of the instructions that each precision was compiled for
int vector_bytes_in_double();

}  // namespace neuralode
