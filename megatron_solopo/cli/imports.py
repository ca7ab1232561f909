"""Imports of large libraries, a second faster."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Import large libraries without a search for garbage.

    torch and Megatron-Core make a million objects that live as long as the process. While they are imported, Python
    searches them for garbage again and again, which takes a quarter of the time. Later searches leave them out, too.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
