"""The table of RESULTS.md about the term per token, from `tokens.jsonl`."""

from collections.abc import Iterator, Sequence
from itertools import product

from miniature.evaluate import LENGTHS
from miniature.plan import DEFAULT_ALPHA, STRONG, TOKEN_WEIGHTS
from miniature.results import Results, paired
from miniature.runs import Run
from miniature.tables import Table, by_length, like
from tools.reporting import LEFT, table


def token_terms(results: Results) -> str:
    """Accuracy by length over the weights of both terms, and the mean long accuracy less that of SoLoPO."""
    solopo = [each.long for each in like(results, Run(STRONG, 0, "solopo", "simpo", DEFAULT_ALPHA["simpo"]))]

    def rows() -> Iterator[Sequence[str]]:
        for alpha, weight in product((0.0, DEFAULT_ALPHA["simpo"]), (None, *TOKEN_WEIGHTS)):
            found = like(results, Run(STRONG, 0, "solopo", "simpo", alpha, token_weight=weight))
            long = [each.long for each in found]
            yield [
                f"{alpha:g}",
                f"{weight or 0:g}",
                str(len(found)),
                *by_length(found),
                paired(long, solopo) if long != solopo else "",
            ]

    heads = ["alpha", "weight of the term per token", "seeds", *map(str, LENGTHS), "long, less SoLoPO"]
    return table(heads, rows(), LEFT)


TOKEN_TABLES: dict[str, Table] = {"token_terms": token_terms}
"""By the name in the document."""
