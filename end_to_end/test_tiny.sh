#!/usr/bin/env bash
# The whole story on the embedded default: target -> train -> interrupt -> resume -> evaluate -> export.
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

echo "--- train, and stop after the first checkpoint"
"$python" MaxDraft/train.py configs/base.yml "${keys[@]}" &
trainer=$!
until compgen -G "$run/checkpoints/20/*" >/dev/null; do
  kill -0 $trainer || { echo "FAILED: training ended before its first checkpoint"; exit 1; }
  sleep 1
done
kill -TERM $trainer
status=0; wait $trainer || status=$?
[ $status = 42 ] || { echo "FAILED: exit status $status after SIGTERM, not 42"; exit 1; }

echo "--- the same command goes on"
"$python" MaxDraft/train.py configs/base.yml "${keys[@]}" | tee "$output/log"
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
