"""The templates' environment is transformers' own, as far as a template can tell."""

import json

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from mlx_mcp.mlx_backend.text_worker import environment

GIVEN = {
    "messages": [{"role": "user", "content": "é<&>'\"\n"}, {"role": "assistant", "content": " x "}],
    "tools": [{"type": "function", "function": {"name": "look", "parameters": {"a": [1, 2.5, None, True]}}}],
    "add_generation_prompt": True,
    "eos_token": "<e>",
    "enable_thinking": False,
}
TEMPLATES = [
    "{% for m in messages %}\n  {% if loop.first %}\n{{ m['content'] | trim }}\n  {% endif %}\n{% endfor %}\nend\n",
    "{{ tools | tojson }}{{ tools | tojson(indent=2) }}{{ tools | tojson(separators=(',', ':'), sort_keys=true) }}",
    "{{ tools | tojson(ensure_ascii=true) }}{{ messages | tojson }}{{ messages[0] }}",
    "{% for m in messages %}{% if loop.index0 %}{% break %}{% endif %}{% continue %}{% endfor %}x",
    "{% generation %}{{ messages[1].content }}{% endgeneration %}|",
    "{% set ns = namespace(a=1) %}{% for i in range(3) %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}",
    "{{ dict(a=1) | tojson }}{{ dict.fromkeys(['a'], 2) | tojson }}{{ documents is none }}{{ missing is defined }}",
    "{{ strftime_now('%Y') }}{{ enable_thinking }}{{ eos_token }}{{ add_generation_prompt }}{{ missing }}",
    "{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m('a') ~ m(1) }}{{ 'a-b'.split('-') | last }}{{ range(3) | list }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(',') }}{{ 'x' * 3 }}",
]
REFUSALS = [
    "{{ raise_exception('roles must alternate') }}",
    "{{ messages.append(1) }}",
    "{{ ''.__class__.__mro__ }}",
    "{% set ns = namespace(_a=1) %}",
    "{% set ns = namespace() %}{% set ns._a = 1 %}",
    "{{ missing.name.other }}",
    "{{ range(1000000) }}",
    "{% for %}",
]


def theirs(template):
    (text,), _ = render_jinja_template(conversations=[GIVEN["messages"]], chat_template=template, **rest())
    return text


def rest():
    return {name: value for name, value in GIVEN.items() if name != "messages"}


def ours(template):
    # As the process gets it.
    return environment().from_string(template).render(**json.loads(json.dumps(GIVEN | {"documents": None})))


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_is_rendered_as_transformers_does(template):
    assert ours(template) == theirs(template)


@pytest.mark.parametrize("template", REFUSALS)
def test_what_transformers_refuses_is_refused_in_the_same_words(template):
    with pytest.raises(Exception) as their_error:  # noqa: PT011
        theirs(template)
    with pytest.raises(Exception) as our_error:  # noqa: PT011
        ours(template)
    assert str(our_error.value) == str(their_error.value)


def test_the_environment_has_all_that_transformers_gives_templates():
    made, known = environment(), _compile_jinja_template("").environment
    for part in ("filters", "tests", "globals"):
        assert set(getattr(made, part)) == set(getattr(known, part))
    assert len(made.extensions) == len(known.extensions)
    assert (made.trim_blocks, made.lstrip_blocks) == (known.trim_blocks, known.lstrip_blocks)
    assert made.sandboxed
