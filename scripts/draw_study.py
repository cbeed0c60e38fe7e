"""Draw what a study's file of losses says: perplexity by tokens, a line a method, with a band over its seeds.

python scripts/draw_study.py docs/benchmarks/table2_1m_20_results.json docs/table2-1m-20.png --tokens 8192
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

from galore_pretrain.study.pictures import styles_of

SIZE = (6.4, 4.0)  # inches


def curves(runs: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[int, list[float]]]:
    """Return the validation losses of all seeds, by method and by update; a run's name is METHOD-seedN."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, run in runs.items():
        method = name.rpartition("-seed")[0]
        for update, loss in run["eval_loss"].items():
            found[method][int(update)].append(loss)
    return found


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("losses", type=Path, help="the study's JSON, with `runs`")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--tokens", type=int, required=True, help="of an update")
    arguments = parser.parse_args()
    found = curves(json.loads(arguments.losses.read_text())["runs"])
    last = {method: statistics.mean(losses[max(losses)]) for method, losses in found.items()}
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    styles = styles_of(list(found))
    for method in sorted(found, key=last.__getitem__, reverse=True):
        updates = sorted(found[method])
        millions = [update * arguments.tokens / 1e6 for update in updates]
        seeds = [[math.exp(loss) for loss in found[method][update]] for update in updates]
        means = [statistics.geometric_mean(values) for values in seeds]
        style = styles[method]
        label = f"{method} {means[-1]:.1f}"
        axes.plot(millions, means, style.strokes, color=style.colour, marker="o", markersize=3, label=label)
        low, high = [min(values) for values in seeds], [max(values) for values in seeds]
        axes.fill_between(millions, low, high, color=style.colour, alpha=0.2, linewidth=0)
    axes.set_yscale("log")
    ticks = [20, 30, 40, 60]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("million tokens")
    axes.set_ylabel("validation perplexity")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(arguments.picture, dpi=110)


if __name__ == "__main__":
    main()
