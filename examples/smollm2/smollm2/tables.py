"""What RESULTS.md shows: tables and a picture, from the files of results."""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_solopo.evaluate.statistics import mean_measure, mean_score
from megatron_solopo.generate.scoring import sub_em
from megatron_solopo.results.results_file import MeanWithInterval
from smollm2.plan import BASE, DEV, FULL, LONG_RUN, NEEDLES, Run, comparison, groups, main_groups, test_part
from smollm2.questions import questions, read_rows
from smollm2.training import TRAINING
from tools.reporting import LEFT, table

LENGTHS = FULL.lengths
PARTS = {length: test_part(length) for length in LENGTHS}
NOTHING = "-"
FLOAT32_MARK = "*"
"""Behind what was trained or answered in float32; the rest is in bfloat16."""
FIRST_WORDS = 20
"""About as many as the base model answers with."""
NUM_EXAMPLES = 8
"""So many questions show their answers."""
Rows = Iterator[Sequence[str]]


@dataclass(frozen=True)
class Result:
    """The file of one run."""

    run: Run
    found: dict[str, Any]

    def scores(self, part: str, side: str = "") -> dict[str, float]:
        """Score by question; empty if the part was not run. `side` (.short, .long) selects one of a part's tasks."""
        answers = self.found.get(part, {}).get("answers", [])
        return {question_of(row["id"]): row["score"] for row in answers if side in row["id"].split(":")[0]}


Scores = Callable[[Result, str], dict[str, float]]
"""Score by question of a result's part."""


def scores_of_first_words(result: Result, part: str) -> dict[str, float]:
    """Scores as if each answer had ended after `FIRST_WORDS` words."""
    cut = {
        question_of(row["id"]): " ".join(row["answer"].split()[:FIRST_WORDS])
        for row in result.found.get(part, {}).get("answers", [])
    }
    return {question: sub_em(answer, _gold()[question]) for question, answer in cut.items()}


@functools.cache
def _gold() -> dict[str, list[str]]:
    return {each["id"]: each["answers"] for each in questions(read_rows())}


def question_of(sample: str) -> str:
    """The question of a sample's id, such as `test-400.short:q7`."""
    return sample.split(":", 1)[1]


def read_results(folder: Path) -> list[Result]:
    """Every run of the plan of which there are results."""
    results = []
    for run in (run for group in groups(FULL, everything=True) for run in group):
        path = folder / f"{run.name}.json"
        if path.exists():
            results.append(Result(run, json.loads(path.read_text(encoding="utf-8"))))
    return results


def seeds_of(results: Sequence[Result], run: Run) -> list[Result]:
    """The results of a run under every seed."""
    return [each for each in results if replace(each.run, seed=run.seed) == run]


def mean_by_question(found: Sequence[Result], part: str, scores_of: Scores = Result.scores) -> dict[str, float]:
    """The mean over the seeds that answered the part, of each question that all of them answered."""
    answered = [scores for each in found if (scores := scores_of(each, part))]
    common = set.intersection(*map(set, answered)) if answered else set()
    return {question: float(np.mean([scores[question] for scores in answered])) for question in sorted(common)}


def accuracy(found: Sequence[Result], part: str, scores_of: Scores = Result.scores) -> MeanWithInterval | None:
    """Mean over questions, with the interval of `mean_score`; None where nothing was run."""
    scores = list(mean_by_question(found, part, scores_of).values())
    return mean_score(scores) if scores else None


def _mark(found: Sequence[Result], part: str) -> str:
    answered = [each for each in found if part in each.found]
    used = {each.found.get(name, {}).get("dtype") for each in answered for name in (TRAINING, part)}
    return FLOAT32_MARK if "float32" in used else ""


def cell(value: MeanWithInterval | None) -> str:
    """A mean and its interval in percent."""
    if value is None:
        return NOTHING
    assert value.low is not None and value.high is not None
    return f"{100 * value.mean:.0f} [{100 * value.low:.0f}, {100 * value.high:.0f}]"


def methods(results: Sequence[Result]) -> list[Run]:
    """The rows of the tables: seed 0 of every kind of run with results, in the plan's order, without trials."""
    return list(dict.fromkeys(replace(each.run, seed=0) for each in results if not each.run.is_trial))


def name_of(run: Run) -> str:
    """The name of a row."""
    return run.name.removesuffix(f"-seed{run.seed}")


def accuracies(results: Sequence[Result], scores_of: Scores = Result.scores) -> str:
    """Accuracy of every method at every length; where several seeds answered, also that of each."""

    def shown(found: Sequence[Result], part: str) -> str:
        by_seed = [mean_score(list(scores.values())).mean for each in found if (scores := scores_of(each, part))]
        seeds = f" ({', '.join(f'{100 * mean:.0f}' for mean in by_seed)})" if len(by_seed) > 1 else ""
        return cell(accuracy(found, part, scores_of)) + seeds + _mark(found, part)

    def rows() -> Rows:
        for run in methods(results):
            found = seeds_of(results, run)
            yield [name_of(run), *(shown(found, part) for part in PARTS.values())]

    return table(["run", *map(str, LENGTHS)], rows(), LEFT)


