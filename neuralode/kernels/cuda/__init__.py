"""The kernels for CUDA: a program is written out as source, compiled for the device at hand, and run."""
