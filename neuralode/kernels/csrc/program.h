// A program on one tile, forwards and in reverse. Registers lie in a slot, a feature of the tile after the other; the
// adjoints of registers lie in the same places of a slot of their own.
#pragma once
#include "functions.h"
#include "linear.h"
#include "problem.h"

namespace neuralode::PRECISION {

struct Tensor {
    int outputs = 0, inputs = 1;  // [outputs, inputs] for a weight, else [outputs]
    const T* data = nullptr;
    T* packed = nullptr;          // a weight for the forward product
    T* transposed = nullptr;      // and for the reverse
    bool by_row = false;          // one row a sample; data is [tiles][outputs][TILE]
    bool wants_gradient = false;
    bool narrow() const { return inputs <= NARROW || (outputs <= NARROW && inputs <= 256); }
    int stride() const { return (inputs + LANES - 1) / LANES * LANES; }
};

struct Program {
    int slot = 0, width = 0, output = 0;  // features
    int time = -1;                        // where the time lies; -1 if nothing reads it
    int operation_count = 0, cleared_count = 0;
    const Operation* operations = nullptr;
    const double* constants = nullptr;    // three an operation
    const int32_t* cleared = nullptr;     // (start, features) of adjoints that begin at zero
};

// One thread's sums of gradients of the tensors, and the room that the reverse needs.
struct Gradients {
    T** total = nullptr;  // per tensor; lanes apart for biases, narrow weights and other tensors
    T* rows = nullptr;    // an input of a product, transposed
    Ahead ahead;          // the slot that will be reversed next
};

template <typename F> inline void map(const Vec* x, Vec* out, int features, F f) {
    for (int i = 0; i < features * VECS; i++) out[i] = f(x[i]);
}

inline Vec activate(int kind, Vec x, const double* c) {
    switch (kind) {
        case TANH: return tanh(x);
        case SIGMOID: return sigmoid(x);
        case RELU: return select(x > 0, x, x == x ? Vec{} : x);
        case SOFTPLUS: return softplus(x, c[0], c[1]);
        case ELU: return select(x > 0, x, T(c[0]) * expm1(x));
        default: return x;
    }
}

// The derivative of an activation by its value.
inline Vec activation_slope(int kind, Vec out, const double* c) {
    switch (kind) {
        case TANH: return 1 - out * out;
        case SIGMOID: return out * (1 - out);
        case RELU: return select(out > 0, Vec{} + T(1), Vec{});
        case SOFTPLUS: {
            Vec slope = 1 - exp(out * T(-c[0]));
            return select(out * T(c[0]) > T(c[1]), Vec{} + T(1), slope);
        }
        case ELU: return select(out > 0, Vec{} + T(1), out + T(c[0]));
        default: return Vec{} + T(1);
    }
}

inline void linear(const Operation& op, const double* c, const Tensor* tensors, const Vec* x, Vec* out) {
    const Tensor& weight = tensors[op.tensor];
    const T* bias = op.bias < 0 ? nullptr : tensors[op.bias].data;
    auto run = [&](auto finish) {
        product(weight.packed, weight.outputs, weight.inputs, x, out,
                [&](int j, Vec sum, Vec) { return finish(bias ? sum + bias[j] : sum); });
    };
    switch (op.activation) {
        case TANH: return run([](Vec x) { return tanh(x); });
        case -1: return run([](Vec x) { return x; });
        default: return run([&](Vec x) { return activate(op.activation, x, c); });
    }
}

template <typename F>
inline void combine(const Operation& op, const Vec* a, const Vec* b, Vec* out, F f) {
    const int step_a = op.width_a == op.width ? VECS : 0, step_b = op.width_b == op.width ? VECS : 0;
    for (int j = 0; j < op.width; j++)
        for (int v = 0; v < VECS; v++) out[j * VECS + v] = f(a[j * step_a + v], b[j * step_b + v]);
}

inline void unary(const Operation& op, const double* c, const Vec* x, Vec* out) {
    const int n = op.width;
    const T c0 = c[0], c1 = c[1];
    switch (op.kind) {
        case SILU: return map(x, out, n, [](Vec x) { return x * sigmoid(x); });
        case LEAKY_RELU: return map(x, out, n, [=](Vec x) { return select(x > 0, x, c0 * x); });
        case GELU:
            return map(x, out, n, [](Vec x) {
                return each(x, [](T v) { return v * T(0.5) * (1 + std::erf(v * T(0.70710678118654752440))); });
            });
        case SIN: return map(x, out, n, [](Vec x) { return sine(x, 0); });
        case COS: return map(x, out, n, [](Vec x) { return sine(x, 1); });
        case EXP: return map(x, out, n, [](Vec x) { return exp(x); });
        case LOG: return map(x, out, n, [](Vec x) { return each(x, [](T v) { return std::log(v); }); });
        case SQRT: return map(x, out, n, [](Vec x) { return each(x, [](T v) { return std::sqrt(v); }); });
        case ABS: return map(x, out, n, [](Vec x) { return absolute(x); });
        case RECIPROCAL: return map(x, out, n, [](Vec x) { return T(1) / x; });
        case POW: return map(x, out, n, [=](Vec x) { return power(x, c0); });
        case SCALE: return map(x, out, n, [=](Vec x) { return x * c0; });
        case SHIFT: return map(x, out, n, [=](Vec x) { return x + c0; });
        case SOFTPLUS: return map(x, out, n, [=](Vec x) { return softplus(x, c0, c1); });
        case TANH: return map(x, out, n, [](Vec x) { return tanh(x); });
        default: return map(x, out, n, [&](Vec x) { return activate(op.kind, x, c); });
    }
}

// Fills a slot whose state, and time, are in place.
void evaluate(const Program& program, const Tensor* tensors, int tile, Vec* slot) {
    for (int i = 0; i < program.operation_count; i++) {
        const Operation& op = program.operations[i];
        const double* c = program.constants + 3 * i;
        const Vec*a = slot + op.a * VECS, *b = slot + op.b * VECS;
        Vec* out = slot + op.out * VECS;
        switch (op.kind) {
            case LINEAR: linear(op, c, tensors, a, out); break;
            case COPY: memcpy(out, a, op.width * VECS * sizeof *a); break;
            case SUM:
                for (int v = 0; v < VECS; v++) {
                    Vec sum = a[v];
                    for (int j = 1; j < op.width_a; j++) sum += a[j * VECS + v];
                    out[v] = sum;
                }
                break;
            case TENSOR:
                for (int j = 0; j < op.width; j++)
                    for (int v = 0; v < VECS; v++) out[j * VECS + v] = Vec{} + tensors[op.tensor].data[j];
                break;
            case ROWS:
                memcpy(out, tensors[op.tensor].data + (int64_t)tile * op.width * TILE, op.width * VECS * sizeof *a);
                break;
            case CONSTANT:
                for (int j = 0; j < op.width * VECS; j++) out[j] = Vec{} + T(c[0]);
                break;
            case ADD: combine(op, a, b, out, [](Vec x, Vec y) { return x + y; }); break;
            case SUB: combine(op, a, b, out, [](Vec x, Vec y) { return x - y; }); break;
            case MUL: combine(op, a, b, out, [](Vec x, Vec y) { return x * y; }); break;
            case DIV: combine(op, a, b, out, [](Vec x, Vec y) { return x / y; }); break;
            default: unary(op, c, a, out);
        }
    }
}

// Gives f(j, v), of an operation's feature j, to the adjoint of one of its inputs.
template <typename F>
inline void pull(Vec* adjoint, Adjoint how, int from, int width, F f) {
    if (how == LEAVE) return;
    if (from == 1 && width > 1) {
        for (int v = 0; v < VECS; v++) {
            Vec sum = f(0, v);
            for (int j = 1; j < width; j++) sum += f(j, v);
            adjoint[v] = how == SET ? sum : adjoint[v] + sum;
        }
    } else if (how == SET) {
        for (int j = 0; j < width; j++)
            for (int v = 0; v < VECS; v++) adjoint[j * VECS + v] = f(j, v);
    } else {
        for (int j = 0; j < width; j++)
            for (int v = 0; v < VECS; v++) adjoint[j * VECS + v] += f(j, v);
    }
}

inline void add_up(const Vec* g, int features, T* total) {
    Vec* sums = (Vec*)total;
    for (int j = 0; j < features; j++)
        for (int v = 0; v < VECS; v++) sums[j] += g[j * VECS + v];
}

inline void reverse_linear(const Operation& op, const double* c, const Tensor* tensors, const Vec* x,
                           const Vec* out, Vec* g, Vec* adjoint, Gradients& gradients) {
    const Tensor& weight = tensors[op.tensor];
    Vec* to_bias = op.bias >= 0 && tensors[op.bias].wants_gradient ? (Vec*)gradients.total[op.bias] : nullptr;
    auto pull_activation = [&](auto slope) {
        for (int j = 0; j < op.width; j++) {
            Vec sum{};
            for (int v = 0; v < VECS; v++) sum += g[j * VECS + v] *= slope(out[j * VECS + v]);
            if (to_bias) to_bias[j] += sum;
        }
    };
    switch (op.activation) {
        case -1: if (to_bias) add_up(g, op.width, (T*)to_bias); break;
        case TANH: pull_activation([](Vec out) { return 1 - out * out; }); break;
        default: pull_activation([&](Vec out) { return activation_slope(op.activation, out, c); });
    }
    if (weight.wants_gradient) {
        T* total = gradients.total[op.tensor];
        if (weight.narrow()) {
            narrow_gradient(g, weight.outputs, x, weight.inputs, (Vec*)total);
        } else {
            transpose(x, weight.inputs, gradients.rows, weight.stride());
            weight_gradient((const T*)g, weight.outputs, gradients.rows, weight.stride(), total, gradients.ahead);
        }
    }
    if (op.adjoint_a == SET)
        product(weight.transposed, weight.inputs, weight.outputs, g, adjoint, [](int, Vec sum, Vec) { return sum; });
    if (op.adjoint_a == INCREASE)
        product(weight.transposed, weight.inputs, weight.outputs, g, adjoint,
                [](int, Vec sum, Vec old) { return old + sum; });
}

inline void reverse_unary(const Operation& op, const double* c, const Vec* x, const Vec* out, const Vec* g,
                          Vec* adjoint) {
    const T c0 = c[0], c1 = c[1];
    auto chain = [&](auto slope) {  // slope(x, value)
        pull(adjoint, op.adjoint_a, op.width, op.width, [&](int j, int v) {
            const int i = j * VECS + v;
            return g[i] * slope(x[i], out[i]);
        });
    };
    switch (op.kind) {
        case SILU:
            return chain([](Vec x, Vec) {
                Vec s = sigmoid(x);
                return s * (1 + x * (1 - s));
            });
        case LEAKY_RELU: return chain([=](Vec x, Vec) { return select(x > 0, Vec{} + T(1), Vec{} + c0); });
        case GELU:
            return chain([](Vec x, Vec) {
                return each(x, [](T v) {
                    const T bell = T(0.39894228040143267794) * std::exp(-v * v / 2);
                    return T(0.5) * (1 + std::erf(v * T(0.70710678118654752440))) + v * bell;
                });
            });
        case SIN: return chain([](Vec x, Vec) { return sine(x, 1); });
        case COS: return chain([](Vec x, Vec) { return -sine(x, 0); });
        case EXP: return chain([](Vec, Vec out) { return out; });
        case LOG: return chain([](Vec x, Vec) { return T(1) / x; });
        case SQRT: return chain([](Vec, Vec out) { return T(0.5) / out; });
        case ABS: return chain([](Vec x, Vec) { return select(x > 0, Vec{} + T(1), select(x < 0, Vec{} - T(1), Vec{})); });
        case RECIPROCAL: return chain([](Vec, Vec out) { return -out * out; });
        case POW: return chain([=](Vec x, Vec) { return c0 == 0 ? Vec{} : c0 * power(x, c0 - 1); });
        case SCALE: return chain([=](Vec, Vec) { return Vec{} + c0; });
        case SHIFT: return chain([](Vec, Vec) { return Vec{} + T(1); });
        case SOFTPLUS: return chain([=](Vec x, Vec) { return softplus_slope(x, c0, c1); });
        case ELU: return chain([=](Vec x, Vec out) { return select(x > 0, Vec{} + T(1), out + c0); });
        default: return chain([&](Vec, Vec out) { return activation_slope(op.kind, out, c); });
    }
}

// From the adjoint of dy/dt, in its place among the adjoints, to those of the state and the time; the gradients of the
// tensors go to the sums. `by_row` gives the sums of the tensors that have one row a sample, [outputs][TILE].
template <typename ByRow>
void reverse(const Program& program, const Tensor* tensors, const Vec* slot, Vec* adjoints,
             Gradients& gradients, ByRow by_row) {
    for (int i = program.operation_count - 1; i >= 0; i--) {
        const Operation& op = program.operations[i];
        const double* c = program.constants + 3 * i;
        const Vec*a = slot + op.a * VECS, *b = slot + op.b * VECS, *out = slot + op.out * VECS;
        Vec*g = adjoints + op.out * VECS, *to_a = adjoints + op.a * VECS, *to_b = adjoints + op.b * VECS;
        const int step_a = op.width_a == op.width ? VECS : 0, step_b = op.width_b == op.width ? VECS : 0;
        auto pull_a = [&](auto f) { pull(to_a, op.adjoint_a, op.width_a, op.width, f); };
        auto pull_b = [&](auto f) { pull(to_b, op.adjoint_b, op.width_b, op.width, f); };
        switch (op.kind) {
            case LINEAR: reverse_linear(op, c, tensors, a, out, g, to_a, gradients); break;
            case COPY: pull_a([&](int j, int v) { return g[j * VECS + v]; }); break;
            case SUM: pull(to_a, op.adjoint_a, op.width_a, op.width_a, [&](int, int v) { return g[v]; }); break;
            case TENSOR:
                if (tensors[op.tensor].wants_gradient) add_up(g, op.width, gradients.total[op.tensor]);
                break;
            case ROWS:
                if (Vec* sums = by_row(op.tensor))
                    for (int j = 0; j < op.width * VECS; j++) sums[j] += g[j];
                break;
            case CONSTANT: break;
            case ADD:
                pull_a([&](int j, int v) { return g[j * VECS + v]; });
                pull_b([&](int j, int v) { return g[j * VECS + v]; });
                break;
            case SUB:
                pull_a([&](int j, int v) { return g[j * VECS + v]; });
                pull_b([&](int j, int v) { return -g[j * VECS + v]; });
                break;
            case MUL:
                pull_a([&](int j, int v) { return g[j * VECS + v] * b[j * step_b + v]; });
                pull_b([&](int j, int v) { return g[j * VECS + v] * a[j * step_a + v]; });
                break;
            case DIV:
                pull_a([&](int j, int v) { return g[j * VECS + v] / b[j * step_b + v]; });
                pull_b([&](int j, int v) { return -g[j * VECS + v] * out[j * VECS + v] / b[j * step_b + v]; });
                break;
            default: reverse_unary(op, c, a, out, g, to_a);
        }
    }
}

}  // namespace neuralode::PRECISION
