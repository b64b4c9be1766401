// Element-wise functions of vectors, and their derivatives.
#pragma once
#include <cmath>

#include "simd.h"

namespace neuralode::PRECISION {

inline Vec rounded(Vec x) {
    // adding and taking away 1.5 · 2^(bits of the mantissa) leaves the nearest whole number
    const T shift = SINGLE ? T(12582912.0) : T(6755399441055744.0);
    return (x + shift) - shift;
}

inline Vec two_to(Vec whole) {
    constexpr int bits = SINGLE ? 23 : 52, bias = SINGLE ? 127 : 1023;
    return (Vec)((__builtin_convertvector(whole, Ints) + bias) << bits);
}

constexpr T inverse_factorial(int n) { return n < 2 ? T(1) : inverse_factorial(n - 1) / n; }

// e^r - 1 for |r| <= ln(2)/2, by its Taylor polynomial.
inline Vec expm1_core(Vec r) {
    constexpr int degree = SINGLE ? 7 : 13;
    Vec p = Vec{} + inverse_factorial(degree);
#pragma GCC unroll 16
    for (int n = degree - 1; n >= 1; n--) p = p * r + inverse_factorial(n);
    return p * r;
}

// x = n ln(2) + r.
inline Vec reduced(Vec x, Vec& n) {
    const T high = SINGLE ? T(0.693359375) : T(0.693147180369123816490);
    const T low = SINGLE ? T(-2.12194440e-4) : T(1.90821492927058770002e-10);
    n = rounded(x * T(1.44269504088896340736));
    return (x - n * high) - n * low;
}

inline Vec exp(Vec x) {
    const T most = SINGLE ? T(88.72283) : T(709.78271289338397);
    const T least = SINGLE ? T(-87.33654) : T(-708.396418532264);
    Vec n, clamped = minimum(maximum(x, Vec{} + least), Vec{} + most);
    Vec r = reduced(clamped, n);
    Vec half = rounded(n * T(0.5));  // 2^n in two factors: n may be one more than an exponent can be
    Vec value = ((T(1) + expm1_core(r)) * two_to(half)) * two_to(n - half);
    value = select(x > most, Vec{} + T(INFINITY), value);
    value = select(x < least, Vec{}, value);
    return select(x == x, value, x);
}

// ln(1 + u) for u in [0, 1], by the series of 2 artanh(u / (2 + u)).
inline Vec log1p(Vec u) {
    constexpr int terms = SINGLE ? 8 : 17;
    Vec s = u / (T(2) + u), square = s * s, p = Vec{} + T(1) / (2 * terms + 1);
#pragma GCC unroll 20
    for (int n = terms - 1; n >= 0; n--) p = p * square + T(1) / (2 * n + 1);
    return T(2) * s * p;
}

inline Vec tanh(Vec x) {
    if constexpr (SINGLE) {
        // odd rational function of degree 9 over 8, minimax in relative error on [0, 8.3]; beyond it one, to
        // rounding; a NaN stays one
        const Ints sign = (Ints)x & (Int(1) << (8 * sizeof(T) - 1));
        const Vec one = (Vec)((Ints)(Vec{} + T(1)) | sign), u = x * x;
        Vec p = u * T(1.464849703e-08) + T(2.150866854e-05), q = u * T(8.295206218e-07) + T(3.373967678e-04);
        p = p * u + T(3.549179703e-03), q = q * u + T(2.607998993e-02);
        p = p * u + T(1.342587939e-01), q = q * u + T(4.675920422e-01);
        p = p * u + T(0.9999999907), q = q * u + T(1);
        return select(absolute(x) > T(8.3), one, x * p * inverse(q));
    }
    // (e - 1) / (e + 1) with e = exp(2|x|), by e - 1 itself, which is exact for small x
    Vec n, twice = minimum(T(2) * absolute(x), Vec{} + T(40));
    Vec r = reduced(twice, n), scale = two_to(n);
    Vec less = (scale - T(1)) + scale * expm1_core(r);
    Vec t = less / (less + T(2));
    t = select(x < T(0), -t, t);
    return select(x == x, t, x);
}

inline Vec sigmoid(Vec x) { return T(1) / (T(1) + exp(-x)); }

inline Vec softplus(Vec x, T beta, T threshold) {
    Vec b = x * beta;
    Vec soft = (maximum(b, Vec{}) + log1p(exp(-absolute(b)))) * (T(1) / beta);
    return select(b > threshold, x, select(x == x, soft, x));
}

inline Vec softplus_slope(Vec x, T beta, T threshold) {
    return select(x * beta > threshold, Vec{} + T(1), sigmoid(x * beta));
}

inline Vec expm1(Vec x) {
    Vec n, clamped = maximum(x, Vec{} - T(40));
    Vec r = reduced(clamped, n), scale = two_to(n);
    return (scale - T(1)) + scale * expm1_core(r);
}

// sin(x + quarter · π/2); arguments too large for the reduction go to the library.
inline Vec sine(Vec x, int quarter) {
    const T limit = SINGLE ? T(8000) : T(1e5);
    for (int l = 0; l < LANES; l++)
        if (!(std::fabs(x[l]) < limit)) {
            for (int i = 0; i < LANES; i++) x[i] = quarter ? std::cos(x[i]) : std::sin(x[i]);
            return x;
        }
    Vec n = rounded(x * T(0.63661977236758134308));
    Vec r;
    if (SINGLE) {
        r = ((x - n * T(1.5703125)) - n * T(4.837512969970703125e-4)) - n * T(7.54978995489188216e-8);
    } else {
        r = ((x - n * T(1.57079632673412561417)) - n * T(6.07710050630396597660e-11)) - n * T(2.02226624879595063154e-21);
    }
    constexpr int terms = SINGLE ? 6 : 9;
    Vec u = r * r, s = Vec{}, c = Vec{};
#pragma GCC unroll 10
    for (int k = terms - 1; k >= 1; k--) {
        const T sign = k & 1 ? T(-1) : T(1);
        s = (s + sign * inverse_factorial(2 * k + 1)) * u;
        c = (c + sign * inverse_factorial(2 * k)) * u;
    }
    s = r + r * s;
    c = T(1) + c;
    Ints turn = (__builtin_convertvector(n, Ints) + quarter) & 3;
    Vec value = (turn & 1) ? c : s;
    return (turn & 2) ? -value : value;
}

// By the C library, an element at a time: for functions that are rare in vector fields.
template <typename Function> inline Vec each(Vec x, Function f) {
    for (int l = 0; l < LANES; l++) x[l] = f(x[l]);
    return x;
}

inline Vec power(Vec x, T exponent) {
    if (exponent == T(2)) return x * x;
    if (exponent == T(3)) return x * x * x;
    if (exponent == T(1)) return x;
    if (exponent == T(0)) return Vec{} + T(1);
    return each(x, [exponent](T v) { return std::pow(v, exponent); });
}

}  // namespace neuralode::PRECISION
