"""One layer of any nn.Module put in place of another, by name."""

from torch import nn


def replace(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Puts a module in the place called name and returns the one that was there. Raises ValueError
    when there is none.
    """
    parent_name, _, child = name.rpartition(".")
    try:
        old = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"the model has no module called {name!r}") from error
    setattr(model.get_submodule(parent_name), child, module)
    return old
