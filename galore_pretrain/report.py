"""Pictures of runs and plans. The only place that draws."""

from collections.abc import Mapping
from pathlib import Path

# Okabe and Ito's colours, which colour-blind readers tell apart.
_COLOURS = {
    "weights": "#0072B2",
    "moments": "#E69F00",
    "bases": "#F0E442",
    "gradients": "#D55E00",
    "sums": "#CC79A7",
    "activations": "#009E73",
    "temporaries": "#999999",
}


def draw_memory(path: Path, title: str, bars: Mapping[str, Mapping[str, int]], budget: int | None = None) -> None:
    """Stacked bars of bytes: for each name, what its peak is made of. A line marks the budget."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 1.4 + 0.5 * len(bars)), layout="constrained")
    names = list(bars)
    left = [0.0] * len(names)
    for kind, colour in _COLOURS.items():
        sizes = [bars[name][kind] / 2**30 for name in names]
        if any(sizes):
            axes.barh(names, sizes, left=left, color=colour, label=kind, edgecolor="white", linewidth=0.5)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for name, total in zip(names, left, strict=True):
        axes.annotate(f"{total:.2f}", (total, name), xytext=(4, 0), textcoords="offset points", va="center")
    if budget is not None and budget / 2**30 < 1.6 * max(left):
        axes.axvline(budget / 2**30, color="black", linestyle="--", linewidth=1)
        axes.annotate(
            f"budget {budget / 2**30:.1f}", (budget / 2**30, 1), xycoords=("data", "axes fraction"),
            xytext=(3, -11), textcoords="offset points", fontsize=9,
        )  # fmt: skip
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(title=title, xlabel="peak memory of an update, GiB")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
