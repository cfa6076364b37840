#!/usr/bin/env bash
# Pretrain on several machines: run this on each of them, with the same settings and its own --node-rank.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: launch/several_machines.sh --nodes N --node-rank R --head HOST [--port P] [--devices D] [--interface I] [SETTING=VALUE ...]

on each of two machines, with the same out= in a folder that both see:

    launch/several_machines.sh --nodes 2 --node-rank 0 --head node0 method=mae model=vit_b out=/shared/runs/mae
    launch/several_machines.sh --nodes 2 --node-rank 1 --head node0 method=mae model=vit_b out=/shared/runs/mae

    --nodes N        how many machines there are
    --node-rank R    which of them this is, from 0; the first is the head
    --head HOST      the head's name or address, as the others reach it
    --port P         the first of ten free ports on the head (default 29500)
    --devices D      processes on this machine (default: one per GPU, one where there is none)
    --interface I    the network interface that the machines share, such as eth0; needed where a machine's own name
                     resolves to a loopback address
    PYTHON=...       the interpreter (default: the repository's .venv)

It may be called from any folder. A process that is lost takes the others with it; each machine starts its own again
and the run goes on from its last checkpoint. Where a whole machine was lost, start the script on every machine again.
USAGE
}

fail() {
    echo "$1; see launch/several_machines.sh --help" >&2
    exit 1
}

nodes= node_rank= head= port=29500 devices= interface=
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help) usage; exit 0 ;;
    --nodes | --node-rank | --head | --port | --devices | --interface)
        [ $# -gt 1 ] || fail "$1 needs a value"
        name=${1#--}
        printf -v "${name//-/_}" %s "$2"
        shift 2
        ;;
    --*) fail "$1 is not an option" ;;
    *) break ;;
    esac
done
[ -n "$nodes" ] || fail "--nodes is missing"
[ -n "$node_rank" ] || fail "--node-rank is missing"
[ -n "$head" ] || fail "--head is missing"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
if ! command -v "$python" >/dev/null; then
    echo "$python is not there: run make setup in $root, or set PYTHON to an interpreter that has torch" >&2
    exit 1
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export NODE_RANK="$node_rank" MASTER_ADDR="$head" MASTER_PORT="$port"
if [ -n "$interface" ]; then
    export GLOO_SOCKET_IFNAME="$interface" NCCL_SOCKET_IFNAME="$interface"
fi
exec "$python" -m ssl.pretrain launch.nodes="$nodes" ${devices:+trainer.devices="$devices"} "$@"
