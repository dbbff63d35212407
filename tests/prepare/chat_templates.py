"""Chat templates that behave as those of the popular families are published to, each in words of our own.

They are here for what they do to a conversation (where the system text goes, what ends a turn, what changes once turns
follow), not for every sentence of the originals.
"""

from collections.abc import Callable
from dataclasses import dataclass


def always(lead: str, end: str, strip: bool = False) -> Callable[[list[str]], list[str]]:
    """What the responses are where each turn is written alike."""
    return lambda answers: [lead + (a.strip() if strip else a) + end for a in answers]


@dataclass(frozen=True)
class Family:
    """``expected``: answers of a plain conversation -> the responses. ``system``: the template has such a role."""

    template: str
    specials: tuple[str, ...]
    eos: str
    expected: Callable[[list[str]], list[str]]
    bos: str | None = None
    system: bool = True
    called: str | None = None  # the response that calls f with {"x": 1}, in a template with tools
    answered: str | None = None  # the response "four" after the tool's result


FIRST_SYSTEM = (
    "{%- set ns = namespace(system='') -%}{%- if messages[0].role == 'system' -%}{%- set ns.system = messages[0].content -%}"
    "{%- set turns = messages[1:] -%}{%- else -%}{%- set turns = messages -%}{%- endif -%}"
)
IM = ("<|im_start|>", "<|im_end|>")

CHATML = Family(
    "{%- for m in messages -%}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}",
    IM, "<|im_end|>", always("", "<|im_end|>"),
)  # fmt: skip

LLAMA_2 = Family(
    FIRST_SYSTEM + "{%- for m in turns -%}{%- if m.role == 'user' -%}{{ bos_token ~ '[INST] ' }}"
    "{%- if loop.first and ns.system -%}{{ '<<SYS>>\n' ~ ns.system ~ '\n<</SYS>>\n\n' }}{%- endif -%}"
    "{{ m.content | trim ~ ' [/INST]' }}{%- else -%}{{ ' ' ~ m.content | trim ~ ' ' ~ eos_token }}{%- endif -%}{%- endfor -%}",
    ("<s>", "</s>"), "</s>", always(" ", " </s>", strip=True), bos="<s>",
)  # fmt: skip

_LLAMA_HEAD = "'<|start_header_id|>' ~ {} ~ '<|end_header_id|>\n\n'"
LLAMA_3 = Family(
    FIRST_SYSTEM + "{{ bos_token }}{%- if ns.system or tools -%}{{ " + _LLAMA_HEAD.format("'system'") + " }}"
    "{%- for t in tools or [] -%}{{ t | tojson(indent=4) ~ '\n\n' }}{%- endfor -%}{{ ns.system | trim ~ '<|eot_id|>' }}"
    "{%- endif -%}{%- for m in turns -%}{%- if m.tool_calls -%}{%- set c = m.tool_calls[0].function -%}{{ "
    + _LLAMA_HEAD.format("'assistant'")
    + " ~ '{\"name\": \"' ~ c.name ~ '\", \"parameters\": ' ~ c.arguments | tojson ~ '}<|eot_id|>' }}"
    "{%- elif m.role == 'tool' -%}{{ " + _LLAMA_HEAD.format("'ipython'") + " ~ m.content | tojson ~ '<|eot_id|>' }}"
    "{%- else -%}{{ " + _LLAMA_HEAD.format("m.role") + " ~ m.content | trim ~ '<|eot_id|>' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ " + _LLAMA_HEAD.format("'assistant'") + " }}{%- endif -%}",
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>",
    always("", "<|eot_id|>", strip=True), bos="<|begin_of_text|>",
    called='{"name": "f", "parameters": {"x": 1}}<|eot_id|>', answered="four<|eot_id|>",
)  # fmt: skip

MISTRAL_V1 = Family(
    FIRST_SYSTEM + "{{ bos_token }}{%- for m in turns -%}{%- if m.role == 'user' -%}{{ ' [INST] ' }}"
    "{%- if loop.first and ns.system -%}{{ ns.system ~ '\n\n' }}{%- endif -%}{{ m.content ~ ' [/INST]' }}"
    "{%- else -%}{{ ' ' ~ m.content ~ eos_token }}{%- endif -%}{%- endfor -%}",
    ("<s>", "</s>"), "</s>", always(" ", "</s>"), bos="<s>",
)  # fmt: skip