def words(results: Sequence[Result]) -> str:
    """Mean number of words in the answers of every method, by length."""

    def rows() -> Rows:
        for run in methods(results):
            found = seeds_of(results, run)
            yield [name_of(run), *(_mean_words(found, part) for part in PARTS.values())]

    return table(["run", *map(str, LENGTHS)], rows(), LEFT)


def _mean_words(found: Sequence[Result], part: str) -> str:
    counts = [len(row["answer"].split()) for each in found for row in each.found.get(part, {}).get("answers", [])]
    return f"{np.mean(counts):.0f}" if counts else NOTHING


def differences(results: Sequence[Result], scores_of: Scores = Result.scores) -> str:
    """Every trained method less the base, and SoLoPO less what it competes with, question by question."""
    base, runs = Run(BASE), methods(results)
    pairs = [(run, base) for run in runs if run != base]
    pairs += [(run, other) for run in runs if run.method == "solopo" for other in _competitors(run) if other in runs]

    def rows() -> Rows:
        for first, second in pairs:
            cells = [_difference(results, first, second, part, scores_of) for part in PARTS.values()]
            yield [f"{name_of(first)} less {name_of(second)}", *cells]

    return table(["difference", *map(str, LENGTHS)], rows(), LEFT)


def _competitors(solopo: Run) -> list[Run]:
    """The other methods with the same settings, `short_po` with as many FLOPs, and the chosen answer aligned alone."""
    others = [replace(solopo, method=method) for method in ("long_po", "short_po")]
    others += [replace(solopo, method="short_po", step_factor=LONG_RUN), replace(solopo, align="chosen")]
    return [each for each in dict.fromkeys(others) if each != solopo]


def _difference(results: Sequence[Result], first: Run, second: Run, part: str, scores_of: Scores) -> str:
    """Over the seeds that answered the part in both; the base has none."""
    found = {run: [each for each in seeds_of(results, run) if part in each.found] for run in (first, second)}
    seeds = set.intersection(*({each.run.seed for each in found[run]} for run in found if run.method != BASE))
    compared = [
        [each for each in of_run if each.run.method == BASE or each.run.seed in seeds] for of_run in found.values()
    ]
    one, other = (mean_by_question(of_run, part, scores_of) for of_run in compared)
    common = sorted(one.keys() & other.keys())
    if len(common) < 2:
        return NOTHING
    mean = mean_measure(np.array([100 * (one[question] - other[question]) for question in common]))
    mark = _mark([each for of_run in compared for each in of_run], part)
    return f"{mean.mean:+.0f} [{mean.low:+.0f}, {mean.high:+.0f}]{mark}"


def costs(results: Sequence[Result]) -> str:
    """Triplets, tokens, FLOPs and time of a run."""

    def rows() -> Rows:
        for run in methods(results):
            found = [each.found[TRAINING] for each in seeds_of(results, run) if TRAINING in each.found]
            if found:
                seconds = [each["seconds"] for each in found]
                first = found[0]
                yield [
                    name_of(run),
                    ", ".join(sorted({each["dtype"] for each in found})),
                    str(first["triplets"]),
                    f"{np.mean([each['tokens'] for each in found]):,.0f}",
                    f"{np.mean([each['flops'] for each in found]) / 1e12:.1f}",
                    f"{min(seconds):,.0f}",
                ]

    return table(["run", "dtype", "triplets", "tokens", "TFLOPs", "seconds, fastest seed"], rows(), LEFT)


def training(results: Sequence[Result]) -> str:
    """What the curves of the metrics did: mean of the first and of the last two steps."""
    shown = ("rewards/margins", "rewards/chosen", "rewards/chosen_long", "solo_ra/gap_abs", "nll_loss")

    def rows() -> Rows:
        for each in results:
            if curves := each.found.get(TRAINING, {}).get("curves"):
                yield [each.run.name, *(_ends(curves.get(name)) for name in shown)]

    return table(["run", *shown], rows(), LEFT)


def _ends(values: Sequence[float] | None) -> str:
    if values is None:
        return NOTHING
    return f"{np.mean(values[:2]):.2f} to {np.mean(values[-2:]):.2f}"


