"""Scripts that measure. It is a package so that ``python -m benchmarks.gpu.report`` finds it."""
