#!/usr/bin/env bash
# Makes the environment of the NDIF test server: tests/remote/make_env.sh VENV_DIR
#
# It must not hold steerlens: what the server runs has to arrive with the request. Does nothing when it is made already
# by this same script and the same Python. About a minute, 1.6 GB.
# PYTHON: of the same minor version as the client's; some of what travels is bytecode.
set -euo pipefail

if [ $# -ne 1 ]; then
  echo "usage: $0 VENV_DIR" >&2
  exit 2
fi
venv=$1
python=${PYTHON:-python3}
stamp=$venv/ready
recipe="$(cksum <"$0") $("$python" -V)"
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
  touch "$stamp" # make compares times
  exit 0
fi

rm -rf "$venv"
"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install -q)
# first: a later line would bring another version, with several GB of CUDA
"${pip[@]}" torch==2.13.0
# transformers 5.23 breaks nnsight's models without weights, which the server's sandbox builds too
"${pip[@]}" nnsight==0.8.1 "transformers>=5.15,<5.23" pydantic redis click python-dotenv pyyaml boto3 fastapi \
  "uvicorn[standard]" gunicorn python-multipart "ray[default]==2.60.0" accelerate numpy zstandard peft
# It asks for Python 3.12 and runs on 3.11. Apart from the others, because the flag would let pip choose a numpy that this
# Python cannot load.
"${pip[@]}" --no-deps --ignore-requires-python ndif==0.1.2

if "$venv/bin/python" -m pip show -q steerlens 2>/dev/null; then
  echo "steerlens must not be in $venv" >&2
  exit 1
fi
printf '%s\n' "$recipe" >"$stamp"
