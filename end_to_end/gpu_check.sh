#!/usr/bin/env bash
# Measures the training step on the chip that is here: an NVIDIA GPU or a TPU, in eight minutes.
#
#     bash end_to_end/gpu_check.sh [FOLDER]        results go to FOLDER, by default chip-check
#
# A bare image with jax, optax and pyyaml is enough; nothing is downloaded. Weights and tokens are
# random, dimensions those of Llama-3.1-8B (MODEL=llama3.2-3b takes another model file of
# configs/models). On a CPU the same runs with small dimensions, to try the script itself.
#
#     1  each implementation of attention against dense attention: outputs and gradients
#     2  a step at T = 2,048 and at T = 16,384 with each: seconds, its parts, tokens a second, bytes,
#        and the FLOP/s that products of matrices reach beside it
#     3  the largest batch that fits
#
# Each part has its own time limit, so that one that fails or hangs costs only itself.
# FOLDER/result.json has all numbers, FOLDER/table.txt what is printed at the end, FOLDER/*.log what
# each part printed.
set -uo pipefail
cd "$(dirname "$0")/.."

folder=${1:-chip-check}
python=${PYTHON:-$([ -x .venv/bin/python3 ] && echo .venv/bin/python3 || echo python3)}
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) || exit 2
rm -f "$folder"/*.json "$folder"/*.log "$folder"/*.exit "$folder"/table.txt

# part NAME SECONDS COMMAND..: runs the command for so long at most; its exit status goes to a file.
part() {
  local name=$1 seconds=$2
  shift 2
  echo "$name (at most $seconds s)"
  timeout --kill-after=5 "$seconds" "$@" >"$folder/$name.log" 2>&1
  echo $? >"$folder/$name.exit"
}

part device 60 "$python" end_to_end/gpu_check.py device "$folder/device.json"
grep -q '"platform": "cpu"' "$folder/device.json" && on_cpu=yes || on_cpu=

if [ "$on_cpu" ]; then
  # Programs that run a few times only are compiled faster than well.
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_backend_optimization_level=0"
  XLA_FLAGS+=" --xla_llvm_disable_expensive_passes=true"
  keys=(dtype=float32 weight_dtype=float32 ttt_length=3 attention_block_size=32
    rollout_block_size=64)
  lengths="64 128" tokens=128 implementations=blockwise steps=2
  step_limit=180 batch_limit=180 equality_limit=180  # other work may share the cores
else
  keys=(model_name="${MODEL:-llama3.1-8b}")
  lengths="2048 16384" tokens=16384 implementations="blockwise pallas" steps=5
  step_limit=75 batch_limit=55 equality_limit=55  # and 60 for the devices
fi
keys+=(gradient_accumulation_steps=1)

part equality $equality_limit "$python" end_to_end/gpu_check.py equality "$folder/equality.json"
for length in $lengths; do
  for attention in $implementations; do
    part "step-$length-$attention" $step_limit "$python" MaxDraft/benchmark.py configs/base.yml \
      "${keys[@]}" max_target_length="$length" per_device_batch_size=$((tokens / length)) \
      attention="$attention" --steps $steps --json "$folder/step-$length-$attention.json"
  done
done
part largest_batch $batch_limit "$python" end_to_end/gpu_check.py largest_batch \
  "$folder/largest_batch.json" configs/base.yml "${keys[@]}" max_target_length="${lengths%% *}"

exec "$python" end_to_end/gpu_check.py report "$folder"
