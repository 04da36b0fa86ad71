"""Minima: what compares, relaxes and maps them, and follows their numbers over shifts."""
