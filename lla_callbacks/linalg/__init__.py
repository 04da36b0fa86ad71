"""Linear algebra of symmetric operators: torch only."""
