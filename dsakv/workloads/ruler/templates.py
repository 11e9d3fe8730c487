"""RULER's tasks: prompt templates, answer prefixes and answer lengths, which are part of the benchmark's definition.

Quoted as data from NVIDIA RULER, https://github.com/NVIDIA/RULER (``scripts/data/synthetic/constants.py``,
``scripts/synthetic.yaml``), Copyright NVIDIA CORPORATION, Apache-2.0; the needle templates also in the singular form
that RULER makes of them for one question about one value.
"""

from __future__ import annotations

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
NEEDLE_PROMPT = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {key} mentioned in the provided text?"
)
NEEDLE_ANSWER = " The special magic {kind} for {key} mentioned in the provided text is"
NEEDLES_PROMPT = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind}s afterwards.\n{context}\n"
    "What are all the special magic {kind}s for {key} mentioned in the provided text?"
)
NEEDLES_ANSWER = " The special magic {kind}s for {key} mentioned in the provided text are"

TRACKING_PROMPT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
TRACKING_ANSWER = (
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{count} variables are assigned the value {value}, they are: "
)

COMMON_WORDS_PROMPT = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
COMMON_WORDS_ANSWER = " Answer: The top 10 words that appear most often in the list are:"

FREQUENT_WORDS_PROMPT = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
FREQUENT_WORDS_ANSWER = " Answer: According to the coded text above, the three most frequently appeared words are:"

ANSWER_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
"""Tokens that RULER sets aside for the answer, by the first part of the task's name."""

TASKS = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
)
"""RULER's thirteen tasks."""
