"""The spectrum of the Hessian and what comes from it: measures, report, scalars, figures."""
