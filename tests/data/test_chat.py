"""R1's chat form against the published template, and which templates are refused."""

import json

import pytest

from r1jax.data.chat import Message, check_template, r1_chat
from r1jax.errors import UserError

# The part of DeepSeek-R1's `chat_template` that concerns text without tools.
TEMPLATE = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.system = m['content'] %}{% endif %}{% endfor %}{{ bos_token }}{{ ns.system }}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{% set content = m['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{{ '<｜Assistant｜><think>\\n' }}"
)
TURNS = [
    Message("system", "Be brief."),
    Message("user", "1 + 1?"),
    Message("assistant", "<think>\nsum</think>2"),
    Message("user", "再加 1?"),
]


def test_one_question():
    assert r1_chat([Message("user", "Hi")]) == "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>\n"


@pytest.mark.parametrize("messages", [TURNS, TURNS[1:], TURNS[:2], TURNS[1:2]])
def test_form_is_the_published_template(messages):
    jinja2 = pytest.importorskip("jinja2")
    expected = jinja2.Template(TEMPLATE, keep_trailing_newline=True).render(
        messages=[m._asdict() for m in messages], bos_token="<｜begin▁of▁sentence｜>"
    )
    assert r1_chat(messages) == expected


@pytest.mark.parametrize("messages", [[], TURNS[:1], [TURNS[1], TURNS[0]]])
def test_what_is_no_conversation_is_refused(messages):
    with pytest.raises(UserError, match="at most one system message"):
        r1_chat(messages)


def test_a_template_of_another_form_is_refused(tmp_path):
    check_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}), "utf-8")
    check_template(tmp_path)
    for other in ("<|im_start|>{{ messages }}", TEMPLATE.replace("<think>", "")):  # the second is DeepSeek-V3's
        (tmp_path / "chat_template.jinja").write_text(other, "utf-8")
        with pytest.raises(UserError, match="chat_template.jinja has a chat template other than DeepSeek-R1's"):
            check_template(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text("{", "utf-8")
    with pytest.raises(UserError, match="is no JSON object"):
        check_template(tmp_path)
