"""Chat templates: transformers' text for templates as models ship them, clear errors, no way out, no way to hang."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from kvpage.errors import RequestError
from kvpage.text.chat import ChatTemplate

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """{% for message in messages %}
{% if loop.first and message.role != 'system' %}
<|im_start|>system
You are helpful.<|im_end|>
{% endif %}
<|im_start|>{{ message['role'] }}
{{ message['content'] | trim }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}
{%- endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role in ["tool", "ipython"] %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or (message.content is iterable and message.content is not string) %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

QWEN = """{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- "# Tools\n\n<tools>" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- if not reasoning_content and '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role }}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\n<tool_call>\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
            {{- tool_call.arguments if tool_call.arguments is string else tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- for message in loop_messages | rejectattr("role", "equalto", "tool") | rejectattr("tool_calls", "defined") %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" and message["content"] is not none %}
        {% generation %}{{- " " + message["content"] | trim + eos_token }}{% endgeneration %}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + "}[/TOOL_RESULTS]" }}
    {%- endif %}
{%- endfor %}"""

PARTS = """{% for message in messages %}[{{ message.role }}]
{%- if message.content is string %}{{ message.content }}
{%- else %}{% for part in message.content %}{% if part.type == 'text' %}<{{ part.text }}>{% endif %}{% endfor %}
{%- endif %}{% endfor %}"""

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "qwen": QWEN, "mistral": MISTRAL, "parts": PARTS}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a place, <now> & here",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string"}},
                "required": ["place"],
            },
        },
    }
]
CALL = {
    "type": "function",
    "id": "call00001",
    "function": {"name": "weather", "arguments": {"place": "Köln"}},
}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "  Hello, 世界 🦄 <b>&</b>  "}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    "turns": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello!"},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2", "reasoning": "easy"},
    ],
    "tools": [
        {"role": "user", "content": "Weather in Köln?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": '{"sky": "grey"}'},
        {"role": "assistant", "content": "Grey."},
        {"role": "user", "content": "Thanks"},
    ],
}


@pytest.fixture(scope="module")
def oracle(backends: dict[str, Backend]) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backends["byte_level"], **SPECIALS)


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("chat", list(CHATS))
@pytest.mark.parametrize("template", list(TEMPLATES))
def test_same_text_as_transformers(
    oracle: Any, template: str, chat: str, tools: list[dict[str, Any]] | None
) -> None:
    ours = ChatTemplate(TEMPLATES[template], SPECIALS)
    for options in (
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"add_generation_prompt": True, "enable_thinking": False, "date_string": "1 Jan"},
        {"add_generation_prompt": False, "continue_final_message": True},
    ):
        theirs = oracle.apply_chat_template(
            CHATS[chat], tools=tools, chat_template=TEMPLATES[template], tokenize=False, **options
        )
        assert ours.render(CHATS[chat], tools=tools, **options) == theirs  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_found_under_every_name(oracle: Any, name: str) -> None:
    source = "{{ messages[0].reasoning_content }} {{ messages[0].thinking }}"
    chat = [{"role": "assistant", "content": "", name: "hm"}]
    theirs = oracle.apply_chat_template(chat, chat_template=source, tokenize=False)
    assert ChatTemplate(source, {}).render(chat) == theirs == "hm hm"


def test_continued_message_ends_the_prompt() -> None:
    chat = [*CHATS["one"], {"role": "assistant", "content": "The answer is "}]
    text = ChatTemplate(LLAMA3, SPECIALS).render(
        chat, add_generation_prompt=False, continue_final_message=True
    )
    assert text.endswith("The answer is")
    assert "<|eot_id|>" not in text[text.index("The answer") :]


def test_messages_are_not_changed() -> None:
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {
            "role": "assistant",
            "content": "Hm",
            "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
        },
    ]
    before = copy.deepcopy(chat)
    ChatTemplate(CHATML, SPECIALS).render(chat, add_generation_prompt=False, continue_final_message=True)
    assert chat == before


def test_text_parts_become_a_string_where_the_template_wants_one() -> None:
    chat = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "one"}, {"type": "input_text", "text": "two"}, "3"],
        }
    ]
    assert "\none\ntwo\n3<|im_end|>" in ChatTemplate(CHATML, SPECIALS).render(chat)
    assert ChatTemplate(PARTS, SPECIALS).render(chat) == "[user]<one><two><3>"
    assert ChatTemplate(PARTS, SPECIALS).render([{"role": "user", "content": "one"}]) == "[user]one"


@pytest.mark.parametrize(
    "loop",
    ["for c in message['content']", "for c in message.content | list", "set x = m.content %}{% for c in x"],
)
def test_loop_over_content_is_found_in_any_spelling(loop: str) -> None:
    source = "{% set message = messages[0] %}{% set m = message %}{% " + loop + " %}{{ c.text }};{% endfor %}"
    chat = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
    assert ChatTemplate(source, {}).render(chat) == "one;two;"


