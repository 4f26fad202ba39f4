"""From options to a finished run: everything behind `saetrain fit`.

`run` is the outline: it starts or resumes a run, trains it and summarizes it. `session` holds the
lock, the signal handlers and the processes of a call, and writes exit.json. `resolve` turns options
into a run record, `setup` builds the SAEs and restores a checkpoint, `finetune` loads pretrained
SAEs, `estimate` computes what `--plan` prints, and `summary` what is printed at the end.
"""

__all__ = ["estimate", "finetune", "resolve", "run", "session", "setup", "summary"]
