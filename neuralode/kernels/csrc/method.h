// An explicit Runge-Kutta method as data, and its dense output.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "control.h"
#include "kinds.h"

namespace neuralode {

struct Method {
    int32_t stages, first_same_as_last, order, error_order, adaptive, lands;
    int32_t between, degree;
    const double *c, *a, *b, *error, *error_low, *interpolant;  // a [stages][stages], interpolant [stages][degree]

    int inner() const { return first_same_as_last ? stages - 1 : stages; }  // stages before the end of the step
    int end() const { return inner(); }                                      // where f(t + h, y1) is among the slopes
    int slopes() const { return inner() + 1; }
    double weight(int i) const { return i < stages ? b[i] : 0; }
};

constexpr int MOST_SLOPES = 20;

// y(t + θh) = start · y0 + finish · y1 + h Σ slope[i] k[i].
struct Reading {
    double start = 1, finish = 0, slope[MOST_SLOPES] = {};

    Reading(const Method& m, double theta, bool at_end) {
        if (at_end) {
            start = 0, finish = 1;
        } else if (m.between == LINE) {
            start = 1 - theta, finish = theta;
        } else if (m.between == HERMITE) {
            finish = theta * theta * (3 - 2 * theta), start = 1 - finish;
            slope[0] = theta * (1 - theta) * (1 - theta);
            slope[m.end()] = theta * theta * (theta - 1);
        } else {
            for (int i = 0; i < m.stages; i++) {
                double value = 0;
                for (int k = m.degree - 1; k >= 0; k--) value = (value + m.interpolant[i * m.degree + k]) * theta;
                slope[i] = value;
            }
        }
    }
};

// The derivative of a reading by θ.
struct Slope {
    double start = 0, finish = 0, slope[MOST_SLOPES] = {};

    Slope(const Method& m, double theta) {
        if (m.between == LINE) {
            start = -1, finish = 1;
        } else if (m.between == HERMITE) {
            finish = 6 * theta * (1 - theta), start = -finish;
            slope[0] = (1 - theta) * (1 - 3 * theta);
            slope[m.end()] = theta * (3 * theta - 2);
        } else {
            for (int i = 0; i < m.stages; i++) {
                double value = 0;
                for (int k = m.degree - 1; k >= 0; k--)
                    value = value * theta + (k + 1) * m.interpolant[i * m.degree + k];
                slope[i] = value;
            }
        }
    }
};

}  // namespace neuralode
