#!/usr/bin/env bash
# A head for a small random target of each family: train -> interrupt -> resume -> evaluate -> export.
#   bash end_to_end/test_families.sh
#   FAMILIES="gpt_oss llama4 gemma3" BASE_OUTPUT_DIRECTORY=/runs bash end_to_end/test_families.sh
# DeepSeek-V3's target is FP8 and gpt-oss' is MXFP4, as they are published; where +keep follows the
# family, they stay so in memory, else they are dequantized. With +bf16 everything is computed and
# held in bfloat16, as on a TPU; else in float32. Exit status 0: everything held.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python3}
output=${BASE_OUTPUT_DIRECTORY:-$(mktemp -d)}
families=${FAMILIES:-qwen3_moe qwen3_moe+bf16 deepseek_v3 deepseek_v3+keep glm4_moe_lite gpt_oss+keep llama4 gemma3}
mkdir -p "$output"
: > "$output/passed"

for family in $families; do
  began=$SECONDS
  run="$output/$family"
  rm -rf "$run" "$output/made/$family"
  "$python" end_to_end/make_target.py "${family%%+*}" "$output/made/$family"
  keep=dequantize
  [[ "$family" = *+keep* ]] && keep=keep_quantized
  dtype=float32
  [[ "$family" = *+bf16* ]] && dtype=bfloat16
  place=(base_output_directory="$output" run_name="$family")
  keys=("${place[@]}" target_path="$output/made/$family/target" target_quantization=$keep
        grain_train_files="$output/made/$family/conversations.jsonl" max_target_length=128
        steps=60 checkpoint_period=20 eval_interval=-1 ttt_length=3 draft_vocab_size=384
        learning_rate=5e-3 decode_num_prompts=6 decode_max_new_tokens=24 decode_temperature=0
        matmul_precision=highest dtype=$dtype weight_dtype=$dtype enable_tensorboard=False jax_cache_dir="$output/jax-cache")

  echo "--- $family: train, and stop after the first checkpoint"
  "$python" MaxDraft/train.py configs/base.yml "${keys[@]}" &
  trainer=$!
  until compgen -G "$run/checkpoints/20/*" >/dev/null; do
    kill -0 $trainer 2>/dev/null || { echo "FAILED: $family ended before its first checkpoint"; exit 1; }
    sleep 0.2
  done
  kill -TERM $trainer
  status=0; wait $trainer || status=$?
  [ $status = 42 ] || { echo "FAILED: $family, exit status $status after SIGTERM, not 42"; exit 1; }

  echo "--- $family: the same command goes on"
  "$python" MaxDraft/train.py configs/base.yml "${keys[@]}" | tee "$output/$family.log"
  grep -q "resuming after step" "$output/$family.log"

  echo "--- $family: evaluate with shorter chains, export elsewhere"
  "$python" MaxDraft/evaluate.py configs/base.yml "${place[@]}" decode_draft_steps=2
  "$python" MaxDraft/export.py configs/base.yml "${place[@]}" export_path="$output/heads/$family"

  "$python" - "$family" "$run" "$output/heads/$family" $((SECONDS - began)) <<'PYTHON' | tee -a "$output/passed"
import json, pathlib, sys
family, (run, head), seconds = sys.argv[1], map(pathlib.Path, sys.argv[2:4]), sys.argv[4]
evaluation = json.loads((run / "evaluation.json").read_text())
assert evaluation["lossless"], evaluation["unequal_replies"]
assert evaluation["accept_length"] > 1.05 * evaluation["accept_length_untrained"], evaluation
steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
losses = [step["loss"] for step in steps if "loss" in step]
assert losses[-1] < 0.9 * losses[0], losses
assert (head / "model.safetensors").exists() and (head / "config.json").exists()
print(
    f"PASSED {family:16} {steps[-1]['step']} steps, loss {losses[0]:.2f} -> {losses[-1]:.2f}, "
    f"accept_length {evaluation['accept_length']:.2f} (untrained "
    f"{evaluation['accept_length_untrained']:.2f}), lossless, exported; {seconds} s"
)
PYTHON
done
echo; echo "all families:"; cat "$output/passed"
