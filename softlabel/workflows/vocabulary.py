"""A vocabulary: a text file of class names, one per line, with phrasings for each if the name alone will not do."""

from pathlib import Path

from softlabel.errors import RecipeError


def read_vocabulary(path: Path) -> dict[str, tuple[str, ...]]:
    """Class names, and the phrasings to look for each by.

    A line is a name, or ``name: phrasing, phrasing``; ``#`` begins a comment. A name alone is its own phrasing.

    Raises:
        RecipeError: The file cannot be read, is malformed or names no class, or names one twice or ``all``.
    """
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise RecipeError(f"no vocabulary at {path}: give a text file with a class name per line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the vocabulary {path}: {error}") from None
    found: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        name, colon, rest = (part.strip() for part in text.partition(":"))
        if not text:
            continue
        phrasings = tuple(part.strip() for part in rest.split(",") if part.strip())
        if not name or (colon and not phrasings):
            raise RecipeError(f"{path}, line {number}: write a name, or `name: phrasing, phrasing`")
        if name in found or name == "all":
            why = "is named twice" if name in found else "is what results call all classes together"
            raise RecipeError(f"{path}, line {number}: {name} {why}: remove or rename it")
        found[name] = phrasings or (name,)
    if not found:
        raise RecipeError(f"{path} names no class: write one a line")
    return found
