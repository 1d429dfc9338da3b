#!/usr/bin/env bash
# The whole story on the embedded default: target -> train, stop, go on, kill, damage, go on -> evaluate -> export.
#   bash end_to_end/test_tiny.sh
#   TARGET=/models/Qwen3-8B MODEL_NAME=qwen3-8b DATA=sharegpt.jsonl BASE_OUTPUT_DIRECTORY=/runs bash ...
# Exit status 0: everything held.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python3}
output=${BASE_OUTPUT_DIRECTORY:-$(mktemp -d)}
keys=(base_output_directory="$output" run_name=end_to_end checkpoint_period=20)
if [ -n "${TARGET:-}" ]; then
  keys+=(model_name="${MODEL_NAME:?the file in configs/models/}" target_path="$TARGET"
         grain_train_files="${DATA:?a JSONL file of conversations}" steps="${STEPS:-100}")
fi
run="$output/end_to_end"

# Trains until the checkpoint of a step is complete, sends a signal, and compares the exit status.
train_until() {
  local step=$1 signal=$2 expected=$3 status=0
  "$python" MaxDraft/train.py configs/base.yml "${keys[@]}" &
  local trainer=$!
  until [ -d "$run/checkpoints/$step" ]; do  # it has this name once it is complete
    kill -0 $trainer || { echo "FAILED: training ended before its checkpoint $step"; exit 1; }
    sleep 0.2
  done
  kill -"$signal" $trainer
  wait $trainer || status=$?
  [ $status = "$expected" ] || { echo "FAILED: exit status $status after $signal, not $expected"; exit 1; }
}

echo "--- train, and stop after the first checkpoint: everything is saved, exit status 42"
train_until 20 TERM 42

echo "--- the same command goes on, and is killed after the next checkpoint"
train_until 40 KILL 137

echo "--- one bit of the newest checkpoint flips"
newest=$(ls "$run/checkpoints" | grep -x '[0-9]*' | sort -n | tail -1)
"$python" - "$run/checkpoints/$newest/params" <<'PYTHON'
import pathlib, sys
file = max((p for p in pathlib.Path(sys.argv[1]).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
content = bytearray(file.read_bytes())
content[len(content) // 2] ^= 1
file.write_bytes(bytes(content))
PYTHON

echo "--- the same command goes on from the checkpoint before"
"$python" MaxDraft/train.py configs/base.yml "${keys[@]}" | tee "$output/log"
grep -q "checkpoint $newest is damaged" "$output/log"
grep -q "resuming after step" "$output/log"

echo "--- evaluate with longer chains, export elsewhere"
place=(base_output_directory="$output" run_name=end_to_end)
"$python" MaxDraft/evaluate.py configs/base.yml "${place[@]}" decode_draft_steps=4
"$python" MaxDraft/export.py configs/base.yml "${place[@]}" export_path="$output/head"

"$python" - "$run" "$output/head" <<'PYTHON'
import json, pathlib, sys
run, head = map(pathlib.Path, sys.argv[1:])
evaluation = json.loads((run / "evaluation.json").read_text())
assert evaluation["lossless"], evaluation["unequal_replies"]
assert evaluation["accept_length"] > 1.2 * evaluation["accept_length_untrained"], evaluation
steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
assert steps[-1]["loss"] < steps[0]["loss"]
assert (head / "model.safetensors").exists() and (head / "config.json").exists()
print("PASSED: accept_length", round(evaluation["accept_length"], 2))
PYTHON
