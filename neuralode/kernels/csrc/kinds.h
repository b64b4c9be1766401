// The operations of a program, in the order of KINDS in plan.py; for every compiler.
#pragma once

namespace neuralode {

enum Kind : int {
    LINEAR, COPY, SUM, TENSOR, ROWS, CONSTANT, ADD, SUB, MUL, DIV,
    TANH, SIGMOID, RELU, SILU, SOFTPLUS, ELU, LEAKY_RELU, GELU, SIN, COS, EXP, LOG, SQRT, ABS, RECIPROCAL, POW, SCALE,
    SHIFT,
};

// What the reverse does with the adjoint of an input.
enum Adjoint : int { SET, INCREASE, LEAVE };

// In the order of task.py.
enum Status : int { SUCCESS, NON_FINITE, STEP_UNDERFLOW, MAX_STEPS, MISMATCH, FULL };

// How output times within a step are read, in the order of BETWEEN in task.py.
enum Between : int { HERMITE, LINE, POLYNOMIAL };

}  // namespace neuralode
