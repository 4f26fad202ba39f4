"""Files of a run folder: run.json, checkpoints, segments.json and configuration files.

`record` describes the run, `checkpoint` saves and loads its state, `segments` pins the shards of a
run that follows a harvest, `config_file` reads options from TOML, YAML or run.json, `overrides`
changes options of an existing run, `own_files` deletes plain files only, and `tensors` reads
safetensors files.
"""

__all__ = ["checkpoint", "config_file", "overrides", "own_files", "record", "segments", "tensors"]
