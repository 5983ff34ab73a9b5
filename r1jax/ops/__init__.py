"""Numerics: functions of arrays, each fast path beside its reference."""
