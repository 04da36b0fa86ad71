"""Between networks: curves that join them, what the loss does along these, barriers."""
