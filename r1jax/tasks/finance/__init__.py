"""Streams of payments: the risk that a payment is fraud, from its history, its numbers and notes."""
