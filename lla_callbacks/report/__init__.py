"""Results turned into scalars, figures and files: no models, no Lightning."""
