"""Where the needles stand in a RULER prompt.

RULER's rows do not say, so they are found by the sentences in which RULER hides them: for the needle tasks
``One of the special magic ... for <key> is: <value>.`` with a gold string as value, for variable tracking
``VAR <name> = ...`` with a gold string as name. The other tasks (cwe, fwe, qa) hide no sentence and have no needles.
"""

from __future__ import annotations

import re

_SENTENCES = {
    "niah": re.compile(r"One of the special magic [a-z]+ for [^\n:]+ is: ([^\s.]+)\."),
    "vt": re.compile(r"VAR ([A-Z]+) = (?:VAR [A-Z]+|[0-9]+)"),
}


def needle_spans(task: str, prompt: str, answers: tuple[str, ...]) -> list[tuple[int, int]]:
    """Half-open character ranges of the sentences that hold a gold string, in the order of the prompt."""
    sentence = _SENTENCES.get(task.split("_")[0])
    if sentence is None:
        return []
    return [match.span() for match in sentence.finditer(prompt) if match[1] in answers]
