"""Imported before saetrain: finds it beside this folder where it is not installed."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("saetrain") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
