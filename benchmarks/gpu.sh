#!/usr/bin/env bash
# A quarter of an hour on a GPU: correctness, kernels, host costs and steps, in layers. Each layer
# leaves its evidence in OUT the moment it exists, and a layer that hangs or crashes costs itself.
#
#   benchmarks/gpu.sh OUT             the run, 8 minutes
#   benchmarks/gpu.sh OUT sanitize    a second call, 3 minutes: memcheck, racecheck, ncu
#   python -m benchmarks.gpu.report OUT [OUT2]    the page, benchmarks/gpu/README.md, from both
#
# Variables: DEVICE=cpu is the dry run, which runs every stage at small sizes (the tools of the
# second call run nothing but their programs). STAGES="ops kernels" runs only these. PYTHON names
# the interpreter; the default is python3. Nothing is installed: the library runs from the checkout.
#
# What to do for a machine that is lent for 15 minutes, start included:
#
# 1. Beforehand, on any machine with nvcc:
#      FASTJAC_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 python setup.py build_ext --inplace
#      DEVICE=cpu benchmarks/gpu.sh "$(mktemp -d)"
#      DEVICE=cpu benchmarks/gpu.sh "$(mktemp -d)" sanitize
# 2. Carry these four ignored files with the checkout:
#      fastjac/_cpu.so fastjac/_cuda.so fastjac/_build.json fastjac/kernels/_phi.py
#    Without them, or if they do not load, the run builds them beside the stages that need none.
# 3. First command, limit 540 s: benchmarks/gpu.sh $OUT. Copy its files away: the next call empties
#    the folder.
# 4. Second command, at once and with the same files carried, limit 200 s:
#      benchmarks/gpu.sh $OUT sanitize
# 5. Give the machine back. Here: python -m benchmarks.gpu.report FIRST SECOND, read the page, commit
#    benchmarks/gpu/.
#
# The eight files of the first call. A .jsonl file has one JSON object a line (benchmarks/gpu/work.py):
#
#   file            what                                             stage            until
#   run.jsonl       versions, ceilings, the verdict of each stage    machine           40 s
#   ops.jsonl       CUDA ops x 3 activations x 4 dtypes, against
#                   float64                                          ops               75 s
#   checks.jsonl    Triton, the same and further activations         checks           180 s
#   tests.jsonl     chain, DREG and op tests, matrix of ways         tests, matrix    180 s
#   kernels.jsonl   GB/s and % of copy, CUDA, Triton, eager          kernels          290 s
#   host.jsonl      launches and host µs per call: the suite host,
#                   eager and in graphs, and ops                     host             325 s
#   steps.jsonl     plain, eager, fastjac; in graphs; compiled       steps            480 s
#   log.txt         what all stages print
#
# checks, tests and matrix run at the same time; nothing else runs beside a stage that measures time.
# The five of the second call: run.jsonl, log.txt, memcheck.txt, racecheck.txt, ncu.csv.
#
# The exit code is 1 if a stage failed, was killed, or found something that is not right.
set -euo pipefail
usage="usage: [DEVICE=cpu] [STAGES='ops kernels'] benchmarks/gpu.sh OUT [sanitize]"
out=$(realpath -m "${1:?$usage}")
[ "${2:-sanitize}" = sanitize ] || { echo "$usage" >&2; exit 2; }
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.gpu.run "$out" "${@:2}"
