// The control of step sizes; for every compiler.
#pragma once

#ifndef __CUDACC__
#include <math.h>
#endif
// how a function is marked that runs on the host, or on the device
#ifndef ANYWHERE
#define ANYWHERE inline
#define ANYWHERE_MEMBER
#endif

namespace neuralode {

ANYWHERE bool is_finite(double x) { return x - x == 0; }

struct Limits {
    double rtol, atol;
    double integral, proportional, derivative, safety, min_factor, max_factor;
    double first_step;  // 0 to choose one
    long long max_steps, max_steps_between;
};

// The way of a solve, or of one sample, through its times.
struct Progress {
    double t = 0, end = 0, size = 0, last = 1, before = 1;
    bool rejected = false, done = false;
    int next = 1;  // the output time that comes next
    long long accepted = 0, tried = 0, tried_at_output = 0;

    // Takes in the error of a step over its tolerance; true if the step stands. Söderlind 2003.
    ANYWHERE_MEMBER bool accepts(const Limits& limits, int order, double ratio) {
        tried++;
        const bool accepted_now = ratio <= 1;
        const bool filtered = limits.proportional || limits.derivative;
        double factor = 0;
        if (is_finite(ratio)) {
            ratio = fmax(ratio, 1e-10);
            factor = limits.safety * pow(ratio, -(limits.integral + limits.proportional + limits.derivative) / order);
            if (filtered) factor *= pow(last, (limits.proportional + 2 * limits.derivative) / order);
            if (limits.derivative) factor *= pow(before, -limits.derivative / order);
        }
        const double ceiling = rejected || !accepted_now ? 1.0 : limits.max_factor;
        const double floor = accepted_now && !filtered ? 1.0 : limits.min_factor;
        size *= fmin(ceiling, fmax(floor, factor));
        rejected = !accepted_now;
        if (accepted_now) before = last, last = ratio, accepted++;
        return accepted_now;
    }
};

// A first step size from the norms of y, f and the change of f over an Euler step (Hairer, Nørsett, Wanner, I, II.4).
ANYWHERE double first_guess(double size, double slope) {
    if (!is_finite(size) || !is_finite(slope)) return 1e-6;
    return size < 1e-5 || slope < 1e-5 ? 1e-6 : 0.01 * size / slope;
}
ANYWHERE double first_step(double size, double slope, double h0, double change, int order) {
    if (!is_finite(size) || !is_finite(slope)) return 1e-6;
    const double bend = change / h0;
    if (!is_finite(bend)) return h0;
    const double steepest = fmax(slope, bend);
    const double h1 = steepest <= 1e-15 ? fmax(1e-6, h0 * 1e-3) : pow(0.01 / steepest, 1.0 / order);
    return fmin(100 * h0, h1);
}

}  // namespace neuralode
