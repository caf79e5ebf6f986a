"""The shadow guard: our package names are not ours alone.

Another distribution on PyPI is called `kernels`, and Python 3.15 has a standard package
`profiling`. Where one of them is found before ours, imports fail in puzzling ways, or worse, work.
"""

import importlib.util
import sys
from pathlib import Path

PACKAGES = ("kernels", "models", "train", "profiling")
CHECKOUT = Path(__file__).resolve().parents[1]


def check() -> None:
    """Stop with exit code 2, naming both paths, when a package of ours resolves elsewhere.

    Entry points call this before they import `models` or `kernels`; it imports nothing itself.
    """
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None:  # its import will say so
            continue
        places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
        found = Path(places[0]).resolve()
        ours = CHECKOUT / name
        if not found.is_relative_to(ours):
            print(
                f"error: package `{name}` resolves to {found} instead of {ours}; run"
                f" `python -m` from {CHECKOUT}, and remove the other package or its entry in"
                " PYTHONPATH",
                file=sys.stderr,
            )
            raise SystemExit(2)
