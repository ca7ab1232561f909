"""How many layers each pipeline stage has: all the same number, or what a layout in Megatron-Core's letters says.

In a layout, `|` ends a stage, `E` is the embedding, `t` a transformer layer, and `L` the output layer with the loss.
`*N` repeats the letter or the bracket before it. Commas mean nothing. So `Et|(ttt|)*2,tL` is `Et|ttt|ttt|tL`.
"""

import re
from functools import cache
from itertools import groupby

from megatron_solopo.config import ParallelConfig
from megatron_solopo.errors import UserError

_KEY = "parallel.pipeline_model_parallel_layout"
_REPEATED = (re.compile(r"\(([^()]*)\)\*([0-9]{1,4})"), re.compile(r"([EtL|])\*([0-9]{1,4})"))


def stage_layers(num_layers: int, parallel: ParallelConfig) -> tuple[int, ...]:
    """Transformer layers of each stage, in the order of the layers: stage s is chunk s // PP of pipeline rank s % PP.

    Raises UserError if the stages cannot be equal, or if the layout does not fit the model or the parallel sizes.
    """
    size, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    count, text = size * chunks, parallel.pipeline_model_parallel_layout
    # In quotes, because a shell reads |, * and brackets itself.
    example = f", for example to '{balanced_layout(num_layers, count)}'" if 1 < count <= num_layers else ""
    if text is None:
        if num_layers % count == 0:
            return (num_layers // count,) * count
        advice = f"; set {_KEY}{example}" if example else ""
        raise UserError(
            f"the model's {num_layers} layers do not divide into {count} pipeline stages "
            f"(parallel.pipeline_model_parallel_size x virtual_pipeline_model_parallel_size){advice}"
        )
    stages, problem = parse_layout(text), ""
    if size == 1:
        problem = "needs parallel.pipeline_model_parallel_size > 1"
    elif len(stages) != count:
        sizes = f"parallel.pipeline_model_parallel_size={size} x virtual_pipeline_model_parallel_size={chunks}"
        problem = f"has {len(stages)} stages, but {sizes} is {count}"
    elif wrong := wrong_letters(num_layers, text):
        problem = wrong
    elif "" in stages:
        problem = "has an empty stage"
    if problem:
        raise UserError(f"{_KEY}={text} {problem}; set it to null" + (f", or{example[1:]}" if example else ""))
    return tuple(stage.count("t") for stage in stages)


def wrong_letters(num_layers: int, text: str) -> str:
    """Why a layout is that of another model, whatever the parallel sizes; "" if it is not."""
    letters = "".join(parse_layout(text))
    if letters == f"E{'t' * num_layers}L":
        return ""
    return (
        f"must be E (embedding), then the model's {num_layers} layers t, then L (loss), with | between stages; it has "
        f"{letters.count('E')} E, {letters.count('t')} t and {letters.count('L')} L"
    )


@cache
def parse_layout(text: str) -> tuple[str, ...]:
    """The letters of each stage; raises UserError for what is no layout."""
    letters = text.replace(",", "")
    for pattern in _REPEATED:
        letters = pattern.sub(lambda found: found[1] * int(found[2]), letters)
    if wrong := re.search(r"[^EtL|]", letters):
        raise UserError(
            f"{_KEY}={text}: cannot read {wrong[0]!r}; E is the embedding, t a layer, L the loss, | ends a stage, and "
            "t*3 or (tt|)*3 repeats"
        )
    return tuple(letters.split("|"))


def balanced_layout(num_layers: int, count: int) -> str:
    """A layout of `count` stages, at most as many as layers, in which embedding and loss count as a layer each."""
    least, larger = divmod(num_layers + 2, count)
    # Stages in the middle are the larger ones. The first keeps most packs, and the last has the logits.
    start = (count - larger) // 2
    parts = [least + (start <= stage < start + larger) for stage in range(count)]
    first, *between, last = parts
    middle = ""
    for layers, alike in groupby(between):
        times = len(list(alike))
        middle += f"({_layers(layers)}|)*{times}" if times > 1 else f"{_layers(layers)}|"
    return f"E{_layers(first - 1)}|{middle}{_layers(last - 1)}L"


def _layers(count: int) -> str:
    return f"t*{count}" if count > 2 else "t" * count
