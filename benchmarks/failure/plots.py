"""Plots of the page: requests in flight on each instance over time."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # before pyplot: no display

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from failure.run import DRAWN, SERIES_STEP_S
from failure.tables import Table, label


def draw(tables: Sequence[Table], images: Path) -> None:
    """Write a PNG of few colours for each cell that has the load by instance."""
    images.mkdir(exist_ok=True)
    for table in tables:
        if not table.body["series"]:
            continue
        figure = instances(table)
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=80, bbox_inches="tight")
        plt.close(figure)
        Image.open(drawn).convert("RGB").quantize(64).save(
            images / f"failure-{table.name}.png", optimize=True
        )


def instances(table: Table) -> plt.Figure:
    """A panel a policy: a line for each instance, the burst shaded."""
    shown = [spec for spec in DRAWN if spec in table.body["series"]]
    figure, axes = plt.subplots(
        1, len(shown), figsize=(4 * len(shown), 3), sharey=True, layout="constrained", squeeze=False
    )
    for ax, spec in zip(axes[0], shown, strict=True):
        counts = np.array(table.body["series"][spec]).T
        ax.plot(SERIES_STEP_S * np.arange(len(counts)), counts, lw=0.8)
        ax.axvspan(*table.body["window"], color="black", alpha=0.08)
        ax.set_title(label(spec), fontsize=9)
        ax.set_xlabel("s", fontsize=8)
        ax.tick_params(labelsize=7)
    axes[0, 0].set_ylabel("requests in flight, a line an instance", fontsize=8)
    return figure