# System text and tools stand at the last question, and move on with it.
MISTRAL_V3 = Family(
    FIRST_SYSTEM + "{%- set at = namespace(last=-1) -%}{%- for m in turns -%}{%- if m.role == 'user' -%}"
    "{%- set at.last = loop.index0 -%}{%- endif -%}{%- endfor -%}{{ bos_token }}{%- for m in turns -%}"
    "{%- if m.role == 'user' -%}{%- if tools and loop.index0 == at.last -%}"
    "{{ '[AVAILABLE_TOOLS] ' ~ tools | tojson ~ '[/AVAILABLE_TOOLS]' }}{%- endif -%}{{ '[INST] ' }}"
    "{%- if ns.system and loop.index0 == at.last -%}{{ ns.system ~ '\n\n' }}{%- endif -%}{{ m.content ~ '[/INST]' }}"
    "{%- elif m.tool_calls -%}{{ '[TOOL_CALLS] [' }}{%- for c in m.tool_calls -%}"
    "{%- if c.id | length != 9 -%}{{ raise_exception('ids have nine letters') }}{%- endif -%}"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}{%- endfor -%}{{ ']' ~ eos_token }}"
    "{%- elif m.role == 'tool' -%}{{ '[TOOL_RESULTS] {\"content\": ' ~ m.content ~ ', \"call_id\": \"' ~ m.tool_call_id "
    "~ '\"}[/TOOL_RESULTS]' }}{%- else -%}{{ ' ' ~ m.content ~ eos_token }}{%- endif -%}{%- endfor -%}",
    ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
     "[/TOOL_RESULTS]"), "</s>", always(" ", "</s>"), bos="<s>",
    called='[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}, "id": "abcdefghi"}]</s>', answered=" four</s>",
)  # fmt: skip

MISTRAL_V7 = Family(
    "{{ bos_token }}{%- for m in messages -%}{%- if m.role == 'system' -%}"
    "{{ '[SYSTEM_PROMPT] ' ~ m.content ~ '[/SYSTEM_PROMPT]' }}{%- elif m.role == 'user' -%}"
    "{{ '[INST] ' ~ m.content ~ '[/INST]' }}{%- else -%}{{ ' ' ~ m.content ~ eos_token }}{%- endif -%}{%- endfor -%}",
    ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), "</s>", always(" ", "</s>"), bos="<s>",
)  # fmt: skip

GEMMA = Family(
    FIRST_SYSTEM + "{{ bos_token }}{%- for m in turns -%}{%- set who = 'model' if m.role == 'assistant' else m.role -%}"
    "{{ '<start_of_turn>' ~ who ~ '\n' }}{%- if loop.first and ns.system -%}{{ ns.system ~ '\n\n' }}{%- endif -%}"
    "{{ m.content | trim ~ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}",
    ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", always("", "<end_of_turn>", strip=True), bos="<bos>",
)  # fmt: skip

# The end of text stands at the very end alone; other roles are left out without a word.
PHI_3 = Family(
    "{%- for m in messages -%}{%- if m.role in ['system', 'user', 'assistant'] -%}"
    "{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ '<|end|>\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- else -%}{{ eos_token }}{%- endif -%}",
    ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"), "<|endoftext|>",
    lambda answers: [a + "<|end|>" for a in answers[:-1]] + [answers[-1] + "<|end|>\n<|endoftext|>"],
)  # fmt: skip

PHI_4 = Family(
    "{%- for m in messages -%}{{ '<|im_start|>' ~ m.role ~ '<|im_sep|>' ~ m.content ~ '<|im_end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant<|im_sep|>' }}{%- endif -%}",
    (*IM, "<|im_sep|>", "<|endoftext|>"), "<|endoftext|>", always("", "<|im_end|>"),
)  # fmt: skip

