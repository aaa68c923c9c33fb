"""Small chat templates whose text is laid out as that of well-known families of models."""

from __future__ import annotations

from dataclasses import dataclass

Piece = tuple[str, bool]  # a text, and whether it carries the loss


@dataclass(frozen=True)
class Family:
    """A template, its special tokens, and pieces of text made by hand.

    Attributes:
        once: of the conversation ``ONCE``.
        twice: of ``TWICE``; empty where its earlier turns cannot be told apart.
        last: of ``TWICE`` with ``--loss-on last-assistant``.
    """

    template: str
    special: tuple[str, ...]
    once: tuple[Piece, ...]
    twice: tuple[Piece, ...]
    last: tuple[Piece, ...]


SYSTEM = {"role": "system", "content": "Be brief."}
ONCE = [{"role": "user", "content": "How tall?"}, {"role": "assistant", "content": "Two metres."}]
AGAIN = [{"role": "user", "content": "And wide?"}, {"role": "assistant", "content": "One."}]
TWICE = [SYSTEM, *ONCE, *AGAIN]

# Thoughts stand before an answer to the last question alone, empty ones before the last message.
QWEN3 = Family(
    """
{%- set last = namespace(asked=-1) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{%- set last.asked = loop.index0 %}{%- endif %}
{%- endfor %}
{%- if tools %}{{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif m.role != 'assistant' %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- else %}
{%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > last.asked and (loop.last or thought) %}
{{- '<think>\\n' + thought.strip() + '\\n</think>\\n\\n' }}
{%- endif %}
{{- m.content if m.content is string else '' }}
{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""".strip(),
    ("<|im_start|>", "<|im_end|>"),
    (
        ("<|im_start|>user\nHow tall?<|im_end|>\n<|im_start|>assistant\n", False),
        ("<think>\n\n</think>\n\nTwo metres.<|im_end|>", True),
        ("\n", False),
    ),
    (
        ("<|im_start|>system\nBe brief.<|im_end|>\n", False),
        ("<|im_start|>user\nHow tall?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Two metres.<|im_end|>", True),
        ("\n<|im_start|>user\nAnd wide?<|im_end|>\n<|im_start|>assistant\n", False),
        ("<think>\n\n</think>\n\nOne.<|im_end|>", True),
        ("\n", False),
    ),
    (
        ("<|im_start|>system\nBe brief.<|im_end|>\n", False),
        ("<|im_start|>user\nHow tall?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Two metres.<|im_end|>", False),
        ("\n<|im_start|>user\nAnd wide?<|im_end|>\n<|im_start|>assistant\n", False),
        ("<think>\n\n</think>\n\nOne.<|im_end|>", True),
        ("\n", False),
    ),
)

# A first message of the system that says what day it is, in any case.
LLAMA_3 = Family(
    """
{{- bos_token }}
{%- set day = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + day + '\\n\\n' }}
{{- system + '<|eot_id|>' }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
{{- (m.content | trim) + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""".strip(),
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    (
        ("<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n", False),
        ("<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHow tall?<|eot_id|>", False),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
        ("Two metres.<|eot_id|>", True),
    ),
    (
        ("<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n", False),
        ("Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHow tall?", False),
        ("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", False),
        ("Two metres.<|eot_id|>", True),
        ("<|start_header_id|>user<|end_header_id|>\n\nAnd wide?<|eot_id|>", False),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
        ("One.<|eot_id|>", True),
    ),
    (
        ("<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n", False),
        ("Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHow tall?", False),
        ("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", False),
        ("Two metres.<|eot_id|>", False),
        ("<|start_header_id|>user<|end_header_id|>\n\nAnd wide?<|eot_id|>", False),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
        ("One.<|eot_id|>", True),
    ),
)

# The assistant is called the model; what the system says begins the first question.
GEMMA_3 = Family(
    """
{{- bos_token }}
{%- if messages[0].role == 'system' %}
{%- set first = messages[0].content + '\\n\\n' %}{%- set messages = messages[1:] %}
{%- else %}{%- set first = '' %}{%- endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{{- (first if loop.first else '') + (m.content | trim) + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
""".strip(),
    ("<start_of_turn>", "<end_of_turn>"),
    (
        ("<s><start_of_turn>user\nHow tall?<end_of_turn>\n<start_of_turn>model\n", False),
        ("Two metres.<end_of_turn>", True),
        ("\n", False),
    ),
    (
        ("<s><start_of_turn>user\nBe brief.\n\nHow tall?<end_of_turn>\n", False),
        ("<start_of_turn>model\n", False),
        ("Two metres.<end_of_turn>", True),
        ("\n<start_of_turn>user\nAnd wide?<end_of_turn>\n<start_of_turn>model\n", False),
        ("One.<end_of_turn>", True),
        ("\n", False),
    ),
    (
        ("<s><start_of_turn>user\nBe brief.\n\nHow tall?<end_of_turn>\n", False),
        ("<start_of_turn>model\n", False),
        ("Two metres.<end_of_turn>", False),
        ("\n<start_of_turn>user\nAnd wide?<end_of_turn>\n<start_of_turn>model\n", False),
        ("One.<end_of_turn>", True),
        ("\n", False),
    ),
)

