#!/usr/bin/env bash
# Sourced by train.sh and test.sh: find or make a Python environment and install the project into it, once per change of
# its requirements. Usage: source scripts/environment.sh [extra]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra="${1:-}"

if [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then
  base="${PYTHON:-python3}"
  if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "moetrain needs Python 3.11 or newer; $base is $("$base" --version 2>&1). Set PYTHON=/path/to/python3.11" >&2
    exit 2
  fi
  [[ -x .venv/bin/python ]] || "$base" -m venv .venv
  PATH="$PWD/.venv/bin:$PATH"
  export VIRTUAL_ENV="$PWD/.venv" PATH
fi

# The stamp makes a second run quick: it names what was installed, from where, and with which extra.
stamp="$(python -c 'import sys; print(sys.prefix)')/.moetrain-${extra:-base}-$(
  { pwd; cat pyproject.toml constraints.txt; } | sha256sum | cut -c1-16
)"
if [[ ! -e "$stamp" ]]; then
  echo "installing moetrain${extra:+[$extra]} into $(python -c 'import sys; print(sys.prefix)')"
  python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extra:+[$extra]}"
  touch "$stamp"
fi
