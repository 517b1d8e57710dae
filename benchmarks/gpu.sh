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
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer not found"; return 0; }
  compute-sanitizer --error-exitcode 9 "$py" -c '
import torch, fastjac
from fastjac.activations import TABLE
for fn in TABLE:
    for dtype in (torch.float32, torch.bfloat16):
        z = torch.randn(1237, device="cuda", dtype=dtype)[1:].requires_grad_()
        (d,) = torch.autograd.grad(fastjac.act(z, fn=fn, impl="cuda").sum(), z, create_graph=True)
        torch.autograd.grad(d.sum(), z, materialize_grads=True)
        for shape, dim in (((37, 130), 1), ((5, 33, 7), 1), ((5, 7, 33), 2), ((3, 5000), 1)):
            for per in ("channel", "sample"):
                z = torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()
                a, s = fastjac.act_stats(z, fn, dim=dim, per=per, impl="cuda")
                torch.autograd.grad((a.sum(), s.sum()), z)
    for n, m in ((5, 10), (3, 1500)):
        z, y = torch.randn(n, m, device="cuda").requires_grad_(), torch.arange(n, device="cuda")
        torch.autograd.grad(fastjac.softmax_residual(z, y, impl="cuda").sum(), z)
    w = [torch.randn(s, device="cuda").requires_grad_() for s in ((33, 7), (5, 4, 3, 3), (2, 5000))]
    torch.autograd.grad(torch.cat(fastjac.row_sqnorm(w, impl="cuda")).sum(), w)
torch.cuda.synchronize()'
}

stage install install
stage info "$py" -m fastjac.cli info --json "$out/info.json"
stage check "$py" -m fastjac.cli check --device "$device" --json "$out/check.json"
stage tests "$py" -m pytest -q -x tests/test_act.py tests/test_nn.py tests/test_act_stats.py \
  tests/test_row_sqnorm.py tests/test_softmax_residual.py tests/test_attach.py \
  tests/test_attach_life.py tests/test_attach_traps.py tests/test_batch_norm.py -m "not slow"
[ "$device" = cuda ] && stage sanitize sanitize
stage layerwise timeout 120 "$py" benchmarks/layerwise_gpu.py --device "$device" \
  --json "$out/layerwise.json"
stage bench timeout 280 "$py" -m fastjac.cli bench --quick --device "$device" \
  --json "$out/bench.json" --csv "$out/bench.csv"
exit "$failed"
