"""What the parts of a measurement cost, about, before anything was timed (docs/cost.md)."""

# In gradients of the held samples: a forward pass, and a product with the Hessian.
FORWARD = 1 / 3
PRODUCT = 2.4
# In training steps on a batch of the user's own, at most: a forward pass, a gradient with its
# graph, and a product on it.
STEP_FORWARD = 0.5
STEP_GRADIENT = 1.5
STEP_PRODUCT = 3.0
