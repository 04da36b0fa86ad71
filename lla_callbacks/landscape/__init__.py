"""Losses of modules on batches, and what is measured of them: no Lightning, no drawing."""
