// An explicit Runge-Kutta method as data, its dense output, and the control of step sizes.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace neuralode {

enum Between : int32_t { HERMITE, LINE, POLYNOMIAL };

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

struct Limits {
    double rtol, atol;
    double integral, proportional, derivative, safety, min_factor, max_factor;
    double first_step;  // 0 to choose one
    int64_t max_steps, max_steps_between;
};

// The way of a solve, or of one sample, through its times.
struct Progress {
    double t = 0, end = 0, size = 0, last = 1, before = 1;
    bool rejected = false, done = false;
    int32_t next = 1;  // the output time that comes next
    int64_t accepted = 0, tried = 0, tried_at_output = 0;

    // Takes in the error of a step over its tolerance; true if the step stands. Söderlind 2003.
    bool accepts(const Limits& limits, int order, double ratio) {
        tried++;
        const bool accepted_now = ratio <= 1, finite = std::isfinite(ratio);
        const bool filtered = limits.proportional || limits.derivative;
        double factor = 0;
        if (finite) {
            ratio = std::max(ratio, 1e-10);
            factor = limits.safety * std::pow(ratio, -(limits.integral + limits.proportional + limits.derivative) / order);
            if (filtered) factor *= std::pow(last, (limits.proportional + 2 * limits.derivative) / order);
            if (limits.derivative) factor *= std::pow(before, -limits.derivative / order);
        }
        const double ceiling = rejected || !accepted_now ? 1.0 : limits.max_factor;
        const double floor = accepted_now && !filtered ? 1.0 : limits.min_factor;
        size *= std::min(ceiling, std::max(floor, factor));
        rejected = !accepted_now;
        if (accepted_now) before = last, last = ratio, accepted++;
        return accepted_now;
    }
};

// A first step size from the norms of y, f and the change of f over an Euler step (Hairer, Nørsett, Wanner, I, II.4).
inline double first_guess(double size, double slope) {
    if (!std::isfinite(size) || !std::isfinite(slope)) return 1e-6;
    return size < 1e-5 || slope < 1e-5 ? 1e-6 : 0.01 * size / slope;
}
inline double first_step(double size, double slope, double h0, double change, int order) {
    if (!std::isfinite(size) || !std::isfinite(slope)) return 1e-6;
    const double bend = change / h0;
    if (!(bend < INFINITY)) return h0;
    const double steepest = std::max(slope, bend);
    const double h1 = steepest <= 1e-15 ? std::max(1e-6, h0 * 1e-3) : std::pow(0.01 / steepest, 1.0 / order);
    return std::min(100 * h0, h1);
}

}  // namespace neuralode