def test_arguments_given_as_json_text_become_objects() -> None:
    chat = copy.deepcopy(CHATS["tools"])
    chat[1]["tool_calls"][0]["function"]["arguments"] = '{"place": "Köln"}'
    template = ChatTemplate(LLAMA3, SPECIALS)
    assert template.render(chat) == template.render(CHATS["tools"])
    chat[1]["tool_calls"][0]["function"]["arguments"] = "{not json"
    assert '"{not json"' in template.render(chat)


def test_words_of_the_template_reach_the_caller() -> None:
    with pytest.raises(RequestError, match="roles must alternate user/assistant") as caught:
        ChatTemplate(MISTRAL, SPECIALS).render([{"role": "assistant", "content": "Hi"}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "empty"),
        ("Hello", "list of messages"),
        ({"role": "user", "content": "Hi"}, "list of messages"),
        ([{"role": "user", "content": "Hi"}, "Hello"], r"messages\[1\]"),
        ([{"content": "Hi"}], r"messages\[0\]\.role"),
        ([{"role": 3, "content": "Hi"}], r"messages\[0\]\.role .* 3"),
        ([{"role": "user", "content": 7}], r"messages\[0\]\.content .* 7"),
        ([{"role": "user", "content": {"text": "Hi"}}], r"messages\[0\]\.content"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            r"content\[0\] .*image_url",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\]\.text"),
        ([{"role": "user"}], "no attribute 'content'"),
        ([{"role": "user", "content": None}], "fails on these messages"),
    ],
)
def test_messages_of_the_wrong_form_are_named(messages: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        ChatTemplate("{{ messages[0].role + messages[0].content }}", SPECIALS).render(messages)
    assert caught.value.param == "messages"


def test_model_without_template_is_told_how_to_give_one() -> None:
    with pytest.raises(RequestError, match=r"chat_template=") as caught:
        ChatTemplate(None, SPECIALS)
    assert caught.value.param == "chat_template"


@pytest.mark.parametrize(
    "source", ["{% for x in y %}", "{{ 1 +", "{{ x | nofilter }}", "{% endif %}", "{{" + "(" * 9999]
)
def test_template_that_does_not_compile_is_a_request_error(source: str) -> None:
    with pytest.raises(RequestError, match="does not compile") as caught:
        ChatTemplate(source, SPECIALS)
    assert caught.value.param == "chat_template"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"continue_final_message": True}, "continue_final_message"),
        ({"messages": []}, "chat_template_kwargs"),
        ({"tools": ["f"]}, "tools"),
        ({"documents": ["d"]}, "documents"),
    ],
)
def test_options_that_cannot_be_are_named(options: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate(CHATML, SPECIALS).render(CHATS["one"], **options)
    assert caught.value.param == param


@pytest.mark.parametrize("content", [None, []])
def test_message_without_text_cannot_be_continued(content: Any) -> None:
    chat = [{"role": "assistant", "content": content}]
    with pytest.raises(RequestError, match="continue_final_message") as caught:
        ChatTemplate(PARTS, SPECIALS).render(chat, add_generation_prompt=False, continue_final_message=True)
    assert caught.value.param == "continue_final_message"


class Secret:
    def __init__(self) -> None:
        self.value = "leaked"

    def __str__(self) -> str:
        return "leaked"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.__class__.__bases__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ namespace(__class__=1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include 'x' %}",
        "{% import 'os' as os %}",
        "{% extends 'x' %}",
        "{{ open('/etc/passwd').read() }}",
        "{{ lipsum(5) }}",
    ],
)
def test_template_gets_nothing_out_of_the_sandbox(source: str) -> None:
    try:
        text = ChatTemplate(source, SPECIALS).render([{"role": "user", "content": "Hi"}])
    except RequestError:
        return
    assert text in ("", "{'role': 'user'}")


def test_objects_of_the_caller_reach_the_template_as_plain_data() -> None:
    class Model:
        def model_dump(self) -> dict[str, Any]:
            return {"role": "user", "content": "dumped"}

    chat: list[Any] = [Model(), {"role": "user", "content": "x", "extra": Secret()}]
    source = "{{ messages[0].content }} {{ messages[1].extra }} {{ option.value }} {{ option }}"
    assert ChatTemplate(source, {}).render(chat, option=Secret()) == "dumped <Secret>  <Secret>"


