"""The look that all pictures share, and how they are saved.

Figures are made without pyplot: no global state, and no display is needed.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

DOTS_PER_INCH = 200
TRAIN_COLOUR, VAL_COLOUR = (
    "#0072b2",
    "#d55e00",
)  # Told apart also by colour-blind readers (Okabe and Ito).
GRAY = "#767676"
_STYLE: dict[Any, Any] = {
    "text.usetex": False,
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRAY,
    "axes.linewidth": 0.8,
    "axes.grid": False,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
}


@contextmanager
def figure_file(path: Path, width: float, height: float) -> Iterator[Figure]:
    """Yield a figure of a size in inches; save it, cut to what is drawn, and make its folder."""
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # A class name in a script that the font lacks is drawn as boxes; nothing else is wrong.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(
            path, dpi=DOTS_PER_INCH, facecolor="white", bbox_inches="tight", pad_inches=0.1
        )
