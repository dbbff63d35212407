"""Chat templates that behave as those of the popular families are published to, each in words of our own.

They are here for what they do to a conversation (where the system text goes, what ends a turn, what changes once turns
follow), not for every sentence of the originals.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def always(lead: str, end: str, strip: bool = False) -> Callable[[list[str]], list[str]]:
    """What the responses are where each turn is written alike."""
    return lambda answers: [lead + (a.strip() if strip else a) + end for a in answers]


@dataclass(frozen=True)
class Thought:
    """The responses "One." and "Two." with the reasoning "hm", and of how many of them it is lost.

    ``key``, ``key_lost``: where it stands under a key of the message; ``text``, ``text_lost``: between tags in its text.
    """

    key: list[str]
    key_lost: int
    text: list[str]
    text_lost: int


@dataclass(frozen=True)
class Family:
    """``expected``: answers of a plain conversation -> the responses. ``system``: the template has such a role.

    ``call``: the message that calls f, where the template does not read `tool_calls`. ``tool_use``: a second template, for
    rows with tools. ``thought``: None where the template knows nothing of reasoning.
    """

    template: str
    specials: tuple[str, ...]
    eos: str
    expected: Callable[[list[str]], list[str]]
    bos: str | None = None
    system: bool = True
    called: str | None = None  # the response that calls f with {"x": 1}, in a template with tools
    answered: str | None = None  # the response "four" after the tool's result
    call: dict[str, Any] | None = None
    tool_use: str | None = None
    thought: Thought | None = None


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

# The system text stays where it is, tools stand at the last question.
MISTRAL_V7 = Family(
    "{%- set at = namespace(last=-1) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set at.last = loop.index0 -%}"
    "{%- endif -%}{%- endfor -%}{{ bos_token }}{%- for m in messages -%}{%- if m.role == 'system' -%}"
    "{{ '[SYSTEM_PROMPT] ' ~ m.content ~ '[/SYSTEM_PROMPT]' }}{%- elif m.role == 'user' -%}"
    "{%- if tools and loop.index0 == at.last -%}{{ '[AVAILABLE_TOOLS] ' ~ tools | tojson ~ '[/AVAILABLE_TOOLS]' }}{%- endif -%}"
    "{{ '[INST] ' ~ m.content ~ '[/INST]' }}{%- elif m.role == 'tool' -%}"
    "{{ '[TOOL_RESULTS] ' ~ m.tool_call_id ~ '[TOOL_CONTENT] ' ~ m.content ~ '[/TOOL_RESULTS]' }}{%- elif m.tool_calls -%}"
    "{{ '[TOOL_CALLS] [' }}{%- for c in m.tool_calls -%}"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}"
    "{{ ', ' if not loop.last else ']' ~ eos_token }}{%- endfor -%}"
    "{%- else -%}{{ ' ' ~ m.content ~ eos_token }}{%- endif -%}{%- endfor -%}",
    ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]",
     "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[TOOL_CONTENT]", "[/TOOL_RESULTS]"), "</s>", always(" ", "</s>"), bos="<s>",
    called='[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}, "id": "abcdefghi"}]</s>', answered=" four</s>",
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
    thought=Thought(*[["One.<|im_end|>", "<think>\nhm\n</think>\n\nTwo.<|im_end|>"], 1] * 2),
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
    "{%- elif m.role == 'assistant' and m.tool_calls -%}{{ CALLED ~ '<｜tool▁calls▁begin｜>' }}{%- for c in m.tool_calls -%}"
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
    _DEEPSEEK.replace("THINK", "m.content").replace("CALLED ~ ", "") + "{# tools #}", _DS_TOKENS, _DS_EOS, always("", _DS_EOS), bos=_DS_BOS,
    called=_DS_CALL, answered="four" + _DS_EOS,
)  # fmt: skip
# The generation prompt opens a thought; finished turns have none. No tool is described.
DEEPSEEK_R1 = Family(
    _DEEPSEEK.replace("THINK", "m.content.split('</think>')[-1]").replace(" ~ '<｜Assistant｜>' }}", " }}").replace(
        "CALLED", "'<｜Assistant｜>'"
    ).replace(
        "{%- set ns.result = false -%}{{ m", "{%- if not ns.result -%}{{ '<｜Assistant｜>' }}{%- endif -%}"
        "{%- set ns.result = false -%}{{ m"
    ) + "{%- if add_generation_prompt and not ns.result -%}{{ '<｜Assistant｜><think>\n' }}{%- endif -%}{# tools #}",
    _DS_TOKENS, _DS_EOS, always("", _DS_EOS), bos=_DS_BOS, called=_DS_CALL, answered="four" + _DS_EOS,
    thought=Thought(["One." + _DS_EOS, "Two." + _DS_EOS], 2, ["\n\nOne." + _DS_EOS, "\n\nTwo." + _DS_EOS], 2),
)  # fmt: skip

_GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>")
# No token ends a turn: the next role does. A call is a text whose function stands beside the role.
GLM_4 = Family(
    "{{ '[gMASK]<sop>' }}{%- if tools -%}{{ '<|system|>\n# Tools' }}{%- for t in tools -%}"
    "{{ '\n\n## ' ~ t.function.name ~ '\n\n' ~ t.function | tojson(indent=4) }}{%- endfor -%}{%- endif -%}"
    "{%- for m in messages -%}{{ '<|' ~ ('observation' if m.role == 'tool' else m.role) ~ '|>' ~ (m.metadata or '') ~ '\n' "
    "~ m.content }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}",
    _GLM, "<|endoftext|>", always("\n", ""), called='f\n{"x": 1}', answered="\nfour",
    call={"role": "assistant", "metadata": "f", "content": '{"x": 1}'},
)  # fmt: skip

# Every turn has a block for its reasoning, which is empty before the last question.
GLM_4_5 = Family(
    "{%- set at = namespace(last=-1) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set at.last = loop.index0 -%}"
    "{%- endif -%}{%- endfor -%}{{ '[gMASK]<sop>' }}{%- if tools -%}{{ '<|system|>\n# Tools\n<tools>' }}"
    "{%- for t in tools -%}{{ '\n' ~ t | tojson }}{%- endfor -%}{{ '\n</tools>' }}{%- endif -%}{%- for m in messages -%}"
    "{%- if m.role == 'assistant' -%}{%- set said = m.content or '' -%}{%- set why = m.reasoning_content or '' -%}"
    "{%- if not why and '</think>' in said -%}{%- set why = said.split('</think>')[0].split('<think>')[-1] -%}"
    "{%- set said = said.split('</think>')[-1] -%}{%- endif -%}"
    "{{ '<|assistant|>\n<think>' ~ (why.strip() if loop.index0 > at.last) ~ '</think>' }}"
    "{%- if said.strip() -%}{{ '\n' ~ said.strip() }}{%- endif -%}{%- for c in m.tool_calls or [] -%}"
    "{{ '\n<tool_call>' ~ c.function.name }}{%- for k, v in c.function.arguments.items() -%}"
    "{{ '\n<arg_key>' ~ k ~ '</arg_key>\n<arg_value>' ~ (v if v is string else v | tojson) ~ '</arg_value>' }}{%- endfor -%}"
    "{{ '\n</tool_call>' }}{%- endfor -%}{%- elif m.role == 'tool' -%}"
    "{{ '<|observation|>\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' }}"
    "{%- else -%}{{ '<|' ~ m.role ~ '|>\n' ~ m.content }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}",
    (*_GLM, "<think>", "</think>", "<tool_call>", "</tool_call>"), "<|endoftext|>",
    always("\n<think></think>\n", "", strip=True),
    called="\n<think></think>\n<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
    answered="\n<think></think>\nfour",
    thought=Thought(*[["\n<think></think>\nOne.", "\n<think>hm</think>\nTwo."], 1] * 2),
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
    thought=Thought(
        ["<|channel|>final<|message|>One.<|end|>", "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
         "<|channel|>final<|message|>Two.<|return|>"], 1,
        ["<|channel|>final<|message|><think>\nhm\n</think>\n\nOne.<|end|>",
         "<|channel|>final<|message|><think>\nhm\n</think>\n\nTwo.<|return|>"], 0,
    ),
)  # fmt: skip

# A word of the system text switches the reasoning off, and is taken out of it. Calls are texts, results are a user's.
SMOLLM_3 = Family(
    FIRST_SYSTEM + "{%- set mode = '/no_think' if '/no_think' in ns.system else '/think' -%}"
    "{%- set own = ns.system.replace('/no_think', '').replace('/think', '').rstrip() -%}"
    "{{ '<|im_start|>system\n## Metadata\n\nReasoning Mode: ' ~ mode ~ '\n\n' ~ own ~ '\n\n' }}"
    "{%- for t in tools or [] -%}{{ '<tool>' ~ t.function | tojson ~ '</tool>\n' }}{%- endfor -%}{{ '<|im_end|>\n' }}"
    "{%- for m in turns -%}{%- if m.role == 'assistant' -%}{{ '<|im_start|>assistant\n' }}{%- if mode == '/no_think' -%}"
    "{{ '<think>\n\n</think>\n' }}{%- endif -%}{% generation %}{{ m.content.lstrip('\n') ~ '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{%- else -%}{{ '<|im_start|>' ~ (m.role if m.role != 'tool' else 'user') ~ '\n' ~ m.content ~ '<|im_end|>\n' }}"
    "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}",
    IM, "<|im_end|>", lambda answers: [a.lstrip("\n") + "<|im_end|>" for a in answers],
    called='<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><|im_end|>', answered="four<|im_end|>",
    call={"role": "assistant", "content": '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'},
    thought=Thought(
        ["One.<|im_end|>", "Two.<|im_end|>"], 2,
        ["<think>\nhm\n</think>\n\nOne.<|im_end|>", "<think>\nhm\n</think>\n\nTwo.<|im_end|>"], 0,
    ),
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
_COMMAND_R = (
    "{{ bos_token }}{%- for m in messages -%}{%- set who = {'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM', "
    "'tool': 'SYSTEM'} -%}{{ '" + _TURN + "<|' ~ who[m.role] ~ '_TOKEN|>' }}SAID{{ '" + _END + "' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '" + _TURN + "<|CHATBOT_TOKEN|>' }}{%- endif -%}"
)
_SAID = "{{ m.content | trim }}"
# Two templates: that for rows with tools writes calls as actions, and results as the system's.
COMMAND_R = Family(
    _COMMAND_R.replace("SAID", _SAID).replace(", 'tool': 'SYSTEM'", ""),
    ("<BOS_TOKEN>", _TURN, _END, "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"), _END,
    always("", _END, strip=True), bos="<BOS_TOKEN>",
    called='Action: ```json\n[{"tool_name": "f", "parameters": {"x": 1}}]\n```' + _END, answered="four" + _END,
    tool_use=_COMMAND_R.replace(
        "SAID",
        "{%- if m.tool_calls -%}{{ 'Action: ```json\n[' }}{%- for c in m.tool_calls -%}"
        "{{ {'tool_name': c.function.name, 'parameters': c.function.arguments} | tojson }}{{ ',\n' if not loop.last }}"
        "{%- endfor -%}{{ ']\n```' }}{%- elif m.role == 'tool' -%}{{ '<results>\n' ~ m.content ~ '\n</results>' }}"
        "{%- else -%}" + _SAID + "{%- if loop.first -%}{%- for t in tools -%}"
        "{{ '\n\ndef ' ~ t.function.name ~ '(): ' ~ t.function.description }}{%- endfor -%}{%- endif -%}{%- endif -%}",
    ),
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
    thought=Thought(  # what a model thinks is part of what it says
        ["One.<|end_of_text|>", "Two.<|end_of_text|>"], 2,
        ["<think>\nhm\n</think>\n\nOne.<|end_of_text|>", "<think>\nhm\n</think>\n\nTwo.<|end_of_text|>"], 0,
    ),
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
    "DeepSeek V2": DEEPSEEK_V2, "DeepSeek V3": DEEPSEEK_V3, "DeepSeek R1": DEEPSEEK_R1, "GLM-4": GLM_4,
    "GLM-4.5": GLM_4_5, "gpt-oss": GPT_OSS, "SmolLM3": SMOLLM_3, "Zephyr": ZEPHYR, "Vicuna": VICUNA,
    "Command-R": COMMAND_R, "Granite": GRANITE, "Falcon": FALCON, "OLMo": OLMO,
}  # fmt: skip
