"""`--config FILE`: flags from a file of this project, or of MindFormers or InternEvo; `--dump-config`."""
