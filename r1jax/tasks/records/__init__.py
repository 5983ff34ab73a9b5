"""Records with a class: risk or sentiment from numbers, a history and a text."""
