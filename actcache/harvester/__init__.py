"""Run a model over a text and write a cache: `actcache harvest` and `actcache plan`.

`resolve` opens model and text and builds the manifest from the options, `job` checks it against
the folder and loads the weights, `anchors` finds where a resumed one enters the text, `shares`
divides the text among several processes, `run` is the loop over shards, and `estimate` predicts
size and time without a harvest.
"""

__all__ = ["anchors", "estimate", "job", "resolve", "run", "shares"]
