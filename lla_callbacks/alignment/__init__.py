"""Permutations of hidden units that bring one network close to another, verified."""