RUNAWAY = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested": "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}",
    "nested filters": "{% for i in range(99999) %}{{ range(99999)|list|length }}{% endfor %}",
    "output": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "times": "{{ ('x' * 10**7) * 10**7 }}",
    "constant": "{{ 'a'|center(9999999999) }}",
    "list times": "{{ ([1] * 10**6) * 10**6 }}",
    "plus": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "tilde": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "shared": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
    "shared json": "{% set n = namespace(s=1) %}{% for i in range(99) %}{% set n.s = [n.s,n.s] %}{% endfor %}{{ n.s|tojson }}",
    "shared string": "{% set n = namespace(s=1) %}{% for i in range(99) %}{% set n.s = [n.s,n.s] %}{% endfor %}{{ n.s|string }}",
    "set block": "{% set s = 'x' * 10**7 %}{% set t %}{% for i in range(999) %}{{ s }}{% endfor %}{% endset %}",
    "macro": "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "macro tree": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "power": "{{ 10**(10**10) }}",
    "power loop": "{% set n = namespace(v=3) %}{% for i in range(99) %}{% set n.v = n.v * n.v %}{% endfor %}",
    "width": "{{ '%1000000000d' % 1 }}",
    "star width": "{{ '%*d' % (10**9, 1) }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "format width": "{{ '{:>{w}}'.format(1, w=10**9) }}",
    "nested width": "{{ '{{{:>{}}}}'.format(1, 10**9) }}",
    "precision": "{{ '%.1000000000f' % 1 }}",
    "flags": "{{ '%- 01000000000d' % 1 }}",
    "date": "{{ strftime_now('%Y' * 10**6) }}",
    "ljust": "{{ 'x'.ljust(10**9) }}",
    "indent": "{{ ('\n' * 10**6)|indent(10**6) }}",
    "json indent": "{{ [1]|tojson(indent=10**9) }}",
    "replace": "{{ ('x' * 10**6).replace('x', 'y' * 10**6) }}",
    "replace filter": "{{ ('x' * 10**6)|replace('x', 'y' * 10**6) }}",
    "join": "{{ ('x' * 10**6).join(['y'] * 10**6) }}",
    "join filter": "{{ (['y' * 10**6] * 10**6)|join }}",
    "join separator": "{{ (['y'] * 10**6)|join('x' * 10**6) }}",
    "expandtabs": "{{ ('\t' * 10**6).expandtabs(10**6) }}",
    "translate": "{{ ('x' * 10**6).translate({120: 'y' * 10**6}) }}",
    "fields": "{{ ('{0}' * 10**6).format('x' * 10**6) }}",
    "named fields": "{{ ('%(a)s' * 10**6) % {'a': 'x' * 10**6} }}",
    "urlize": "{{ ('a.com ' * 10**6) | urlize(target='x' * 10**6) }}",
    "round": "{{ 1 | round(-1000000000) }}",
    "ceil": "{{ 1 | round(1000000000, 'ceil') }}",
    "bytes": "{{ 'x'.encode() * 10**10 }}",
    "to_bytes": "{{ (5).to_bytes(10**10, 'big') }}",
    "batch": "{{ [1]|batch(10**9, 'x')|list }}",
}


@pytest.mark.parametrize("name", list(RUNAWAY))
def test_runaway_template_is_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpage.text.sandbox.MAX_STEPS", 100_000)
    monkeypatch.setattr("kvpage.text.sandbox.MAX_SECONDS", 1.0)
    with pytest.raises(RequestError):
        ChatTemplate(RUNAWAY[name], SPECIALS).render(CHATS["one"])


def test_template_that_is_merely_slow_is_stopped_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(
        "kvpage.text.sandbox.time", type("Clock", (), {"monotonic": lambda: float(next(clock))})
    )
    with pytest.raises(RequestError, match="seconds"):
        ChatTemplate("{% for i in range(1000) %}{% endfor %}", SPECIALS).render(CHATS["one"])


def test_long_conversation_stays_within_the_bounds() -> None:
    turns = [
        {"role": role, "content": f"{role} {turn} " + "word " * 50}
        for turn in range(2000)
        for role in ("user", "assistant")
    ]
    for template in (LLAMA3, QWEN, MISTRAL, CHATML):
        assert len(ChatTemplate(template, SPECIALS).render(turns)) > 1_000_000


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("'%d of %s' % (1700000000, [1])", "1700000000 of [1]"),
        ("'%s' | format(1700000000)", "1700000000"),
        ("'{:,} **'.format(1700000000)", "1,700,000,000 **"),
        ("'{{\"20240101\": {}}} 1700000000'.format(1700000000)", '{"20240101": 1700000000} 1700000000'),
        ("'%08.3f|%5s' % (1.5, 'x')", "0001.500|    x"),
        ("'{:>6}'.format('x')", "     x"),
        ("'a-b' | replace('-', '+') | upper | center(7)", "  A+B  "),
        ("['a', 1, none] | join(', ')", "a, 1, None"),
        ("'a\nb' | indent(2)", "a\n  b"),
        ("[1, 2, 3] | batch(2) | list", "[[1, 2], [3]]"),
        ("1.25 | round(1)", "1.2"),
        ("'{} {}'.format('x' * 1000, 'y') | length", "1002"),
        ("2 ** 10 * 3 + 7 % 4", "3075"),
        ("(strftime_now('%Y') | int) > 2000", "True"),
        ("dict(a=1) | tojson ~ 'é' ~ 2", '{"a": 1}é2'),
    ],
)
def test_ordinary_work_is_not_bounded(expression: str, text: str) -> None:
    assert ChatTemplate("{{ " + expression + " }}", {}).render(CHATS["one"]) == text
