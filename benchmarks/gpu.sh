#!/usr/bin/env bash
# One command for a machine with a GPU, network or not: builds for that GPU, checks every op, runs
# the GPU tests and the benchmark, and leaves a report of each stage in a folder.
#
#   benchmarks/gpu.sh OUT [WHEELS]     WHEELS: a folder of wheels for what the machine lacks
#   DEVICE=cpu benchmarks/gpu.sh OUT   the dry run, where there is no GPU
#
# A stage that fails does not stop the next; the exit code is the number of stages that failed.
set -uo pipefail
cd "$(dirname "$0")/.."
py=$(command -v python || command -v python3)
out=${1:?usage: benchmarks/gpu.sh OUT [WHEELS]}
wheels=${2:-}
device=${DEVICE:-cuda}
mkdir -p "$out"
out=$(cd "$out" && pwd)
failed=0

stage() { # name, command: its output to OUT/name.log, its verdict to the terminal
  local name=$1 begun=$SECONDS
  shift
  if "$@" >"$out/$name.log" 2>&1; then
    echo "ok      $name ($((SECONDS - begun)) s)"
  else
    echo "FAILED  $name ($((SECONDS - begun)) s): $(tail -n 1 "$out/$name.log")"
    failed=$((failed + 1))
  fi
}

install() {
  if [ -n "$wheels" ]; then
    "$py" -m pip install --no-index --no-deps "$wheels"/*.whl || return
  fi
  if [ "$device" = cuda ]; then
    TORCH_CUDA_ARCH_LIST=$("$py" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
    export TORCH_CUDA_ARCH_LIST FASTJAC_CUDA=1
  fi
  "$py" -m pip install --no-build-isolation --no-deps -e .
}

sanitize() { # the kernels at small sizes under compute-sanitizer, where it is there
  local checker=(compute-sanitizer --error-exitcode 9)
  [ "$device" = cuda ] || checker=(env)
  command -v "${checker[0]}" >/dev/null || { echo "compute-sanitizer not found"; return 0; }
  "${checker[@]}" "$py" -c '
import sys, torch, fastjac
from fastjac.activations import TABLE
device = sys.argv[1]
torch.set_default_device(device)
impl = "cuda" if device == "cuda" else "auto"
for fn in TABLE:
    for dtype in (torch.float32, torch.bfloat16):
        z = torch.randn(1237, dtype=dtype)[1:].requires_grad_()
        (d,) = torch.autograd.grad(fastjac.act(z, fn=fn, impl=impl).sum(), z, create_graph=True)
        torch.autograd.grad(d.sum(), z, materialize_grads=True)
        for shape, dim in (((37, 130), 1), ((5, 33, 7), 1), ((5, 7, 33), 2), ((3, 5000), 1)):
            for per in ("channel", "sample"):
                z = torch.randn(shape, dtype=dtype).requires_grad_()
                a, s = fastjac.act_stats(z, fn, dim=dim, per=per, impl=impl)
                torch.autograd.grad((a.sum(), s.sum()), z)
    for n, m in ((5, 10), (3, 1500)):
        z, y = torch.randn(n, m).requires_grad_(), torch.arange(n)
        torch.autograd.grad(fastjac.softmax_residual(z, y, impl=impl).sum(), z)
    w = [torch.randn(s).requires_grad_() for s in ((33, 7), (5, 4, 3, 3), (2, 5000))]
    torch.autograd.grad(torch.cat(fastjac.row_sqnorm(w, impl=impl)).sum(), w)
if device == "cuda":
    torch.cuda.synchronize()' "$device"
}

plots() { # from the records; where matplotlib is missing, draw them elsewhere from bench.csv
  "$py" -c 'import matplotlib' 2>/dev/null || { echo "matplotlib not found"; return 0; }
  "$py" -m fastjac.cli bench --from "$out/bench.csv" --plot "$out/pictures"
}

bench() { # seconds, further options: the records to OUT/bench.csv
  timeout "$1" "$py" -m fastjac.cli bench --device "$device" --csv "$out/bench.csv" "${@:2}"
}

# What layer-wise penalties should show: act_stats at 90% of the copy bandwidth, the feed-forward
# step at 1.03 of the plain one, as many kernels beyond plain's for six layers as for two.
layerwise=(--case "act-stats-*" --case dreg-feed-forward --case "dreg-launches-*" --keep-going
  --contestant eager --contestant fastjac --contestant fastjac:cuda --contestant fastjac:triton)

# The dry run reads every line that a GPU would, on the smallest work that does.
if [ "$device" = cuda ]; then
  pytest=() bench=(--quick)
else
  pytest=(--collect-only) bench=(--case spectreg-mlp-b100-w64 --contestant fastjac)
  layerwise=(--case dreg-launches-2)
fi

stage install install
stage info "$py" -m fastjac.cli info --json "$out/info.json"
stage check "$py" -m fastjac.cli check --device "$device" --json "$out/check.json"
stage tests "$py" -m pytest -q -x "${pytest[@]}" tests/test_act.py tests/test_nn.py \
  tests/test_act_stats.py tests/test_row_sqnorm.py tests/test_softmax_residual.py \
  tests/test_attach.py tests/test_attach_life.py tests/test_attach_traps.py \
  tests/test_batch_norm.py -m "not slow"
stage sanitize sanitize
stage layerwise-bfloat16 bench 120 "${layerwise[@]}" --dtype bfloat16
stage layerwise-float32 bench 120 "${layerwise[@]}"
stage bench bench 280 "${bench[@]}" --json "$out/bench.json"
stage plots plots
exit "$failed"
