"""What `benchmark.py` says: derived numbers, ratios, tables and the plot."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from megatron_solopo.files import atomic_path
from tools.benchmarks.bench_case import LONG_PO, OK, OURS, OUT_OF_MEMORY, SOLOPO, TRL
from tools.reporting import GIB, table

Row = dict[str, Any]
_NONE = "-"


def complete(row: Row, tokens: int, flops: float, peak: float | None) -> Row:
    """A measurement with what follows from it: `tokens` and model FLOPs are of one step, `peak` is the device's."""
    derived: Row = dict.fromkeys(("median_seconds", "tokens_per_second", "flops_per_second", "mfu"))
    if row["status"] == OK:
        seconds = median(row["seconds"])
        derived = {
            "median_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "flops_per_second": flops / seconds,
            "mfu": None if peak is None else flops / seconds / peak,
        }
    return row | {"tokens_per_step": tokens, "flops_per_step": flops} | derived


def by_length(rows: Sequence[Row]) -> dict[int, dict[str, Row]]:
    lengths: dict[int, dict[str, Row]] = {}
    for row in rows:
        lengths.setdefault(row["long_tokens"], {})[row["system"]] = row
    return dict(sorted(lengths.items()))


def ratios(rows: Sequence[Row]) -> list[Row]:
    """For each length: solopo against long_po beside its predictions, and both against TRL where all survived."""
    result = []
    for length, systems in by_length(rows).items():
        ratio: Row = {"long_tokens": length}
        measured = {name: row for name, row in systems.items() if row["status"] == OK}
        if SOLOPO in systems and LONG_PO in systems:
            for what in ("tokens", "flops"):
                ratio[f"solopo_long_po_{what}"] = _quotient(systems, SOLOPO, LONG_PO, f"{what}_per_step")
        ratio["solopo_long_po_time"] = _quotient(measured, SOLOPO, LONG_PO, "median_seconds")
        for ours in OURS:
            ratio[f"trl_{ours}_time"] = _quotient(measured, TRL, ours, "median_seconds")
            ratio[f"{ours}_trl_tokens_per_second"] = _quotient(measured, ours, TRL, "tokens_per_second")
            ratio[f"{ours}_trl_memory"] = _quotient(measured, ours, TRL, "allocated_bytes")
        result.append({key: value for key, value in ratio.items() if value is not None})
    return result


def _quotient(rows: Mapping[str, Row], over: str, under: str, key: str) -> float | None:
    if over in rows and under in rows and rows[over][key] and rows[under][key]:
        return float(rows[over][key] / rows[under][key])
    return None


def agreement(rows: Sequence[Row]) -> list[Row]:
    """First-step loss and gradient norm of long_po and TRL, at the lengths where both have one."""
    result = []
    for length, systems in by_length(rows).items():
        pair = {name: systems[name] for name in (LONG_PO, TRL) if name in systems and systems[name]["losses"]}
        if pair:
            entry: Row = {"long_tokens": length}
            for name, row in pair.items():
                entry |= {f"{name}_loss": row["losses"][0], f"{name}_grad_norm": row["grad_norms"][0]}
            if len(pair) == 2:
                one, other = (row["grad_norms"][0] for row in pair.values())
                entry["grad_norm_difference"] = abs(one - other) / max(one, other)
            result.append(entry)
    return result


def _number(value: float | None, form: str = ".3f", scale: float = 1.0) -> str:
    return _NONE if value is None else format(value / scale, form)


def measurements_table(rows: Sequence[Row]) -> str:
    columns = ("L", "system", "step s", "tokens/s", "TFLOP/s", "MFU", "allocated GiB", "reserved GiB", "remark")
    cells = [
        [
            f"{length:,}",
            name,
            _number(row["median_seconds"]),
            _number(row["tokens_per_second"], ",.0f"),
            _number(row["flops_per_second"], ".2f", 1e12),
            _number(row["mfu"], ".1%"),
            _number(row["allocated_bytes"], ".1f", GIB),
            _number(row["reserved_bytes"], ".1f", GIB),
            ", ".join(filter(None, (row["variant"], "" if row["status"] == OK else row["status"]))),
        ]
        for length, systems in by_length(rows).items()
        for name, row in systems.items()
    ]
    return table(columns, cells)


