"""A module, batches and a loss as a repeatable function of the weights."""
