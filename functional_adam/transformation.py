"""Adam in the shape of optax and TorchOpt: a pair (init, update), and apply_updates.

Example:
    >>> from functional_adam import transformation
    >>> optimizer = transformation.adam(lr=0.1)
    >>> params = {"w": torch.tensor([1.0, -2.0])}
    >>> state = optimizer.init(params)
    >>> updates, state = optimizer.update({"w": torch.tensor([2.0, -4.0])}, state, params)
    >>> transformation.apply_updates(params, updates)["w"]
    tensor([ 0.9000, -1.9000])
"""

from functional_adam.interop.transformation import GradientTransformation, Init, Update, adam, apply_updates

__all__ = ["GradientTransformation", "Init", "Update", "adam", "apply_updates"]