def ratios_table(rows: Sequence[Row]) -> str:
    columns = {
        "solopo/long_po time": "solopo_long_po_time",
        "(L+2S)/2L": "solopo_long_po_tokens",
        "ratio of FLOPs": "solopo_long_po_flops",
        "TRL/solopo time": "trl_solopo_time",
        "TRL/long_po time": "trl_long_po_time",
        "solopo/TRL tokens/s": "solopo_trl_tokens_per_second",
        "long_po/TRL tokens/s": "long_po_trl_tokens_per_second",
        "solopo/TRL memory": "solopo_trl_memory",
        "long_po/TRL memory": "long_po_trl_memory",
    }
    cells = [
        [f"{row['long_tokens']:,}", *(_number(row.get(key), ".3f") for key in columns.values())] for row in ratios(rows)
    ]
    return table(("L", *columns), cells)


def agreement_table(rows: Sequence[Row]) -> str:
    columns = ("L", "long_po loss", "TRL loss", "ln 2", "long_po grad norm", "TRL grad norm", "difference")
    cells = [
        [
            f"{row['long_tokens']:,}",
            *(_number(row.get(f"{name}_loss"), ".6f") for name in (LONG_PO, TRL)),
            f"{math.log(2):.6f}",
            *(_number(row.get(f"{name}_grad_norm"), ".6g") for name in (LONG_PO, TRL)),
            _number(row.get("grad_norm_difference"), ".1e"),
        ]
        for row in agreement(rows)
    ]
    return table(columns, cells)


def variants_table(rows: Sequence[Row]) -> str:
    columns = ("L", "system", "variant", "step s", "allocated GiB", "remark")
    cells = [
        [
            f"{row['long_tokens']:,}",
            row["system"],
            row["variant"],
            _number(row["median_seconds"]),
            _number(row["allocated_bytes"], ".1f", GIB),
            "" if row["status"] == OK else f"{row['status']}: {row['detail']}"[:100],
        ]
        for row in rows
    ]
    return table(columns, cells)


def profiles_table(rows: Sequence[Row]) -> str:
    columns = ("L", "system", "profiled step ms", "GPU busy", "GPU idle", "launches", "kernels that took most")
    cells = []
    for row in (row for systems in by_length(rows).values() for row in systems.values()):
        if profile := row["profile"]:
            top = [f"{each['name'][:60]} {each['share_of_step']:.0%}" for each in profile["top_kernels"][:3]]
            shares = [_number(profile[key], ".1%") for key in ("gpu_busy", "gpu_idle")]
            wall = f"{profile['wall_ms']:.1f}"
            launches = f"{profile['kernel_launches']:,}"
            cells.append([f"{row['long_tokens']:,}", row["system"], wall, *shares, launches, "; ".join(top) or _NONE])
    return table(columns, cells)


def markdown(rows: Sequence[Row], variants: Sequence[Row]) -> str:
    """All tables, with what they need to be read."""
    parts = [measurements_table(rows)]
    if len({row["system"] for row in rows}) > 1:
        parts.append("Ratios; time is the median step's, memory the peak that tensors took:\n\n" + ratios_table(rows))
    if agreement(rows):
        told = "First step, the reference being the policy itself: the loss of both must be ln 2."
        parts.append(f"{told}\n\n{agreement_table(rows)}")
    if variants:
        parts.append(f"Every variant tried:\n\n{variants_table(variants)}")
    if any(row["profile"] for row in rows):
        parts.append(f"One step under the profiler, which slows it:\n\n{profiles_table(rows)}")
    return "\n\n".join(parts)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Step time, tokens per second and peak memory over the length, by system; a cross where memory ran out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "seconds per step": ("median_seconds", 1.0),
        "tokens per second": ("tokens_per_second", 1.0),
        "peak memory of tensors, GiB": ("allocated_bytes", float(GIB)),
    }
    panels = {title: each for title, each in panels.items() if any(row[each[0]] for row in rows)}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4.5), layout="constrained", squeeze=False)
    for axis, (title, (key, scale)) in zip(axes.flat, panels.items(), strict=True):
        for name in dict.fromkeys(row["system"] for row in rows):
            own = sorted((row for row in rows if row["system"] == name), key=lambda row: row["long_tokens"])
            points = [(row["long_tokens"], row[key] / scale) for row in own if row["status"] == OK and row[key]]
            (line,) = axis.plot(*(zip(*points, strict=True) if points else ([], [])), marker="o", label=name)
            full = [row["long_tokens"] for row in own if row["status"] == OUT_OF_MEMORY]
            # On the axis' upper edge: there is no value to put it at.
            axis.plot(full, [0.97] * len(full), "x", color=line.get_color(), transform=axis.get_xaxis_transform(),
                      markersize=10, label=f"{name}: out of memory" if full else None)  # fmt: skip
        axis.set_ylim(bottom=0)
        axis.set(title=title, xlabel="tokens of the long sequence", xscale="log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}K")
        axis.set_xticks(sorted({row["long_tokens"] for row in rows}), minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)
