"""Chat templates, as Jinja, for tokenizers that come without one."""

from __future__ import annotations

BYTE_CHAT_TEMPLATE = """\
{{- '<|begin|>' }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- message['content'] }}
    {%- elif message['role'] == 'user' %}
        {{- '<|User|>' + message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<|Assistant|>' + message['content'] + '<|end|>' }}
    {%- else %}
        {{- raise_exception('unknown role: ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|Assistant|>' }}
{%- endif %}"""
"""Of the byte-level tokenizer."""

V32_TOKENS = (
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<\uff5cUser\uff5c>",
    "<\uff5cAssistant\uff5c>",
    "</think>",
)
"""The special tokens that DeepSeek-V3.2 writes a conversation with, by full-width bars and low lines."""

V32_CHAT_TEMPLATE = (
    BYTE_CHAT_TEMPLATE.replace("<|begin|>", V32_TOKENS[0])
    .replace("<|end|>", V32_TOKENS[1])
    .replace("<|User|>", V32_TOKENS[2])
    .replace("<|Assistant|>", V32_TOKENS[3] + V32_TOKENS[4])
)
"""DeepSeek-V3.2's format without thinking. Its checkpoints hold an encoder script, which is not run, in place of a
template."""
