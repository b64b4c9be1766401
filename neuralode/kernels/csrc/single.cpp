// The kernels in single precision.
#define PRECISION in_single
#define REAL float
#include "step.h"
#include "forward.h"
#include "backward.h"

neuralode::Solver* neuralode::new_single(const Problem& problem) { return new PRECISION::Solve(problem); }
int neuralode::vector_bytes_in_single() { return PRECISION::BYTES; }
