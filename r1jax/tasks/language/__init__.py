"""Language: packed text, next-token and multi-token prediction, its figures."""
