"""Import path of the checkout, for benchmarks that run without an installed package."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("saetrain") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
