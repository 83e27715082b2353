# Starts a script on every device of one or more nodes. The recipes beside this file source it and call `launch`.
#
#   NPROC=4              processes on this node (default: every device that DeepSpeed finds)
#   HOSTFILE=hosts       several nodes by DeepSpeed's launcher over ssh; lines of `name slots=8`;
#                        what the other nodes need in their environment stands in ./.deepspeed_env, as NAME=value
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 NPROC=8     several nodes by torchrun, started once on each (srun, a job script)
#   MASTER_PORT=29500    change it when two runs share a machine
#
# On an NPU machine, first: source /usr/local/Ascend/ascend-toolkit/set_env.sh

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}    # threads per process; on a CPU the processes share the cores
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}  # lets tensor-parallel communication overlap on a GPU
export PYTHONUNBUFFERED=1                       # log lines come as they are made
MASTER_PORT=${MASTER_PORT:-29500}

launch() {  # launch SCRIPT FLAGS...
    if [ "${NNODES:-1}" -gt 1 ] && [ -z "${HOSTFILE:-}" ]; then
        : "${NODE_RANK:?NNODES=$NNODES needs NODE_RANK (0, 1, ...) on every node, or a HOSTFILE}"
        : "${MASTER_ADDR:?NNODES=$NNODES needs MASTER_ADDR, the name of node 0}"
        : "${NPROC:?NNODES=$NNODES needs NPROC, the processes per node}"
        exec torchrun --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$NPROC" \
            --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" -- "$@"
    fi
    exec deepspeed --no_local_rank --master_port "$MASTER_PORT" \
        ${HOSTFILE:+--hostfile "$HOSTFILE"} ${NNODES:+--num_nodes "$NNODES"} ${NPROC:+--num_accelerators "$NPROC"} "$@"
}

dtype_flag() {  # DTYPE -> the flag of pretrain_intern.py; fp32 has none
    case $1 in
        bf16 | fp16) echo "--$1" ;;
        fp32) ;;
        *) echo "error: DTYPE=$1 is not one of bf16, fp16, fp32" >&2; exit 2 ;;
    esac
}
