"""The one training checkpoint, whatever the engine.

    save_dir/step_0001200/shard-00003-of-00008.safetensors   what rank 3 owns, as flat fp32 pieces, and its random-number state
    save_dir/step_0001200/{run,train_state}.json             what the run is, and how far
    save_dir/step_0001200/manifest.json                      size and SHA-256 of every file; written last
    save_dir/latest                                          `step_0001200`; replaced after that
    save_dir/.owner                                          the run that saves there; an older one stops when it finds another

An engine is a reader and writer of `Fragment`s. Loading under another layout or engine is the ordinary load.
"""
