"""The penalty on the trace of the Hessian, and estimators of its gradient."""
