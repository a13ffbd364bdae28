"""Error messages on names that do not exist."""

import difflib
from collections.abc import Iterable, Sequence


def nearest(name: str, known: Iterable[str]) -> str:
    """Ends an error message on a mistyped name: `` Did you mean 'x'? Known: …``."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"{hint} Known: {', '.join(known) or 'none'}."


def listed(names: Sequence[str], most: int = 10) -> str:
    """Lists names in an error message, not all of very many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{printable(name)}'" for name in names[:most]) + more


def printable(text: str) -> str:
    """Writes a file name of any bytes so that it can be printed: odd characters as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
