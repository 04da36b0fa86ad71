"""One page of a run: what its monitors wrote, for a browser without a server or a network."""
