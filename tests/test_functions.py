"""The error of every function of csrc/common/functions*.h, in units in the last place."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import mpmath
import numpy as np
import pytest
from scipy.special import ndtr

COMMON = Path(__file__).resolve().parent.parent / "csrc" / "common"
SOURCE = """
#include "functions.h"
namespace fastjac::math {
#define MAP(name, expression)                                              \\
  extern "C" void map_##name(const float* in, float* out, long n) {        \\
    for (long i = 0; i < n; ++i) { const float x = in[i]; out[i] = expression; } \\
  }
MAP(exp, exp(x)) MAP(exp_neg, exp_neg(x)) MAP(expm1, expm1(x)) MAP(log1p, log1p(x))
MAP(sin, sin(x)) MAP(cos, cos(x))
MAP(tanh, tanh(x, exp(-2.0f * abs(x)))) MAP(normcdf, normcdf(x, exp(-0.5f * x * x)))
}
"""
IN_DOUBLE = SOURCE.replace("MAP(", "MAP64(").replace("map_", "map64_").replace("float", "double")
IN_DOUBLE = IN_DOUBLE.replace("2.0f", "2.0").replace("0.5f", "0.5")
WIDER = {np.float32: np.float64, np.float64: np.longdouble}
# name, truth in a wider type, range, bound in ulp: what the comments in functions.h state.
CASES = [
    ("exp", np.exp, (-87.3, 88.7), 1.1),
    ("exp_neg", np.exp, (-87.3, 0), 1.2),
    ("expm1", np.expm1, (-20, 88.3), 1.5),
    ("log1p", np.log1p, (0, 1), 2.0),
    ("tanh", np.tanh, (-10, 10), 1.6),
]
# The same for double, as functions_double.h states it.
DOUBLE_CASES = [
    ("exp", np.exp, (-708, 709.7), 1.2),
    ("exp_neg", np.exp, (-708, 0), 1.3),
    ("expm1", np.expm1, (-45, 709.7), 1.7),
    ("log1p", np.log1p, (0, 1), 2.0),
    ("tanh", np.tanh, (-20, 20), 1.6),
]


@pytest.fixture(scope="module", params=["baseline", "native"])
def library(request, tmp_path_factory):
    cxx = shutil.which("c++")
    if cxx is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("functions")
    (folder / "f.cpp").write_text(SOURCE + IN_DOUBLE)
    flags = ["-march=native"] if request.param == "native" else []
    subprocess.run(
        [cxx, "-std=c++17", "-O2", "-ffp-contract=fast", *flags, "-shared", "-fPIC",
         f"-I{COMMON}", str(folder / "f.cpp"), "-o", str(folder / "f.so")],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(folder / "f.so"))


def apply(library, name, x, dtype=np.float32, prefix="map"):
    x = np.ascontiguousarray(x, dtype=dtype)
    out = np.full_like(x, np.nan)
    pointer = ctypes.POINTER(ctypes.c_float if dtype == np.float32 else ctypes.c_double)
    getattr(library, f"{prefix}_{name}" if dtype == np.float32 else f"map64_{name}")(
        x.ctypes.data_as(pointer), out.ctypes.data_as(pointer), ctypes.c_long(x.size)
    )
    return out


def points(lo, hi, dtype=np.float32):
    rng = np.random.default_rng(0)
    wide = rng.uniform(lo, hi, 400_000)
    near = rng.uniform(-1, 1, 200_000) * np.exp(rng.uniform(-30, 0, 200_000))
    return np.concatenate([wide, near[(near >= lo) & (near <= hi)]]).astype(dtype)


@pytest.mark.parametrize(
    ("dtype", "name", "truth", "span", "bound"),
    [(t, *c) for t, cases in zip(WIDER, (CASES, DOUBLE_CASES), strict=True) for c in cases],
    ids=lambda c: str(c)[:16],
)
def test_error_in_ulp(library, dtype, name, truth, span, bound):
    wider = WIDER[dtype]
    if np.finfo(wider).eps == np.finfo(dtype).eps:
        pytest.skip("long double is double on this machine")
    x = points(*span, dtype)
    want = truth(x.astype(wider))
    ulp = np.spacing(np.abs(want).astype(dtype)).astype(wider)
    error = np.abs(apply(library, name, x, dtype) - want) / ulp
    print(f"{name}: {error.max():.2f} ulp, at {x[error.argmax()]!r}")
    assert error.max() <= bound


@pytest.mark.parametrize(("name", "truth"), [("sin", np.sin), ("cos", np.cos)])
@pytest.mark.parametrize("limit", [1e1, 1e4, 1e8])
def test_absolute_error_of_sin_and_cos(library, name, truth, limit):
    x = points(-limit, limit)
    error = np.abs(apply(library, name, x) - truth(x.astype(np.float64)))
    assert error.max() <= 1e-7
    assert np.abs(apply(library, name, np.float32([1e20, -3e38]))).max() <= 1


def test_relative_error_of_normcdf(library):
    """The tail has no cancellation. The error grows with z², like that of the argument of exp."""
    x = points(-12.9, 12.9)
    want = ndtr(x.astype(np.float64))
    error = np.abs(apply(library, "normcdf", x) / want - 1)
    assert (error <= 3.5e-7 + np.square(x) * 6e-8).all()
    assert error[np.abs(x) < 0.5].max() <= 2.5e-7


def test_relative_error_of_normcdf_in_double(library):
    x = points(-37.0, 8.0, np.float64)[::400]
    got = apply(library, "normcdf", x, np.float64)
    want = np.array([float(mpmath.erfc(-mpmath.mpf(v) / mpmath.sqrt(2)) / 2) for v in x.tolist()])
    eps = np.finfo(np.float64).eps
    error = np.abs(got / want - 1) / eps
    # The rounding of the argument z²/2 of exp costs z² eps, and the ratio of Mills cancels.
    assert (error <= 5 + 2 * np.square(x)).all()
    assert error[np.abs(x) < 1].max() <= 5


def test_limits_in_double(library):
    def of(name, x):
        return apply(library, name, np.float64(x), np.float64)

    inf = np.float64([np.inf, -np.inf, np.nan, 0.0])
    for name, truth in (("exp", np.exp), ("expm1", np.expm1), ("tanh", np.tanh)):
        np.testing.assert_array_equal(of(name, inf), truth(inf))
    np.testing.assert_array_equal(of("exp_neg", inf[1:]), np.exp(inf[1:]))
    np.testing.assert_array_equal(of("normcdf", inf), [1, 0, np.nan, 0.5])
    with np.errstate(over="ignore"):
        big = np.float64([709.9, 1e4, 1e308, -745.5, -1e4, -1e308])
        np.testing.assert_array_equal(of("exp", big), np.exp(big))
        np.testing.assert_array_equal(of("exp_neg", big[3:]), 0)
    subnormal = np.float64([-709.0, -730.0, -744.0])
    for name in ("exp", "exp_neg"):
        np.testing.assert_allclose(of(name, subnormal), np.exp(subnormal), rtol=0, atol=5e-324)


def test_limits(library):
    inf = np.float32([np.inf, -np.inf, np.nan, 0.0])
    for name, truth in (("exp", np.exp), ("expm1", np.expm1), ("tanh", np.tanh)):
        np.testing.assert_array_equal(apply(library, name, inf), truth(inf))
    np.testing.assert_array_equal(apply(library, "normcdf", inf), [1, 0, np.nan, 0.5])
    np.testing.assert_array_equal(apply(library, "exp_neg", inf[1:]), np.exp(inf[1:]))
    with np.errstate(over="ignore"):
        big = np.float32([89.5, 1e4, -104.5, -1e4])
        np.testing.assert_array_equal(apply(library, "exp", big), np.exp(big))
    subnormal = np.float32([-88.0, -95.0, -103.0])
    for name in ("exp", "exp_neg"):
        got, want = apply(library, name, subnormal), np.exp(subnormal.astype(np.float64))
        np.testing.assert_allclose(got, want, rtol=0, atol=1.5e-45)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(apply(library, "sin", inf), np.sin(inf))


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    """The functions for GPUs, compiled for the CPU: those in double, in float, and approximate."""
    cxx = shutil.which("c++")
    if cxx is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("gpu")
    source = SOURCE.replace("functions.h", "approximate.h")
    short = source.replace("map_##name", "short_##name").replace("MAP(", "SHORT(")
    for name in ("exp", "exp_neg", "expm1", "normcdf"):
        short = short.replace(f" {name}(x", f" Approximate::{name}(x")
    short = short.replace(" exp(", " Approximate::exp(")
    (folder / "f.cpp").write_text("#include <cuda_runtime.h>\n" + source + IN_DOUBLE + short)
    subprocess.run(
        [cxx, "-std=c++20", "-O2", "-DFASTJAC_HOST_SHIM", "-Wno-attributes", "-shared", "-fPIC",
         f"-I{COMMON.parent.parent}/tests/shim", f"-I{COMMON}", f"-I{COMMON.parent}/cuda",
         str(folder / "f.cpp"), "-o", str(folder / "f.so")],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(folder / "f.so"))


def test_float_functions_of_the_gpu(gpu):
    """With a division and an exponential that are as wrong as PTX allows."""
    for name, truth, span, bound in (
        ("log1p", np.log1p, (0, 1), 5.0),
        ("tanh", np.tanh, (-10, 10), 3.0),
    ):
        x = points(*span)
        want = truth(x.astype(np.float64))
        ulp = np.spacing(np.abs(want).astype(np.float32)).astype(np.float64)
        error = np.abs(apply(gpu, name, x) - want) / ulp
        print(f"{name}: {error.max():.2f} ulp")
        assert error.max() <= bound
    x = points(-12.9, 12.9)
    error = np.abs(apply(gpu, "normcdf", x) / ndtr(x.astype(np.float64)) - 1)
    assert (error <= 5e-7 + np.square(x) * 6e-8).all()
    for limit in (1e1, 1e4, 2e6):
        x = points(-limit, limit)
        for name, truth in (("sin", np.sin), ("cos", np.cos)):
            assert np.abs(apply(gpu, name, x) - truth(x.astype(np.float64))).max() <= 1.1e-7
            assert np.abs(apply(gpu, name, np.float32([1e20, -3e38]))).max() <= 1
            assert np.isnan(apply(gpu, name, np.float32([np.inf, np.nan]))).all()


def test_approximate_functions_of_the_gpu(gpu):
    """The error of an exponential grows with its argument, which is rounded."""

    def error(name, truth, x):
        return np.abs(apply(gpu, name, x, prefix="short") / truth(x.astype(np.float64)) - 1)

    for name, x in (("exp_neg", points(-87, 0)), ("exp", points(-87, 88))):
        assert (error(name, np.exp, x) <= 3e-7 + np.abs(x) * 1.2e-7).all()
    x = points(-20, 20)
    assert error("expm1", np.expm1, x[x != 0]).max() <= 3e-6
    x = points(-12.9, 12.9)
    assert (error("normcdf", ndtr, x) <= 4e-6 + np.square(x) * 8e-8).all()


def test_limits_on_a_gpu(gpu):
    inf = np.float32([np.inf, -np.inf, np.nan, 0.0])
    for prefix in ("map", "short"):
        for name, truth in (("exp", np.exp), ("expm1", np.expm1), ("tanh", np.tanh)):
            np.testing.assert_array_equal(apply(gpu, name, inf, prefix=prefix), truth(inf))
        got = apply(
            gpu, "normcdf", np.float32([np.inf, -np.inf, np.nan, 3e38, -3e38]), prefix=prefix
        )
        np.testing.assert_array_equal(got, [1, 0, np.nan, 1, 0])


def test_double_sin_and_cos_of_the_gpu(gpu):
    """Within 3 eps of libm up to |x| = 1e5."""
    x = np.concatenate([np.linspace(-10, 10, 100_001), np.linspace(-1e5, 1e5, 100_001)])
    x = np.concatenate([x, [1e20, -1e300, np.inf, np.nan]])
    with np.errstate(invalid="ignore"):
        for name, truth in (("sin", np.sin(x)), ("cos", np.cos(x))):
            out = apply(gpu, name, x, np.float64)
            assert np.abs(out - truth)[:-4].max() <= 3 * np.finfo(float).eps
            assert np.abs(out[-4:-2]).max() <= 1 and np.isnan(out[-2:]).all()
