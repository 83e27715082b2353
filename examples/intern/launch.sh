# Starts a script on every device of one or more nodes. The recipes beside this file source it and call `launch`.
#
#   NPROC=4              processes on this node (default: every device that DeepSpeed finds)
#   HOSTFILE=hosts       several nodes by DeepSpeed's launcher over ssh; lines of `name slots=8`;
#                        what the other nodes need in their environment stands in ./.deepspeed_env, as NAME=value
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 NPROC=8     several nodes by torchrun, started once on each (srun, a job script)
#   MASTER_PORT=29500    change it when two runs share a machine
#   RESTARTS=3           start again up to three times, with --auto-resume, when a process or a node is lost
#
# On an NPU machine, first: source /usr/local/Ascend/ascend-toolkit/set_env.sh

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}    # threads per process; on a CPU the processes share the cores
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}  # lets tensor-parallel communication overlap on a GPU
export PYTHONUNBUFFERED=1                       # log lines come as they are made
RECIPE=$(printf '%q ' bash "$0" "$@")            # what was typed, for the line that says how to continue
export RECIPE=${RECIPE% }
MASTER_PORT=${MASTER_PORT:-29500}

launch() {  # launch SCRIPT FLAGS...
    local starter
    if [ "${NNODES:-1}" -gt 1 ] && [ -z "${HOSTFILE:-}" ]; then
        : "${NODE_RANK:?NNODES=$NNODES needs NODE_RANK (0, 1, ...) on every node, or a HOSTFILE}"
        : "${MASTER_ADDR:?NNODES=$NNODES needs MASTER_ADDR, the name of node 0}"
        : "${NPROC:?NNODES=$NNODES needs NPROC, the processes per node}"
        starter=(torchrun --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$NPROC"
            --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --)
    else
        starter=(deepspeed --no_local_rank --master_port "$MASTER_PORT" ${QUIET:+--log_level critical}
            ${HOSTFILE:+--hostfile "$HOSTFILE"} ${NNODES:+--num_nodes "$NNODES"} ${NPROC:+--num_accelerators "$NPROC"})
    fi
    again "${starter[@]}" "$@"
}

launch_quietly() {  # launch_quietly SCRIPT FLAGS...: of which stdout is the answer; one process needs no launcher
    if [ "${NPROC:-}" = 1 ] && [ "${NNODES:-1}" = 1 ] && [ -z "${HOSTFILE:-}" ]; then exec python "$@"; fi
    QUIET=yes launch "$@"
}

again() {  # again COMMAND...: starts it, and up to RESTARTS times again, unless it ends well, by the user's mistake or by a signal
    local left=${RESTARTS:-0} code own asked= early= interrupted= heard= apart= guard=
    EXIT_CODE_FILE=$(mktemp)                    # where a rank leaves its code: torchrun makes every one of them 1
    export EXIT_CODE_FILE
    trap 'asked=yes; pass_on TERM' TERM INT
    trap 'asked=yes; pass_on USR1' USR1
    if [ -n "${QUIET:-}" ]; then                # Ctrl-C may end an answer only: it is for the ranks, and would end a launcher
        apart=setsid left=0                     # Ctrl-Z, though, stops this shell alone
        trap 'pass_on INT' INT
        trap 'asked=yes; pass_on TERM' TERM HUP
        guard=$(guard)
    fi
    while :; do
        : > "$EXIT_CODE_FILE"
        $apart "$@" <&0 &  # which would else have no stdin
        child=$!
        [ -z "$early" ] || kill -s TERM "$child" || true  # asked for between two commands of this shell
        code=0
        wait "$child" || code=$?
        while kill -0 "$child" 2>/dev/null; do code=0; wait "$child" || code=$?; done  # a signal ends `wait`, not the child
        own=0; wait "$child" 2>/dev/null || own=$?  # of a child that a signal ended in the meantime; 127: it is known already
        [ "$own" = 127 ] || code=$own
        if [ "$code" = 1 ] && [ -s "$EXIT_CODE_FILE" ]; then code=$(cat "$EXIT_CODE_FILE"); fi
        [ -z "$early" ] || end_all "$EXIT_CODE_FILE"
        # the first rank that leaves on Ctrl-C may take another down with it: 241 and 250 are DeepSpeed's for SIGTERM and SIGABRT
        case "$code${heard:+ $((SECONDS - heard < 10))}" in "241 1" | "250 1") code=130 ;; esac
        if [ -n "$interrupted" ]; then echo interrupted >&2; code=130; fi
        case "$code$asked" in 0 | 2 | 75 | *yes) left=0 ;; esac
        [ "$left" -gt 0 ] || { rm -f "$EXIT_CODE_FILE"; kill -- ${guard:+"-$guard"} 2>/dev/null || true; exit "$code"; }
        echo "ended with code $code; starts again ($left left)" >&2
        left=$((left - 1))
        case " $* " in *" --auto-resume "*) ;; *) set -- "$@" --auto-resume ;; esac
    done
}

