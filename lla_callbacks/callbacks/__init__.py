"""Lightning callbacks: the only folder that imports Lightning."""
