"""Scripts that measure. A package, so that ``python -m benchmarks.gpu.report`` finds this folder."""
