"""Logs of several frameworks with known curves."""

from ascendspeed.loss_compare.curve import LoggedStep
from ascendspeed.training import metric_lines

SAMPLES = {  # real lines, as published in manuals, issues and READMEs -> what they say
    "Megatron-LM without a time": (
        " iteration      182/  250000 | consumed samples:       186368 | elapsed time per iteration (ms): "
        "126995.3 | learning rate: 1.365E-05 | global batch size:  1024 | lm loss: 2.382640E+00 | loss "
        "scale: 1.0 | grad norm: 0.227 | number of skipped iterations:   0 | number of nan iterations:   0 |",
        LoggedStep(182, 186368, None, 2.38264, 0.227, 0, 0, 250000, 1024, None, 126995.3),
    ),
    "Megatron-LM behind a launcher": (
        "[default0]: [2025-05-27 15:23:07] iteration        1/    24000 | consumed samples:          1024 | "
        "elapsed time per iteration (ms): 271607.0 | throughput per GPU (TFLOP/s/GPU): 40.4 | learning "
        "rate: 1.500000E-06 | global batch size:  1024 | lm loss: 1.192634E+01 | load_balancing_loss: "
        "1.041994E+00 | loss scale: 1.0 | grad norm: 5.960 | num zeros: 0.0 | params norm: 238.330 | number "
        "of skipped iterations:    0 | number of nan iterations:    0 |",
        LoggedStep(1, 1024, None, 11.92634, 5.96, 0, 0, 24000, 1024, None, 271607.0, tflops=40.4),
    ),
    "AscendSpeed": (
        " iteration  3/50000 | consumed samples: 768 | consumed tokens:  1572864 | elapsed time per "
        "iteration (ms):  33818.0 | learning rate:    1.406E-07 | gloabl batch size:  256 | lm loss:  "
        "1.200820E+01 | loss scale:  1.0 | grad norm:    9.216 | actual seqlen:  2048 | number of skipped "
        "iterations: 0 | number of nan iterations:   0 | samples per second: 7.570 | TFLOPs: 107.09 |",
        LoggedStep(3, 768, 1572864, 12.0082, 9.216, 0, 0, 50000, 256, 2048, 33818.0, 7.57, None, 107.09),
    ),
    "ModelLink, words behind the last bar": (
        " iteration     1665/    5000 | consumed samples:      3409920 | consumed tokens:  13967032320 | "
        "elapsed time per iteration (ms): 23205.2 | learning rate: 7.762E-05 | global batch size:  2048 | "
        "lm loss: 1.993132E+00 | loss scale: 16384.0 | grad norm: 2.486 | actual seqlen:  4096 | number of "
        "skipped iterations:   0 | number of nan iterations:   0 | samples per second: 88.256 | TFLOPs: "
        "148.25 | tgs (tokens/gpu/second): 353.02 time (ms)",
        LoggedStep(
            1665, 3409920, 13967032320, 1.993132, 2.486, 0, 0, 5000, 2048, 4096, 23205.2, 88.256, None, 148.25
        ),
    ),
    "Megatron-DeepSpeed, seconds": (
        " [default7]: iteration    12695/  115311 | consumed samples:      9841584 | consumed tokens:  "
        "20155564032 | elapsed time per iteration (s): 105.22 | learning rate: 5.969E-05 | global batch "
        "size:  2048 | lm loss: 2.463556E+00 | grad norm: 0.174 | num zeros: 0.0 | number of skipped "
        "iterations:   0 | number of nan iterations:   0 | samples per second: 19.463 | TFLOPs: 149.02 |",
        LoggedStep(
            12695,
            9841584,
            20155564032,
            2.463556,
            0.174,
            0,
            0,
            115311,
            2048,
            None,
            105220.0,
            19.463,
            None,
            149.02,
        ),
    ),
    "Megatron-DeepSpeed, tokens per device": (
        " iteration      199/  317892 | consumed samples:       152832 | consumed tokens:    625999872 | "
        "elapsed time per iteration (ms): 14287.5 | learning rate: 2.407E-04 | global batch size:   768 | "
        "lm loss: 5.905366E+00 | loss scale: 8192.0 | actual seqlen:  4096 | number of skipped "
        "iterations:   0 | number of nan iterations:   0 | samples per second: 53.753 | tokens per gpu per "
        "second (tgs): 1146.733 | TFLOPs: 69.85 |",
        LoggedStep(
            199, 152832, 625999872, 5.905366, None, 0, 0, 317892, 768, 4096, 14287.5, 53.753, 1146.733, 69.85
        ),
    ),
    "tokens that cannot be relied on": (
        "3:  [2026-05-29 03:52:45] iteration      300/     300 | consumed samples:       307200 | consumed "
        "tokens: 1.258B | elapsed time per iteration (ms): 131064.1 | eta: 0:00:00 | tokens/sec/gpu: 8000.5 "
        "| throughput per GPU (TFLOP/s/GPU): 412.3 | learning rate: 1.100000E-05 | global batch size:  1024 "
        "| lm loss: 1.504590E+00 | grad norm: 0.623 | number of skipped iterations:   0 | ",
        LoggedStep(
            300, 307200, None, 1.50459, 0.623, 0, None, 300, 1024, None, 131064.1, None, 8000.5, 412.3
        ),
    ),
    "GPT-NeoX": (
        " samples/sec: 7.799 | iteration       34/   10000 | elapsed time per iteration (ms): 4103.1 | "
        "learning rate: 2.111E-06 | approx flops per GPU: 112.9TFLOPS | lm_loss: 1.118665E+01 | number of "
        "skipped iterations:   0 | number of nan iterations:   0 |",
        LoggedStep(34, None, None, 11.18665, None, 0, 0, 10000, None, None, 4103.1, 7.799, None, 112.9),
    ),
    "MindSpeed-MM": (
        "[Rank 0 | Local Rank 0] 2026-01-01 00:00:00 INFO [train_engine:48] => iteration        1/     100 "
        "| consumed samples:            8 | elapsed time per iteration (ms): 7137.9 | learning rate: "
        "1.0E-05 | global batch size:     8 | loss: 1.924620E+00 | grad norm: 134.300 |",
        LoggedStep(1, 8, None, 1.92462, 134.3, None, None, 100, 8, None, 7137.9),
    ),
    "InternEvo, commas": (
        "2023-07-07 12:28:57,802\tINFO train.py:323 in record_current_batch_training_metrics -- "
        "tflops=63.27010355651958,step=0,loss=11.634403228759766,tgs "
        "(tokens/gpu/second)=1424.64,lr=4.0000000000000003e-07,loss_scale=65536.0,"
        "grad_norm=63.672620777841004,micro_num=4,num_consumed_tokens=131072,inf_nan_skip_batches=0,"
        "num_samples_in_batch=19,"
        "largest_length=2048,largest_batch=5,smallest_batch=4,adam_beta2=0.95,fwd_bwd_time=6.48",
        LoggedStep(
            0,
            None,
            131072,
            11.634403228759766,
            63.672620777841004,
            0,
            tokens_per_s=1424.64,
            tflops=63.27010355651958,
        ),
    ),
    "InternEvo, blanks and norms of groups": (
        "2024-03-21 14:48:31,587      INFO training_internlm.py:599 in "
        "record_current_batch_training_metrics -- tflops=186.62 step=1 loss=11.63248062133789 tgs "
        "(tokens/gpu/second)=3917.95 tgs/last_tgs_1=3917.97 tgs/tgs_all=3262.85 lr=6.000000000000001e-07 "
        "loss_scale=65536.0 grad_norm={'0_default': 3.0, '1_fp32': 4.0} micro_num=4 "
        "num_consumed_tokens=262144 inf_nan_skip_batches=0 num_samples_in_batch=8 acc=0.0 "
        "perplexity=111859.625 acc/en=0.0 loss_from_metric=11.6199 loss/en=11.6199",
        LoggedStep(1, None, 262144, 11.63248062133789, 5.0, 0, tokens_per_s=3917.95, tflops=186.62),
    ),
    "DeepSpeed's pipeline engine": (
        "steps: 200 loss: 5.5508 lm loss: 5.5103 moe loss: 0.0405 iter time (s): 0.936 samples/sec: 136.706",
        LoggedStep(200, None, None, 5.5103, ms=936.0, samples_per_s=136.706),
    ),
    "NeMo, steps from 0": (
        "Training epoch 0, iteration 49/49 | lr: 4.491e-06 | global_batch_size: 256 | global_step: 49 | "
        "reduced_train_loss: 12.81 | train_step_timing in s: 2.693 | consumed_samples: 12800",
        LoggedStep(50, 12800, loss=12.81, global_batch_size=256, ms=2693.0),
    ),
    "MindFormers, sink": (
        "2025-04-07 15:34:29,173 - [mindformers/core/callback/callback.py:529] - INFO - { Epoch:[  2/  2], "
        "step:[    2/   19], loss: 10.633, per_step_time: 1752ms, lr: 1e-05, overflow cond: False, "
        "loss_scale: 1.0, global_norm: [1.508834], train_throughput_per_npu: 170.738T",
        LoggedStep(21, loss=10.633, grad_norm=1.508834, skipped=0, ms=1752.0),
    ),
    "MindFormers, loss and mean": (
        "{ Epoch:[  1/  2], step:[    3/   19], loss:[5.521/5.634], per_step_time:80ms, lr:[1e-05], overflow "
        "cond: True, loss_scale: 65536.0",
        LoggedStep(3, loss=5.521, skipped=1, ms=80.0),
    ),
    "MindFormers, without epochs": (
        "{ step:[    2/   10], loss:  11.755612, per_step_time:    710ms, load_balancing_loss:   1.106543, "
        "lr: 1.000000e-05, grad_norm:  19.926786, throughput:  25.92T }",
        LoggedStep(2, loss=11.755612, grad_norm=19.926786, ms=710.0),
    ),
    "XTuner by MMEngine": (
        "01/29 21:36:02 - mmengine - INFO - Iter(train) [ 20/720]  lr: 1.9000e-04  eta: 0:32:01  time: "
        "2.5000  data_time: 0.0071  memory: 13969  loss: 2.6049  grad_norm: 0.9361",
        LoggedStep(20, loss=2.6049, grad_norm=0.9361, ms=2500.0),
    ),
    "MMEngine by epochs": (
        "01/29 21:36:02 - mmengine - INFO - Epoch(train) [3][20/25]  lr: 1.0e-02  eta: 0:00:00  time: 0.5  "
        "data_time: 0.0010  loss1: 0.1978  loss2: 0.4312  loss: 0.6290",
        LoggedStep(70, loss=0.629, ms=500.0),
    ),
    "XTuner": (
        "[XTuner][RANK 0][2025-08-01 10:00:02][INFO] [Train] (Epoch 1) Step 2/8  lr: 0.000010  loss: 8.750  "
        "loss(reduced): 8.625  grad_norm: 1.23  if_nan_skip: 0  max_memory: 20.1GB  text_tokens: 4096.0  "
        "tgs: 1234  data_time: 0.01s  time: 1.25s  eta: 0:00:10",
        LoggedStep(2, loss=8.625, grad_norm=1.23, train_iters=8, ms=1250.0, tokens_per_s=1234.0),
    ),
    "torchtitan, in colors": (
        "[rank0]:[titan] 2025-08-01 10:00:02,000 - root - INFO - \x1b[31mstep: 20  \x1b[32mloss:  8.7500  "
        "\x1b[38;2;180;60;0mgrad_norm:  1.2340  \x1b[38;2;54;234;195mmemory:  1.00GiB(1.05%)  \x1b[34mtps: "
        "1,234  \x1b[36mtflops: 101.20  \x1b[35mmfu: 10.26%\x1b[39m",
        LoggedStep(20, loss=8.75, grad_norm=1.234, tokens_per_s=1234.0, tflops=101.2),
    ),
    "Hugging Face's Trainer": (
        " 12%|##   | 1/8 [00:01<00:08,  1.01s/it]{'loss': 9.5455, 'grad_norm': 1.25, 'learning_rate': 1e-05, "
        "'epoch': 0.12}",
        LoggedStep(loss=9.5455, grad_norm=1.25, entry=1, epoch=0.12),
    ),
    "Hugging Face's Trainer, transformers 5": (
        "{'loss': '9.545', 'grad_norm': '1.25', 'learning_rate': '1e-05', 'epoch': '0.12'}",
        LoggedStep(loss=9.545, grad_norm=1.25, entry=1, epoch=0.12),
    ),
    "swift": (
        "{'loss': 9.5, 'grad_norm': 1.25, 'token_acc': 0.5, 'epoch': 0.12, 'global_step/max_steps': '10/80', "
        "'percentage': '12%'}",
        LoggedStep(10, loss=9.5, grad_norm=1.25, epoch=0.12),
    ),
    "LLaMA-Factory": (
        "[INFO|2025-08-01 10:00:00] llamafactory.train.callbacks:143 >> {'loss': 8.75, 'learning_rate': "
        "1.0000e-05, 'epoch': 0.25, 'throughput': 1234.5}",
        LoggedStep(loss=8.75, entry=1, epoch=0.25),
    ),
}


def ours(iteration: int, loss: float | None, **more: float) -> str:
    """A line of this project's log; 8 samples of 16 tokens an iteration."""
    places = {"samples": 8 * iteration, "tokens": 128 * iteration}
    return (
        metric_lines.format_line(
            metric_lines.TrainLine(
                "2026-01-01 00:00:00", iteration, 100, **places, loss=loss, **{"grad_norm": 1.0, **more}
            )
        )
        + "\n"
    )
