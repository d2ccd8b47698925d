"""What people write in an expression from the habit of another language, and how it is written here."""

import re
from collections.abc import Container, Iterator

_BLANK = re.compile(r"//[^\n]*|slo\s*\[\s*(?:\"[-\w.]+\"|'[-\w.]+')\s*\]", re.ASCII)
"""Comments, and the one place where text may stand."""
_SLIPS = re.compile(
    r"(?<![\w.])(?P<share>\d+(?:\.\d+)?)\s*%(?!\s*[\w.(])"
    r"|(?<![\w.])(?P<time>\d+(?:\.\d+)?)(?P<unit>ms|s|m|h)\b"
    r"|\b(?P<word>and|or|not|AND|OR|NOT)\b"
    r"|(?<![\w.])(?P<comma>\d+,\d+)\b"
    r"|(?P<turned>=[<>])"
    r"|(?<![<>=!])(?P<equals>=)(?!=)"
    r"|(?<!&)(?P<amp>&)(?!&)|(?<!\|)(?P<bar>\|)(?!\|)"
    r"|(?P<hash>\#)"
    r"|(?P<quote>[\"'])",
    re.ASCII,
)
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_WORDS = {"and": "&&", "or": "||", "not": "!"}


def slips(text: str, inputs: Container[str]) -> Iterator[tuple[int, str]]:
    """Where each one stands, and a message; an input may be called `and`."""
    bare = _BLANK.sub(lambda found: " " * len(found[0]), text)
    for found in _SLIPS.finditer(bare):
        kind, written = str(found.lastgroup), found[0]
        if kind == "word" and written in inputs:
            continue
        yield found.start(), _message(kind, written, found)
        if kind == "quote":
            # What stands between quotes is no expression.
            return


def _message(kind: str, written: str, found: re.Match[str]) -> str:
    match kind:
        case "share":
            return f"write {float(found['share']) / 100:g} for {written}: percentages are for fields"
        case "unit":
            seconds = float(found["time"]) * _SECONDS[found["unit"]]
            return f"write {seconds:g} for {written}: durations are for fields, here are seconds"
        case "word":
            return f"write {_WORDS[written.lower()]} for '{written}'"
        case "comma":
            return f"write {written.replace(',', '.')} for {written}"
        case "turned":
            return f"write {written[::-1]} for {written}"
        case "equals":
            return "write == for ="
        case "amp" | "bar":
            return f"write {written * 2} for {written}"
        case "hash":
            return "a comment begins with //"
    return "there is no text in expressions, only numbers"
