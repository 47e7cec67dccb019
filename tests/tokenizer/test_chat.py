"""Conversations come out as `transformers` has them; a template that wants more than text gets an error, soon."""

import time

import pytest

from triglot.errors import ConfigError
from triglot.tokenizer.chat import render

CHAT = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Was ist <b>2</b> & 'zwei'?\n"},
    {"role": "assistant", "content": "Zwei. 🙂"},
    {"role": "user", "content": "Und drei?"},
]
TEMPLATES = {
    "llama3": """
{%- set loop_messages = messages %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if loop_messages[0]['role'] == 'system' %}
    {%- set system_message = loop_messages[0]['content']|trim %}
    {%- set loop_messages = loop_messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- bos_token }}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in loop_messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "qwen": """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" ~ (tool | tojson) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and not message.content.startswith('<tool>') %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- macro say(role, content) %}
    {{- '<|im_start|>' ~ role ~ '\\n' ~ content ~ '<|im_end|>' ~ '\\n' }}
{%- endmacro %}
{%- for message in messages if message.content is string %}
    {%- if loop.index0 > ns.last %}{{- '<think>' }}{%- endif %}
    {{- say(message.role, message.content.split('</think>')[-1].lstrip('\\n')) }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
""",
    "smollm2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nYou are helpful<|im_end|>\\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "marked": (
        "{% for m in messages %}\n  {% if m.role == 'tool' %}{% continue %}{% endif %}\n"
        "{% generation %}{{ m | tojson(indent=2) }}{% endgeneration %}{% if loop.index > 2 %}{% break %}{% endif %}\n"
        "{% endfor %}{{ '-' * 3 ~ 2 ** 3 ~ 1.5 * 2 ~ ([1] + [2]) }}{{ range(3) | join(',') }}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("more", [True, False])
@pytest.mark.parametrize("chat", [CHAT, CHAT[1:2], CHAT[:3]])
def test_a_conversation_is_what_transformers_makes_of_it(name, more, chat):
    chats = pytest.importorskip("transformers.utils.chat_template_utils")
    variables = {"bos_token": "<s>", "eos_token": "</s>", "enable_thinking": False}
    tools = [{"name": "add", "description": "a & <b>"}] if name == "qwen" else None
    [expected], _ = chats.render_jinja_template(
        [chat], tools=tools, chat_template=TEMPLATES[name], add_generation_prompt=more, **variables
    )
    given = {"add_generation_prompt": more, "tools": tools, "documents": None, **variables}
    assert render(TEMPLATES[name], chat, **given) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages | attr('__class__') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{% import 'os' as os %}{{ os.system('true') }}",
        "{% include '/etc/passwd' %}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
    ],
)
def test_a_template_reaches_nothing_but_what_it_is_given(template):
    with pytest.raises(ConfigError, match="The chat template can not say"):
        render(template, CHAT)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) if (range(99999) | list | length) < 0 %}{% endfor %}",
        "{% for a in range(10 ** 12) %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(200) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x * 2 %}{% endfor %}",
        "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ 7 ** (10 ** 9) }}",
    ],
)
def test_a_template_comes_to_its_end(template):
    began = time.process_time()
    with pytest.raises(ConfigError, match="it goes on for more than 10,000,000 steps|recursion"):
        render(template, CHAT)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("template", "messages", "told"),
    [
        ("{{ raise_exception('Roles must alternate') }}", CHAT, "Roles must alternate"),
        ("{% if %}", CHAT, "Expected an expression"),
        ("{{ messages[9].content }}", CHAT, "has no element 9"),
        ("{{ 1 / 0 }}", CHAT, "division by zero"),
        ("", [], "`messages` must be one message or more"),
        ("", ["hello"], "`messages` must be one message or more"),
        ("", [{"content": "a"}], "`messages` must be one message or more"),
        ("", [{"role": "user", "content": {1, 2}}], "what JSON can hold"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_what_can_not_be_said_is_told(template, messages, told):
    with pytest.raises(ConfigError, match=told):
        render(template, messages)


def test_a_long_conversation_is_said():
    chat = [{"role": "user", "content": "x" * 1000}, {"role": "assistant", "content": "y" * 1000}] * 300
    assert len(render(TEMPLATES["qwen"], chat)) > 600_000
