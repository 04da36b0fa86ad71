"""The loss on lines and planes and around a minimum: measures, reports, scalars, figures."""