_QWEN_TOOLS = (
    FIRST_SYSTEM
    + "{%- if tools -%}{{ '<|im_start|>system\n' ~ ns.system ~ '\n\n# Tools\n<tools>' }}{%- for t in tools -%}"
    "{{ '\n' ~ t | tojson }}{%- endfor -%}{{ '\n</tools><|im_end|>\n' }}{%- elif ns.system or DEFAULT -%}"
    "{{ '<|im_start|>system\n' ~ (ns.system or DEFAULT) ~ '<|im_end|>\n' }}{%- endif -%}"
)
_QWEN_RESULT = (
    "{%- elif m.role == 'tool' -%}{%- if loop.first or turns[loop.index0 - 1].role != 'tool' -%}{{ '<|im_start|>user' }}"
    "{%- endif -%}{{ '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' }}"
    "{%- if loop.last or turns[loop.index0 + 1].role != 'tool' -%}{{ '<|im_end|>\n' }}{%- endif -%}"
    "{%- else -%}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
_QWEN_CALLS = (
    '{%- for c in m.tool_calls -%}{{ \'\n<tool_call>\n{"name": "\' ~ c.function.name ~ \'", "arguments": \' '
    "~ c.function.arguments | tojson ~ '}\n</tool_call>' }}{%- endfor -%}{{ '<|im_end|>\n' }}"
)
QWEN_2_5 = Family(
    "{%- set DEFAULT = 'You are Qwen, a helpful assistant.' -%}" + _QWEN_TOOLS + "{%- for m in turns -%}"
    "{%- if m.tool_calls -%}{{ '<|im_start|>assistant' }}{%- if m.content -%}{{ '\n' ~ m.content }}{%- endif -%}"
    + _QWEN_CALLS + _QWEN_RESULT,
    IM, "<|im_end|>", always("", "<|im_end|>"),
    called='<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>', answered="four<|im_end|>",
)  # fmt: skip

# Reasoning is kept after the last question alone; the last turn always has a block for it.
QWEN_3 = Family(
    "{%- set DEFAULT = '' -%}" + _QWEN_TOOLS + "{%- set at = namespace(last=-1) -%}{%- for m in turns -%}"
    "{%- if m.role == 'user' and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) -%}"
    "{%- set at.last = loop.index0 -%}{%- endif -%}{%- endfor -%}{%- for m in turns -%}"
    "{%- if m.role == 'assistant' -%}{%- set said = m.content or '' -%}{%- set why = m.reasoning_content or '' -%}"
    "{%- if not why and '</think>' in said -%}{%- set why = said.split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}{{ '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > at.last and (loop.last or why) -%}{{ '<think>\n' ~ why.strip('\n') ~ '\n</think>\n\n' }}"
    "{%- endif -%}{{ said }}{%- if m.tool_calls -%}" + _QWEN_CALLS + "{%- else -%}{{ '<|im_end|>\n' }}{%- endif -%}"
    + _QWEN_RESULT,
    IM, "<|im_end|>", lambda a: [x + "<|im_end|>" for x in a[:-1]] + ["<think>\n\n</think>\n\n" + a[-1] + "<|im_end|>"],
    called='\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>',
    answered="<think>\n\n</think>\n\nfour<|im_end|>",
)  # fmt: skip

_DS_BOS, _DS_EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
DEEPSEEK_V2 = Family(
    "{{ bos_token }}{%- for m in messages -%}{%- if m.role == 'user' -%}{{ 'User: ' ~ m.content ~ '\n\n' }}"
    "{%- elif m.role == 'assistant' -%}{{ 'Assistant: ' ~ m.content ~ eos_token }}{%- elif m.role == 'system' -%}"
    "{{ m.content ~ '\n\n' }}{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}",
    (_DS_BOS, _DS_EOS), _DS_EOS, always(" ", _DS_EOS), bos=_DS_BOS,
)  # fmt: skip

# Tool results have no header of a turn, and the answer to them has none either.
_DEEPSEEK = (
    "{%- set ns = namespace(system='', result=false) -%}{%- for m in messages -%}{%- if m.role == 'system' -%}"
    "{%- set ns.system = ns.system ~ m.content -%}{%- endif -%}{%- endfor -%}{{ bos_token ~ ns.system }}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{{ '<｜User｜>' ~ m.content ~ '<｜Assistant｜>' }}"
    "{%- elif m.role == 'assistant' and m.tool_calls -%}{{ '<｜tool▁calls▁begin｜>' }}{%- for c in m.tool_calls -%}"
    "{{ '<｜tool▁call▁begin｜>' + c.type + '<｜tool▁sep｜>' + c.function.name + '\n```json\n' + c.function.arguments + "
    "'\n```<｜tool▁call▁end｜>' }}{%- endfor -%}{{ '<｜tool▁calls▁end｜>' ~ eos_token }}"
    "{%- elif m.role == 'assistant' -%}{%- if ns.result -%}{{ '<｜tool▁outputs▁end｜>' }}{%- endif -%}"
    "{%- set ns.result = false -%}{{ THINK ~ eos_token }}{%- elif m.role == 'tool' -%}"
    "{%- if not ns.result -%}{{ '<｜tool▁outputs▁begin｜>' }}{%- endif -%}{%- set ns.result = true -%}"
    "{{ '<｜tool▁output▁begin｜>' ~ m.content ~ '<｜tool▁output▁end｜>' }}{%- endif -%}{%- endfor -%}"
    "{%- if ns.result -%}{{ '<｜tool▁outputs▁end｜>' }}{%- endif -%}"
)
_DS_TOKENS = (
    _DS_BOS, _DS_EOS, "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
)  # fmt: skip
_DS_CALL = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"x": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    + _DS_EOS
)
DEEPSEEK_V3 = Family(
    _DEEPSEEK.replace("THINK", "m.content") + "{# tools #}", _DS_TOKENS, _DS_EOS, always("", _DS_EOS), bos=_DS_BOS,
    called=_DS_CALL, answered="four" + _DS_EOS,
)  # fmt: skip
# The generation prompt opens a thought; finished turns have none.
DEEPSEEK_R1 = Family(
    _DEEPSEEK.replace("THINK", "m.content.split('</think>')[-1]").replace(" ~ '<｜Assistant｜>' }}", " }}").replace(
        "{%- set ns.result = false -%}{{ m", "{%- if not ns.result -%}{{ '<｜Assistant｜>' }}{%- endif -%}"
        "{%- set ns.result = false -%}{{ m"
    ) + "{%- if add_generation_prompt and not ns.result -%}{{ '<｜Assistant｜><think>\n' }}{%- endif -%}",
    _DS_TOKENS, _DS_EOS, always("", _DS_EOS), bos=_DS_BOS,
)  # fmt: skip

