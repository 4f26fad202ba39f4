"""From options to a finished run: everything behind `saetrain fit`.

`run` is one call of `fit`: lock, signal handlers, processes and exit.json, within which it starts
or resumes a run, trains it and summarizes it. `resolve` turns options into a run record, `setup`
builds the SAEs and restores a checkpoint, `finetune` loads pretrained SAEs, `estimate` computes
what `--plan` prints, and `summary` what is printed at the end.
"""

__all__ = ["estimate", "finetune", "resolve", "run", "setup", "summary"]
