"""Files of a run folder: run.json, checkpoints, segments.json and configuration files.

`record` describes the run, `checkpoint` saves and loads its state, `segments` pins the shards of a
run that follows a harvest, `config_file` reads options from TOML, YAML or run.json, `overrides`
changes options of an existing run, `seal` covers a file by a digest of its own, and `own_files`
reads and deletes plain files only.
"""

__all__ = ["checkpoint", "config_file", "overrides", "own_files", "record", "seal", "segments"]