# No token ends a turn: the next role does.
GLM_4 = Family(
    "{{ '[gMASK]<sop>' }}{%- for m in messages -%}"
    "{{ '<|' ~ ('observation' if m.role == 'tool' else m.role) ~ '|>\n' ~ m.content }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}",
    ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"), "<|endoftext|>",
    always("\n", ""),
)  # fmt: skip

# The last turn returns, earlier ones end; earlier analysis is dropped; the system text is the developer's.
GPT_OSS = Family(
    "{{ '<|start|>system<|message|>You are a model.\nReasoning: medium<|end|>' }}{%- for m in messages -%}"
    "{%- if m.role in ['system', 'developer'] -%}{{ '<|start|>developer<|message|># Instructions\n\n' ~ m.content }}"
    "{%- for t in tools or [] -%}{{ '\n# Tools\n' ~ t | tojson }}{%- endfor -%}{{ '<|end|>' }}"
    "{%- elif m.tool_calls -%}{%- set c = m.tool_calls[0].function -%}{%- if m.thinking -%}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' ~ m.thinking ~ '<|end|>' }}{%- endif -%}"
    "{{ '<|start|>assistant to=functions.' ~ c.name ~ '<|channel|>commentary json<|message|>' ~ c.arguments | tojson "
    "~ '<|call|>' }}{%- elif m.role == 'tool' -%}"
    "{{ '<|start|>functions to=assistant<|channel|>commentary<|message|>' ~ m.content | tojson ~ '<|end|>' }}"
    "{%- elif m.role == 'assistant' -%}{%- if m.thinking and loop.last -%}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' ~ m.thinking ~ '<|end|>' }}{%- endif -%}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' ~ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{%- else -%}{{ '<|start|>user<|message|>' ~ m.content ~ '<|end|>' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start|>assistant' }}{%- endif -%}",
    ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>"), "<|return|>",
    lambda a: [f"<|channel|>final<|message|>{x}<|end|>" for x in a[:-1]] + [f"<|channel|>final<|message|>{a[-1]}<|return|>"],
    called=' to=functions.f<|channel|>commentary json<|message|>{"x": 1}<|call|>',
    answered="<|channel|>final<|message|>four<|return|>",
)  # fmt: skip

# A word of the system text switches the reasoning off, and is taken out of it.
SMOLLM_3 = Family(
    FIRST_SYSTEM + "{%- set mode = '/no_think' if '/no_think' in ns.system else '/think' -%}"
    "{%- set own = ns.system.replace('/no_think', '').replace('/think', '').rstrip() -%}"
    "{{ '<|im_start|>system\n## Metadata\n\nReasoning Mode: ' ~ mode ~ '\n\n' ~ own ~ '\n\n<|im_end|>\n' }}"
    "{%- for m in turns -%}{%- if m.role == 'assistant' -%}{{ '<|im_start|>assistant\n' }}{%- if mode == '/no_think' -%}"
    "{{ '<think>\n\n</think>\n' }}{%- endif -%}{% generation %}{{ m.content.lstrip('\n') ~ '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{%- else -%}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}",
    IM, "<|im_end|>", lambda answers: [a.lstrip("\n") + "<|im_end|>" for a in answers],
)  # fmt: skip

