"""From options to a finished run: everything behind `saetrain fit`.

`run` is the outline, `resolve` decides what a new run is, `start` begins or resumes it on every
rank, `setup` builds its SAEs and restores a checkpoint, `finetune` begins from other SAEs,
`estimate` is `--plan`, `summary` is what is printed at the end, and `exit_status` writes exit.json.
"""

__all__ = [
    "estimate",
    "exit_status",
    "finetune",
    "resolve",
    "run",
    "setup",
    "start",
    "summary",
]
