// Functions of one number, and their derivatives.
#pragma once
#include "device.h"
#include "kinds.h"

namespace neuralode {

// `c` and `e` are an operation's constants.
template <int KIND> DEVICE T apply(T x, T c, T e) {
    const T one = 1;
    if constexpr (KIND == TANH) return tanh(x);
    if constexpr (KIND == SIGMOID) return one / (one + exp(-x));
    if constexpr (KIND == RELU) return x < 0 ? T(0) : x;  // a NaN stays
    if constexpr (KIND == SILU) return x / (one + exp(-x));
    if constexpr (KIND == SOFTPLUS) return x * c > e ? x : log1p(exp(x * c)) / c;
    if constexpr (KIND == ELU) return x > 0 ? x : c * expm1(x);
    if constexpr (KIND == LEAKY_RELU) return x > 0 ? x : c * x;
    if constexpr (KIND == GELU) return x * T(0.5) * (one + erf(x * T(0.70710678118654752440)));
    if constexpr (KIND == SIN) return sin(x);
    if constexpr (KIND == COS) return cos(x);
    if constexpr (KIND == EXP) return exp(x);
    if constexpr (KIND == LOG) return log(x);
    if constexpr (KIND == SQRT) return sqrt(x);
    if constexpr (KIND == ABS) return fabs(x);
    if constexpr (KIND == RECIPROCAL) return one / x;
    if constexpr (KIND == POW) return c == 2 ? x * x : c == 3 ? x * x * x : pow(x, c);
    if constexpr (KIND == SCALE) return x * c;
    if constexpr (KIND == SHIFT) return x + c;
    return x;
}

// The derivative at x, where the function's value is y; where it is fused with a product, x is y too, which has its sign.
template <int KIND> DEVICE T slope(T x, T y, T c, T e) {
    const T one = 1;
    if constexpr (KIND == TANH) return one - y * y;
    if constexpr (KIND == SIGMOID) return y * (one - y);
    if constexpr (KIND == RELU) return y > 0 ? one : T(0);
    if constexpr (KIND == SILU) {
        const T s = one / (one + exp(-x));
        return s * (one + x * (one - s));
    }
    if constexpr (KIND == SOFTPLUS) return x * c > e ? one : one - exp(-y * c);
    if constexpr (KIND == ELU) return x > 0 ? one : y + c;
    if constexpr (KIND == LEAKY_RELU) return x > 0 ? one : c;
    if constexpr (KIND == GELU)
        return T(0.5) * (one + erf(x * T(0.70710678118654752440))) + x * T(0.39894228040143267794) * exp(-x * x / 2);
    if constexpr (KIND == SIN) return cos(x);
    if constexpr (KIND == COS) return -sin(x);
    if constexpr (KIND == EXP) return y;
    if constexpr (KIND == LOG) return one / x;
    if constexpr (KIND == SQRT) return T(0.5) / y;
    if constexpr (KIND == ABS) return x > 0 ? one : x < 0 ? -one : T(0);
    if constexpr (KIND == RECIPROCAL) return -y * y;
    if constexpr (KIND == POW) return c == 2 ? 2 * x : c == 3 ? 3 * x * x : c == 0 ? T(0) : c * pow(x, c - one);
    if constexpr (KIND == SCALE) return c;
    return one;
}

}  // namespace neuralode
