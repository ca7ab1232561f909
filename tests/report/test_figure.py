"""Heat maps and the labels of lengths."""

import numpy as np
from matplotlib.figure import Figure

from megatron_solopo.report.figure import LIGHT, draw_heat_map, short_length


def test_depths_are_in_order_though_a_length_lacks_some() -> None:
    axis = Figure().add_subplot()
    cells = {("1K", "0.50"): (0.5, 4), ("2K", "0.00"): (0.9, 4), ("2K", "unknown"): (0.1, 4), ("2K", "0.50"): (0.2, 4)}
    draw_heat_map(axis, LIGHT, cells)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0.00", "0.50", "unknown"]
    shown = np.ma.getdata(axis.images[0].get_array())
    assert shown[:, 1].tolist() == [0.9, 0.2, 0.1] and shown[1, 0] == 0.5


def test_lengths_are_short() -> None:
    assert [short_length(length) for length in (512, 1024, 1536, 131072, 1000)] == [
        "512",
        "1K",
        "1.5K",
        "128K",
        "1,000",
    ]