pass_on() {  # pass_on SIGNAL: to the ranks, which save and leave; a launcher would leave them alone, or kill them too early
    local orders=() order                       # all of them first: what a rank catches changes as the others leave
    if [ -n "${HOSTFILE:-}" ] && [ "$1" = USR1 ]; then
        echo "the ranks of a HOSTFILE are out of reach of signals: send it to one of them, on its node" >&2
        asked=                                  # nothing was stopped: RESTARTS goes on
        return
    fi
    orders_for "${!:-}" "$1"                    # not $child, which is set a moment after the start
    # shellcheck disable=SC2086  # an order is two words
    for order in "${orders[@]}"; do kill -s $order || true; done
    if [ "$1" = INT ]; then case " ${orders[*]} " in *"INT "*) heard=$SECONDS ;; *) interrupted=yes ;; esac; fi
    if [ "${#orders[@]}" = 0 ]; then            # still starting, or the ranks are on other nodes
        early=yes
        kill -s TERM "${!:-}" 2>/dev/null || true
    fi
}

end_all() {  # end_all FILE: ends what has this EXIT_CODE_FILE in its environment, also what has lost its parent or is just starting
    local signal=TERM left turn
    for turn in {1..200}; do
        mapfile -t left < <(cd /proc && EXIT_CODE_FILE='' grep -lszxF "EXIT_CODE_FILE=$1" [0-9]*/environ)
        [ "${#left[@]}" -gt 0 ] || return 0
        [ "$turn" -lt 100 ] || signal=KILL
        kill -s "$signal" "${left[@]%/environ}" 2>/dev/null || true
        sleep 0.1
    done
}

guard() {  # what runs in a session of its own would outlive a SIGKILL of this shell; this stays beside it, and ends it then
    # shellcheck disable=SC2016  # for the other shell to expand
    EXIT_CODE_FILE='' setsid bash -c "$(declare -f end_all)"'; while [ -e "/proc/$0/exe" ]; do sleep 1; done; end_all "$1"' \
        $$ "$EXIT_CODE_FILE" </dev/null >/dev/null 2>&1 &
    echo $!
}

orders_for() {  # orders_for PID SIGNAL: a launcher gives each rank its RANK, and has none itself
    [ -n "$1" ] || return 0
    if grep -qzs '^RANK=' "/proc/$1/environ"; then
        if [ "$2" = INT ] && ! catches_int "$1"; then set -- "$1" TERM; fi
        orders+=("$2 $1")
    else
        for below in $(pgrep -P "$1"); do orders_for "$below" "$2"; done
    fi
}

catches_int() {  # catches_int PID: what a shell starts in the background ignores Ctrl-C, unless it asks for it
    local mask
    mask=$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$1/status" 2>/dev/null)
    (( 0x${mask:-0} & 2 ))
}

dtype_flag() {  # DTYPE -> the flag of pretrain_intern.py; fp32 has none
    case $1 in
        bf16 | fp16) echo "--$1" ;;
        fp32) ;;
        *) echo "error: DTYPE=$1 is not one of bf16, fp16, fp32" >&2; exit 2 ;;
    esac
}