def rates(results: Sequence[Result]) -> str:
    """Accuracy and length of the answers on the dev split by learning rate, and what the training did to `chosen`."""
    sides = {FULL.short_tokens: ".short", FULL.dev_tokens: ".long"}

    def rows() -> Rows:
        for each in sorted(results, key=lambda each: (each.run.method != BASE, each.run.rate)):
            if DEV in each.found and replace(each.run, learning_rate=None) in (Run(BASE), Run("short_po")):
                rate = NOTHING if each.run.method == BASE else f"{each.run.rate:g}"
                cells = (cell(mean_score(list(each.scores(DEV, side).values()))) for side in sides.values())
                curves = each.found.get(TRAINING, {}).get("curves", {})
                yield [each.run.method, rate, *cells, _mean_words([each], DEV), _ends(curves.get("rewards/chosen"))]

    head = ["method", "learning rate", *map(str, sides), "words of an answer", "rewards/chosen"]
    return table(head, rows(), LEFT)


def needles(results: Sequence[Result]) -> str:
    """Share of single needles found, by length."""

    def rows() -> Rows:
        for run in methods(results):
            answers = [row for each in seeds_of(results, run) for row in each.found.get(NEEDLES, {}).get("answers", [])]
            if answers:
                by_length = ([row["score"] for row in answers if row["length"] == n] for n in FULL.needle_lengths)
                yield [name_of(run), *(cell(mean_score(scores)) for scores in by_length)]

    return table(["run", *map(str, FULL.needle_lengths)], rows(), LEFT)


def examples(results: Sequence[Result]) -> str:
    """Answers of the base and the longer trainings to the first questions that at least one of them has right.

    The contexts are the longest of training that all of them answered.
    """
    shown = [each for each in results if each.run in (Run(BASE), *comparison(step_factor=LONG_RUN))]
    lengths = (FULL.long_tokens, FULL.short_tokens)
    part = next((PARTS[length] for length in lengths if all(PARTS[length] in each.found for each in shown)), None)

    def rows() -> Rows:
        if part is None or not shown:
            return
        asked = {each["id"]: each for each in questions(read_rows())}
        answers = [{question_of(row["id"]): row for row in each.found[part]["answers"]} for each in shown]
        right = (name for name in sorted(answers[0]) if any(each[name]["score"] == 1 for each in answers))
        for name in islice(right, NUM_EXAMPLES):
            yield [asked[name]["question"], asked[name]["answers"][0], *(_answer(each[name]) for each in answers)]

    return table([f"question, {part or NOTHING}", "gold", *(name_of(each.run) for each in shown)], rows(), LEFT)


def _answer(row: dict[str, Any]) -> str:
    text = " ".join(row["answer"].split()).replace("|", "/")
    return f"{text} **(right)**" if row["score"] == 1 else text


def missing(results: Sequence[Result]) -> str:
    """What the plan has and the results have not."""
    by_run = {each.run: each.found for each in results}

    def rows() -> Rows:
        main = {run for group in main_groups(FULL) for run in group}
        for group in groups(FULL, everything=True):
            for run in group:
                wanted = [TRAINING] * (run.method != BASE) + run.parts(FULL)
                absent = [part for part in wanted if part not in by_run.get(run, {})]
                if absent:
                    kind = "main" if run in main else "everything"
                    yield [run.name, kind, "all" if absent == wanted else ", ".join(absent)]

    found = list(rows())
    return table(["run", "part of the plan", "missing"], found, LEFT) if found else "Nothing."


def draw(results: Sequence[Result], path: Path) -> None:
    """Accuracy against length with intervals: the base beside the comparison, and beside the longer trainings."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = {"the comparison": comparison(), f"{LONG_RUN} times as many steps": comparison(step_factor=LONG_RUN)}
    for axes, (title, runs) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        _draw_lines(axes, results, [Run(BASE), *runs])
        axes.set_title(title)
        axes.set_xscale("log", base=2)
        axes.set_xticks(LENGTHS, list(map(str, LENGTHS)))
        axes.set_xlabel("tokens of the context")
        axes.set_ylim(0, 1)
    figure.axes[0].set_ylabel("share of right answers (sub_em)")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _draw_lines(axes: Axes, results: Sequence[Result], runs: Sequence[Run]) -> None:
    for place, run in enumerate(runs):
        found = seeds_of(results, run)
        points = {length: value for length, part in PARTS.items() if (value := accuracy(found, part)) is not None}
        if points:
            # Side by side, so that no interval hides another.
            lengths = [length * 1.03 ** (place - (len(runs) - 1) / 2) for length in points]
            means = np.array([each.mean for each in points.values()])
            bars = np.array([[each.mean - each.low, each.high - each.mean] for each in points.values()]).T
            axes.errorbar(lengths, means, yerr=bars, label=name_of(run), marker="o", capsize=3)
    if axes.containers:
        axes.legend()


TABLES: dict[str, Callable[[Sequence[Result]], str]] = {
    "accuracies": accuracies,
    "words": words,
    "differences": differences,
    "accuracies_of_first_words": functools.partial(accuracies, scores_of=scores_of_first_words),
    "differences_of_first_words": functools.partial(differences, scores_of=scores_of_first_words),
    "costs": costs,
    "training": training,
    "rates": rates,
    "needles": needles,
    "examples": examples,
    "missing": missing,
}
