#!/usr/bin/env bash
# Makes .venv with everything MaxDraft needs. A second call with nothing changed returns at once.
#   bash setup.sh                    CPU, or the device of the setup before
#   DEVICE=cpu bash setup.sh         CPU again
#   DEVICE=tpu bash setup.sh         a TPU host
#   DEVICE=cuda bash setup.sh        an NVIDIA GPU (CUDA 13 driver)
#   PYTHON=python3.12 bash setup.sh  another interpreter than python3
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

stamp=.venv/maxdraft-setup
# Without DEVICE the device of the last setup stays: the README's commands begin with a plain call.
device=${DEVICE:-}
if [ -z "$device" ] && [ -f "$stamp" ]; then read -r device _ < "$stamp"; fi
device=${device:-cpu}
python=${PYTHON:-python3}
case $device in
  cpu) jax='jax' ;;
  tpu) jax='jax[tpu]' ;;
  cuda) jax='jax[cuda13]' ;;
  *) echo "setup.sh: DEVICE=$device is not known; use cpu, tpu or cuda" >&2; exit 2 ;;
esac
if ! command -v "$python" >/dev/null; then
  echo "setup.sh: there is no '$python'; install Python 3.11 or newer, or set PYTHON=/path/to/python3" >&2
  exit 2
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "setup.sh: $python is $("$python" -V); MaxDraft needs 3.11 or newer (set PYTHON=/path/to/python3)" >&2
  exit 2
fi

want="$device $("$python" -V) $(cat requirements.txt)"
if [ -x .venv/bin/python3 ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
  exit 0
fi

echo "setup.sh: installing into .venv for DEVICE=$device"
if ! "$python" -m venv --clear .venv; then
  echo "setup.sh: could not make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
  exit 2
fi
.venv/bin/python3 -m pip install --quiet --disable-pip-version-check -r requirements.txt "$jax"
printf '%s\n' "$want" > "$stamp"
echo "setup.sh: done"