# No words before an answer; what the system says stands in the last question.
MISTRAL = Family(
    """
{{- bos_token }}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content + '\\n\\n' %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{%- set last = namespace(asked=-1) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{%- set last.asked = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{{- '[INST] ' + (system if loop.index0 == last.asked else '') + m.content + '[/INST]' }}
{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}
{%- endfor %}
""".strip(),
    ("[INST]", "[/INST]"),
    (("<s>[INST] How tall?[/INST]", False), (" Two metres.</s>", True)),
    (),
    (
        ("<s>[INST] How tall?[/INST] Two metres.</s>", False),
        ("[INST] Be brief.\n\nAnd wide?[/INST]", False),
        (" One.</s>", True),
    ),
)

# Channels; the last answer ends with a token of its own, earlier thoughts are left out.
GPT_OSS = Family(
    """
{{- '<|start|>system<|message|>Current date: ' + strftime_now("%Y-%m-%d") + '<|end|>' }}
{%- if messages[0].role == 'system' %}
{{- '<|start|>developer<|message|># Instructions\\n\\n' + messages[0].content + '<|end|>' }}
{%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}
{%- elif loop.last and not add_generation_prompt %}
{%- if m.thinking %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
{%- endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
{%- else %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}
""".strip(),
    ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),
    (
        ("<|start|>system<|message|>Current date: 2024-07-26<|end|>", False),
        ("<|start|>user<|message|>How tall?<|end|><|start|>assistant", False),
        ("<|channel|>final<|message|>Two metres.<|return|>", True),
    ),
    (
        ("<|start|>system<|message|>Current date: 2024-07-26<|end|>", False),
        ("<|start|>developer<|message|># Instructions\n\nBe brief.<|end|>", False),
        ("<|start|>user<|message|>How tall?<|end|><|start|>assistant", False),
        ("<|channel|>final<|message|>Two metres.<|end|>", True),
        ("<|start|>user<|message|>And wide?<|end|><|start|>assistant", False),
        ("<|channel|>final<|message|>One.<|return|>", True),
    ),
    (
        ("<|start|>system<|message|>Current date: 2024-07-26<|end|>", False),
        ("<|start|>developer<|message|># Instructions\n\nBe brief.<|end|>", False),
        ("<|start|>user<|message|>How tall?<|end|><|start|>assistant", False),
        ("<|channel|>final<|message|>Two metres.<|end|>", False),
        ("<|start|>user<|message|>And wide?<|end|><|start|>assistant", False),
        ("<|channel|>final<|message|>One.<|return|>", True),
    ),
)

# With marks of what is generated, which leave the line's end out.
MARKED = Family(
    """
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{- m.content + '<|im_end|>' }}{%- endif %}
{{- '\\n' }}
{%- endfor %}
""".strip(),
    ("<|im_start|>", "<|im_end|>"),
    (
        ("<|im_start|>user\nHow tall?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Two metres.<|im_end|>", True),
        ("\n", False),
    ),
    (
        ("<|im_start|>system\nBe brief.<|im_end|>\n", False),
        ("<|im_start|>user\nHow tall?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Two metres.<|im_end|>", True),
        ("\n<|im_start|>user\nAnd wide?<|im_end|>\n<|im_start|>assistant\n", False),
        ("One.<|im_end|>", True),
        ("\n", False),
    ),
    (
        ("<|im_start|>system\nBe brief.<|im_end|>\n", False),
        ("<|im_start|>user\nHow tall?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Two metres.<|im_end|>", False),
        ("\n<|im_start|>user\nAnd wide?<|im_end|>\n<|im_start|>assistant\n", False),
        ("One.<|im_end|>", True),
        ("\n", False),
    ),
)

FAMILIES = {
    "Qwen3": QWEN3, "Llama 3": LLAMA_3, "Gemma 3": GEMMA_3, "Mistral": MISTRAL,
    "gpt-oss": GPT_OSS, "marks": MARKED,
}  # fmt: skip
