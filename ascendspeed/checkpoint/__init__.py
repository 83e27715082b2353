"""Training checkpoints: one format for every layout and engine.

    save_dir/step_0001200/shard-00003-of-00008.safetensors   fp32 fragments and random-number states of rank 3
    save_dir/step_0001200/{run,train_state}.json             configuration of the run; position in it
    save_dir/step_0001200/manifest.json                      size and SHA-256 of every file; written last
    save_dir/latest                                          `step_0001200`; replaced after the manifest
    save_dir/.owner                                          the run that saves here: an older run stops

An engine reads and writes `Fragment`s. Any layout and engine loads the checkpoint of any other.
"""
