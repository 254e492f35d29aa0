#!/usr/bin/env bash
# The environment of the NDIF test server: tests/remote/make_env.sh VENV_DIR
# It must not hold steerlens: what the server runs has to arrive with the request.
# PYTHON: 3.11, so that client and server read the same bytecode. About a minute and 1.7 GB.
set -euo pipefail

if [ $# -ne 1 ]; then
  echo "usage: $0 VENV_DIR" >&2
  exit 2
fi
venv=$1
python=${PYTHON:-python3.11}
stamp=$venv/ready
recipe=$(cksum <"$0")

# Written to the stamp, so that a changed pin makes the environment anew
export PIP_DISABLE_PIP_VERSION_CHECK=1

if ! command -v redis-server >/dev/null; then
  if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends redis-server >/dev/null
  else
    echo "redis-server is missing: sudo apt-get install redis-server (or: brew install redis)" >&2
    exit 1
  fi
fi

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$recipe" ]; then
  exit 0
fi

rm -rf "$venv"
"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install -q)
# first, or a later line would bring the CUDA build, several GB
"${pip[@]}" torch==2.13.0
# transformers 5.23 breaks nnsight's undispatched models, which the server's sandbox builds too
"${pip[@]}" nnsight==0.8.1 "transformers>=5.15,<5.23" pydantic redis click python-dotenv pyyaml boto3 fastapi \
  "uvicorn[standard]" gunicorn python-multipart "ray[default]==2.60.0" accelerate numpy zstandard peft
# it asks for Python 3.12 but runs on 3.11; without --no-deps the flag would also apply to numpy and break it
"${pip[@]}" --no-deps --ignore-requires-python ndif==0.1.2

if "$venv/bin/python" -m pip show -q steerlens 2>/dev/null; then
  echo "steerlens must not be installed in $venv" >&2
  exit 1
fi
printf '%s\n' "$recipe" >"$stamp"
