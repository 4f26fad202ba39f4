"""The processes of a run under torchrun: rank 0, broadcast, barrier, heartbeat and exit.

`coordinator` is the interface that a run uses, for one process and for both parallel modes;
`process_group` exchanges small messages through torch's store and detects lost processes,
`partition` assigns SAEs to ranks, `collectives` wraps all-gather and all-reduce, `metric_gathering`
merges the ranks' metrics on rank 0, and `signals` handles SIGTERM and Ctrl-C.
"""

__all__ = [
    "collectives",
    "coordinator",
    "metric_gathering",
    "partition",
    "process_group",
    "signals",
]
