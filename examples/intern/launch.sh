# Shared by the recipes beside this file, which source it: the flags of a script from values that can be given in the
# environment, and the launch on every device of one or more nodes by ascendspeed/cli/launch.py.
#
#   NPROC=4              processes on this node (default: one per device that DeepSpeed finds)
#   HOSTFILE=hosts       several nodes by DeepSpeed's launcher over ssh; lines of `name slots=8`.
#                        The environment of the other nodes comes from ./.deepspeed_env, as NAME=value
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 NPROC=8     several nodes by torchrun, started once on each (srun, a job script)
#   MASTER_PORT=29500    change it when two runs share a machine
#   RESTARTS=3           start again up to three times, with --auto-resume, when a process or a node is lost
#
# SIGTERM, SIGUSR1 and Ctrl-C to a recipe are forwarded to its ranks, which save and leave; its exit code is theirs.
# On an NPU machine, first: source /usr/local/Ascend/ascend-toolkit/set_env.sh

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}    # threads per process; on a CPU the processes share the cores
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}          # no warning when a process forks
# On a GPU: memory blocks that can grow, since fixed ones leave gaps of several GiB when a run fills the device.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}
export PYTHONUNBUFFERED=1                       # log lines appear at once
RECIPE=$(printf '%q ' bash "$0" "$@")           # the command that was typed, for the line that says how to continue
export RECIPE=${RECIPE% }

flags=()                                        # flags of the script that the recipe starts, in the order of its lines

value() {  # value FLAG NAME DEFAULT: adds FLAG with $NAME, which is set to DEFAULT if it is unset or empty
    [ -n "${!2:-}" ] || printf -v "$2" %s "$3"
    flags+=("$1" "${!2}")
}

optional() {  # optional FLAG NAME DEFAULT: adds FLAG with $NAME, which is set to DEFAULT if it is unset; if empty, adds nothing
    [ -n "${!2+set}" ] || printf -v "$2" %s "$3"
    [ -z "${!2}" ] || flags+=("$1" "${!2}")
}

words() {  # words FLAG NAME DEFAULT: as `value`, but for several words; adds nothing if DEFAULT is empty too
    [ -n "${!2:-}" ] || printf -v "$2" %s "$3"
    # shellcheck disable=SC2206  # to be split
    [ -z "${!2}" ] || flags+=("$1" ${!2})
}

fixed() { flags+=("$@"); }  # fixed FLAG...: adds flags that have no variable

fail() { echo "error: $*" >&2; exit 2; }    # fail MESSAGE

count() {  # count NAME: fails unless $NAME is a whole number of at least 1; bash would evaluate other text as an expression
    [[ ${!1} =~ ^[1-9][0-9]{0,8}$ ]] || fail "$1=${!1} is not a whole number of at least 1"
}

dtype_flag() {  # dtype_flag DTYPE: prints the flag of a number format; fp32 has none
    case $1 in
        bf16 | fp16) echo "--$1" ;;
        fp32) ;;
        *) fail "DTYPE=$1 is not one of bf16, fp16, fp32" ;;
    esac
}

overlap() {  # overlap: with tensor parallelism, overlaps its communication on a GPU; without, it would only serialise kernels
    [ "${TP:-1}" = 1 ] || export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
}

launch() { exec python -m ascendspeed.cli.launch "$@"; }  # launch SCRIPT FLAGS...

train() {  # train FLAGS...: starts the training of the recipe; FLAGS come last
    local dtype
    dtype=$(dtype_flag "$DTYPE")
    overlap
    fixed --use-fused-rmsnorm --use-fused-rotary-pos-emb --mlp-layer-fusion     # where the device has such kernels
    fixed --distributed-backend nccl                                            # the device's own: hccl, or gloo on a CPU
    # shellcheck disable=SC2086  # the dtype flag is a word, or none
    launch pretrain_intern.py "${flags[@]}" $dtype "$@"
}

answer() {  # answer SCRIPT FLAGS...: starts a script whose stdout is the answer, on TP x PP processes; FLAGS come last
    local dtype script=$1
    shift
    dtype=$(dtype_flag "$DTYPE")
    count TP
    count PP
    overlap
    [ -n "${HOSTFILE:-}${NNODES:-}" ] || export NPROC=${NPROC:-$((TP * PP))}
    # shellcheck disable=SC2086  # the dtype flag is a word, or none
    launch --quiet "$script" "${flags[@]}" $dtype "$@"
}
