"""Progress of long work: a bar on a terminal; in a file or a pipe, where a bar is one endless line, lines."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

_LINE_S = 30.0


def progress(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """tqdm with its own options; on stderr, and where that is no terminal a line of its own every half minute."""
    if sys.stderr.isatty():
        return tqdm(iterable, mininterval=2, **options)
    return _Lines(iterable, mininterval=_LINE_S, ascii=True, ncols=0, **options)


class _Lines(tqdm):
    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """Whole lines, where tqdm begins each with a carriage return."""

        def write(text: str) -> None:
            if text.strip():
                file.write(f"{text.strip()}\n")
                file.flush()

        return write
