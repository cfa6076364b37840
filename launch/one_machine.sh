#!/usr/bin/env bash
# Pretrain on every GPU of this machine, one process each; arguments go to ssl.pretrain as they are.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: launch/one_machine.sh [SETTING=VALUE ...]

    launch/one_machine.sh method=mae model=vit_b data=folder data.root=/my/photos

It may be called from any folder; relative paths and runs/ are those of the folder it is called from.
    CUDA_VISIBLE_DEVICES=0,1   take only these GPUs
    NPROC=2                    start this many processes (default: one per GPU, one where there is none)
    PYTHON=...                 the interpreter (default: the repository's .venv)

It is short for: PYTHONPATH=ROOT python -m ssl.pretrain [trainer.devices=NPROC] SETTING=VALUE ...
USAGE
}

case "${1:-}" in -h | --help) usage; exit 0 ;; esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

python=${PYTHON:-$root/.venv/bin/python}
if ! command -v "$python" >/dev/null; then
    echo "$python is not there: run make setup in $root, or set PYTHON to an interpreter that has torch" >&2
    exit 1
fi
exec "$python" -m ssl.pretrain ${NPROC:+trainer.devices="$NPROC"} "$@"
