"""The results as a table on the terminal."""

from megatron_solopo.evaluation_results import Cell, LongContextResults


def render(results: LongContextResults) -> str:
    """A line per task and metric, a column per length: mean score and 95 % interval in percent, and samples."""
    rows = [["task", "metric", *map(str, results.lengths), "all"]]
    for task, metric in dict.fromkeys((cell.task, cell.metric) for cell in results.cells):
        found = [results.cell(task, metric, length=length) for length in (*results.lengths, None)]
        rows.append([task, metric, *map(_shown, found)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    skipped = [
        f"skipped: {each.n} of {each.task}{'' if each.length is None else f' at {each.length}'}: {each.reason}"
        for each in results.skipped
    ]
    cost = (
        f"{results.samples} samples, {results.prompt_tokens:,} prompt tokens, {results.generated_tokens:,} generated, "
        f"{results.seconds:.1f} s of generation"
    )
    return "\n".join([*lines, *skipped, cost])


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    low, mean, high = (f"{100 * value:.1f}" for value in (cell.low, cell.score, cell.high))
    return f"{mean} [{low}, {high}] n={cell.n}"
