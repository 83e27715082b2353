"""Training folders of InternEvo: a file for every rank and stage, as its trainer writes and loads them.

Tensor parallel: `model_tp{t}_pp{p}.pt`. Weight parallel (isp): `model_wp{w}_pp{p}.pt`, early in 2024 `model_tp{t}_wp{w}_pp{p}.pt`,
of those ranks only that differ. Layers count from 0 on every stage; stages may be of any length. The optimizer's and the trainer's
own files (`optimizer_*`, `context.pt`, `schedulder.pt`, `sampler*.pt`, `topo_*`) are not opened.
"""

from ascendspeed.conversion.formats.internevo.reading import is_one, open_folder
from ascendspeed.conversion.formats.internevo.writing import InternEvoWriter

__all__ = ["InternEvoWriter", "is_one", "open_folder"]
