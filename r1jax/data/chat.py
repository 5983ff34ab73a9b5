"""R1's chat form, written out here: a checkpoint's Jinja template is a program of its author, and is never run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from r1jax.data.tokenizer_files import chat_template
from r1jax.errors import UserError

# The bars and the spaces are those of DeepSeek's vocabulary: U+FF5C and U+2581.
BEGIN = "<｜begin▁of▁sentence｜>"
END = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK, THINK_END = "<think>\n", "</think>"


class Message(NamedTuple):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


def r1_chat(messages: Sequence[Message]) -> str:
    """Writes a conversation as R1 was trained on it (the `chat_template` of DeepSeek-R1, without tools).

    Args:
      messages: At most one system message, first; then turns. Thoughts of earlier answers are left out.

    Returns:
      Text that ends where the assistant begins to think.

    Raises:
      UserError: A system message stands elsewhere, or there is no turn.
    """
    system = messages[0].content if messages and messages[0].role == "system" else ""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not turns or any(turn.role == "system" for turn in turns):
        raise UserError("chat: a conversation is at most one system message, first, and at least one other turn.")
    text = BEGIN + system
    for turn in turns:
        if turn.role == "user":
            text += USER + turn.content
        else:
            text += ASSISTANT + turn.content.rpartition(THINK_END)[2] + END
    return text + ASSISTANT + THINK


def check_template(path: Path) -> None:
    """Refuses a checkpoint whose own chat template is not of R1's form.

    Args:
      path: Its tokenizer.json, or the folder that holds it; one without a template is taken to be of R1's form.

    Raises:
      UserError: The template has other turns.
    """
    source, template = chat_template(path) or (path, None)
    if template is not None and not all(mark in template for mark in (USER, ASSISTANT, "<think>")):
        raise UserError(
            f"{source} has a chat template other than DeepSeek-R1's ({USER} ... <think>): give the prompt without "
            "--chat."
        )
