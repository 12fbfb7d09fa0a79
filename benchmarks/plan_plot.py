"""Planned beside measured memory, as a plot: docs/planned.svg, of what plan_memory.py and plan_lean.py have left.

    python benchmarks/plan_plot.py

Reads benchmarks/results/plan_*.jsonl. A point a run; the shaded band is 12% to either side.
"""

import json
from pathlib import Path

import matplotlib

HERE = Path(__file__).parent
GIB = 2**30
KINDS = {"plan_memory": ("usual runs", "o"), "plan_lean": ("runs that save memory", "^")}


def main() -> None:
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ronna"  # the same file of the same figures
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 6), layout="constrained")
    ends = (0.12, 3.0)
    axes.fill_between(ends, [0.88 * x for x in ends], [1.12 * x for x in ends], color="0.9", label="within 12%")
    axes.plot(ends, ends, color="0.5", linewidth=1)
    for number, (stem, (title, marker)) in enumerate(KINDS.items()):
        path = HERE / "results" / f"{stem}.jsonl"
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
        for fitted, face, more in ((False, f"C{number}", ""), (True, "none", ", fitted")):
            some = [line for line in lines if line["fitted"] is fitted]
            if some:
                axes.plot(
                    [line["measured"] / GIB for line in some], [line["planned"] / GIB for line in some], marker,
                    markerfacecolor=face, markeredgecolor=f"C{number}", linestyle="none", label=title + more,
                )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal",
             xlabel="measured growth of resident memory, GiB", ylabel="planned, GiB")  # fmt: skip
    ticks = [0.125, 0.25, 0.5, 1.0, 2.0]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False)
    figure.savefig(HERE.parent / "docs" / "planned.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