ZEPHYR = Family(
    "{%- for m in messages -%}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ eos_token ~ '\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}",
    ("<s>", "</s>"), "</s>", always("", "</s>"),
)  # fmt: skip

VICUNA = Family(
    FIRST_SYSTEM + "{{ ns.system or 'A chat between a user and an assistant.' }}{%- for m in turns -%}"
    "{%- if m.role == 'user' -%}{{ ' USER: ' ~ m.content | trim }}{%- else -%}"
    "{{ ' ASSISTANT: ' ~ m.content | trim ~ eos_token }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}",
    ("<s>", "</s>"), "</s>", always(" ", "</s>", strip=True),
)  # fmt: skip

_TURN, _END = "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"
COMMAND_R = Family(
    "{{ bos_token }}{%- for m in messages -%}{%- set who = {'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM'} -%}"
    "{{ '" + _TURN + "<|' ~ who[m.role] ~ '_TOKEN|>' ~ m.content | trim ~ '" + _END + "' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '" + _TURN + "<|CHATBOT_TOKEN|>' }}{%- endif -%}",
    ("<BOS_TOKEN>", _TURN, _END, "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"), _END,
    always("", _END, strip=True), bos="<BOS_TOKEN>",
)  # fmt: skip

GRANITE = Family(
    FIRST_SYSTEM + "{{ '<|start_of_role|>system<|end_of_role|>' ~ (ns.system or 'You are Granite.') ~ '<|end_of_text|>\n' }}"
    "{%- if tools -%}{{ '<|start_of_role|>tools<|end_of_role|>' ~ tools | tojson(indent=4) ~ '<|end_of_text|>\n' }}{%- endif -%}"
    "{%- for m in turns -%}{{ '<|start_of_role|>' ~ ('tool_response' if m.role == 'tool' else m.role) ~ '<|end_of_role|>' }}"
    "{%- if m.tool_calls -%}{{ '<|tool_call|>' ~ m.tool_calls | map(attribute='function') | list | tojson }}{%- else -%}"
    "{{ m.content }}{%- endif -%}{{ '<|end_of_text|>' }}{%- if not loop.last or add_generation_prompt -%}{{ '\n' }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif -%}",
    ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>"), "<|end_of_text|>",
    always("", "<|end_of_text|>"),
    called='<|tool_call|>[{"name": "f", "arguments": {"x": 1}}]<|end_of_text|>', answered="four<|end_of_text|>",
)  # fmt: skip

# Names and line breaks alone; nothing ends a turn.
FALCON = Family(
    "{%- set who = {'system': 'System', 'user': 'User', 'assistant': 'Falcon'} -%}{%- for m in messages -%}"
    "{%- if not loop.first -%}{{ '\n' }}{%- endif -%}{{ who[m.role] ~ ': ' ~ m.content }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '\nFalcon:' }}{%- endif -%}",
    ("<|endoftext|>",), "<|endoftext|>", always(" ", ""),
)  # fmt: skip

OLMO = Family(
    "{{ bos_token }}{%- for m in messages -%}{{ '<|' ~ m.role ~ '|>\n' ~ m.content }}{%- if m.role == 'assistant' -%}"
    "{{ eos_token }}{%- endif -%}{%- if not loop.last or m.role != 'assistant' -%}{{ '\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}",
    ("<|endoftext|>",), "<|endoftext|>", always("", "<|endoftext|>"), bos="<|endoftext|>",
)  # fmt: skip

FAMILIES = {
    "ChatML": CHATML, "Llama 2": LLAMA_2, "Llama 3": LLAMA_3, "Mistral v1": MISTRAL_V1, "Mistral v3": MISTRAL_V3,
    "Mistral v7": MISTRAL_V7, "Gemma": GEMMA, "Phi-3": PHI_3, "Phi-4": PHI_4, "Qwen2.5": QWEN_2_5, "Qwen3": QWEN_3,
    "DeepSeek V2": DEEPSEEK_V2, "DeepSeek V3": DEEPSEEK_V3, "DeepSeek R1": DEEPSEEK_R1, "GLM-4": GLM_4, "gpt-oss": GPT_OSS,
    "SmolLM3": SMOLLM_3, "Zephyr": ZEPHYR, "Vicuna": VICUNA, "Command-R": COMMAND_R, "Granite": GRANITE, "Falcon": FALCON,
    "OLMo": OLMO,
}  # fmt: skip
