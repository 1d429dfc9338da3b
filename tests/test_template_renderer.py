"""Chat templates are the same on every day, bounded, and otherwise what transformers renders."""

import time

import pytest
from data_helpers import dialogue

from MaxDraft.input_pipeline.conversations import Message
from MaxDraft.input_pipeline.errors import TemplateError
from MaxDraft.input_pipeline.template_renderer import TemplateRenderer

TWO = dialogue("Hello", "Hi")


def render(template, messages=TWO, **variables) -> str:
    return TemplateRenderer(template, variables).render(messages)[0]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ date_string }}", "26 Jul 2024"),
        ("{{ strftime_now('%Y-%m-%d %H:%M') }}", "2024-07-26 00:00"),
        ("{%- set now = strftime_now('%d %b %Y') -%}{{ now }}", "26 Jul 2024"),
    ],
)
def test_every_clock_shows_the_pinned_day(template, expected):
    assert render(template) == expected


@pytest.mark.parametrize("template", ["{{ [1, 2] | random }}", "{{ lipsum() }}"])
def test_chance_is_refused(template):
    with pytest.raises(TemplateError, match="refuses it"):
        render(template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 // 0 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%d' | format(1) }}{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ 'x' * 1000000000 }}",
        "{{ 1000000000 * ['x'] }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ 'x'.ljust(1000000000) }}",
        "{{ 'x' | center(1000000000) }}",
        "{{ 'x' | indent(1000000000) }}",
        "{{ strftime_now('%1000000000Y') }}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}xy{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set n = namespace(x='ab') %}"
        "{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='ab') %}"
        "{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{% set n = namespace(x='ab') %}"
        "{% for i in range(60) %}{% set n.x = [n.x, n.x] | join %}{% endfor %}",
        "{{ messages[7].content }}",
        "{{ nothing() }}",
        "{{ 3 + 'x' }}",
    ],
)
def test_a_template_out_of_bounds_ends_soon_with_our_error(template):
    start = time.monotonic()
    with pytest.raises(TemplateError, match="the chat template refuses it: "):
        render(template)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}", "{{ ", "{% nonsense %}", "{{ x|y }}"]
)
def test_what_is_no_template_is_our_error(template):
    with pytest.raises(TemplateError, match="refuses it"):
        TemplateRenderer(template, {})


def test_the_budget_is_for_a_conversation():
    renderer = TemplateRenderer("{% for i in range(90000) %}{% endfor %}ok", {})
    with pytest.raises(TemplateError, match="more than 5000000 steps"):
        for _ in range(100):
            renderer.render(TWO)
    renderer.begin_conversation()
    assert renderer.render(TWO)[0] == "ok"


def test_long_conversations_take_time_in_proportion():
    template = (
        "{% for m in messages %}{{ '<' ~ m.role ~ '>' ~ m.content | trim }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    messages = dialogue(*["word " * 100] * 4000)
    start = time.monotonic()
    text = render(template, messages)
    assert len(text) == sum(len(m.content.strip()) + len(m.role) + 2 for m in messages)
    assert time.monotonic() - start < 5


def test_reasoning_reaches_the_template_under_both_names():
    messages = [Message("assistant", "Hi", "I greet.")]
    for name in ("reasoning_content", "thinking"):
        assert render("{{ messages[0]." + name + " }}", messages) == "I greet."
    assert render("{{ messages[0].reasoning_content is defined }}", TWO) == "False"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ dict.__init__.__globals__ }}",
        "{{ strftime_now.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% set n = namespace(__init__=1) %}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ self.__init__.__globals__ }}",
        "{{ ('{0.__class__}').format(messages) }}",
    ],
)
def test_no_template_leaves_the_sandbox(template):
    try:
        text = render(template)
    except TemplateError as error:
        text = str(error).partition("refuses it: ")[2]
        assert "unsafe" in text or "namespace takes no name" in text
    else:
        assert text == ""  # what the sandbox hides is undefined


def test_generation_blocks_are_located():
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}[{% generation %}{{ m.content }}"
        "{% endgeneration %}]{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    text, blocks = TemplateRenderer(template, {}).render(dialogue("ab", "cde", "f", "gh"))
    assert [text[start:end] for start, end in blocks] == ["cde", "gh"]
