// The kernels in double precision.
#define PRECISION in_double
#define REAL double
#include "step.h"
#include "forward.h"
#include "backward.h"

neuralode::Solver* neuralode::new_double(const Problem& problem) { return new PRECISION::Solve(problem); }
int neuralode::vector_bytes_in_double() { return PRECISION::BYTES; }
