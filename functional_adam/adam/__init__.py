"""All that is Adam: hyperparameters, state, equations, kernels, derivatives."""
