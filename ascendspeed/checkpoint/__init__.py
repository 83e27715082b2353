"""The one training checkpoint, whatever the engine.

    save_dir/step_0001200/shard-00003-of-00008.safetensors   what rank 3 owns, as flat fp32 pieces, and its random-number state
    save_dir/step_0001200/{run,train_state}.json             what the run is, and how far
    save_dir/step_0001200/manifest.json                      size and SHA-256 of every file; written last
    save_dir/latest                                          `step_0001200`; replaced after that
    save_dir/.owner                                          the run that saves there; an older one stops when it finds another

An engine is a reader and writer of `Fragment`s. Loading under another layout or engine is the ordinary load.
"""

from ascendspeed.checkpoint.async_saver import Saver
from ascendspeed.checkpoint.discovery import Readers, find, open_checkpoint
from ascendspeed.checkpoint.fragment import KINDS, Fragment, TrainState
from ascendspeed.checkpoint.load import Checkpoint, restore
from ascendspeed.checkpoint.ownership import Superseded, claim
from ascendspeed.checkpoint.paths import looks_like_checkpoint
from ascendspeed.checkpoint.save import SLACK, save

__all__ = [
    "KINDS",
    "SLACK",
    "Checkpoint",
    "Fragment",
    "Readers",
    "Saver",
    "Superseded",
    "TrainState",
    "claim",
    "find",
    "looks_like_checkpoint",
    "open_checkpoint",
    "restore",
    "save",
]
