#!/bin/sh
# All checks and figures that need a GPU, in calls of under nine minutes each:
#
#   benchmarks/gpu.sh correctness      every kernel, the scan's gradients, the sampler, the whole back end
#   benchmarks/gpu.sh 1b               decoding: Llama-3.2-1B's shape and its students, random weights
#   benchmarks/gpu.sh 3b               the same for Llama-3.2-3B
#   benchmarks/gpu.sh hf-1b | hf-3b    `transformers` generate of the same teacher: static cache, compiled
#   benchmarks/gpu.sh train            the scan forward and backward, against torch and, where installed, fla
#   benchmarks/gpu.sh all              each of them in turn
#
# A second argument --dry takes tiny shapes, in Triton's interpreter where there is no GPU. Results go to
# benchmarks/results/gpu/STEP.json after every row; a call that runs out of time exits with 75 and goes on where it
# stopped when it is called again. Other places: OUT=directory. Another python: PYTHON=python3.
#
# Needs torch for CUDA, triton, numpy and safetensors; hf-* also transformers; nothing is downloaded. On a machine
# without a registry carry nothing but, if it is to be compared, the pure-Python wheels of fla-core and einops.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
step=${1:?correctness, 1b, 3b, hf-1b, hf-3b, train or all}
shift
if [ "$step" = all ]; then
    for each in correctness 1b 3b hf-1b hf-3b train; do "$0" "$each" "$@"; done
    exit
fi
export PYTHONPATH="$here/../src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
case " $* " in *" --dry "*) command -v nvidia-smi >/dev/null || export TRITON_INTERPRET=1 ;; esac
exec timeout 530 "${PYTHON:-python3}" "$here/gpu/main.py" "$step" --out "${OUT:-$here/results/gpu}" "$@"
