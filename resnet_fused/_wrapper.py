"""A module that stands in the place of another one and shares all its state with it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from ._links import has_hooks

# The dict objects that make up a module's state. Sharing the objects, not copies, is what keeps
# state_dict, load_state_dict, .to(), deepcopy and pickle of the wrapper those of the original.
_SHARED = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class Wrapper(nn.Module):
    """Takes the place of `original`: same children, same keys, same attributes.

    The original lives on beside the module tree (it is not a child) and shares its parameters,
    buffers and children with the wrapper, so that it can run at any moment and be put back as it
    was.
    """

    def __init__(self, original: nn.Module) -> None:
        nn.Module.__init__(self)  # not that of a class that it stands for as well
        for name in _SHARED:
            self.__dict__[name] = original.__dict__[name]
        self.__dict__["_original"] = original
        self.__dict__["_attribute_set"] = None  # one that the original had, set through the wrapper
        self.__dict__["training"] = original.training
        self.__dict__["_version"] = original._version  # goes into state_dict's metadata

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("_original")
            if original is None or name.startswith("__"):
                raise
            return getattr(original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """On the original, unless the wrapper has an attribute of that name itself.

        The plain block must see what its own __init__ might have set: `block.conv3 = conv`
        where conv3 was None. The shared dicts show children, parameters and buffers to both.
        """
        original = self.__dict__.get("_original")
        if original is None or name in self.__dict__ or hasattr(type(self), name):
            super().__setattr__(name, value)
            return
        if name not in self._modules and getattr(original, name, value) is not value:
            self.__dict__["_attribute_set"] = name
        setattr(original, name, value)

    def __delattr__(self, name: str) -> None:
        original = self.__dict__.get("_original")
        if original is None or name in self.__dict__:
            super().__delattr__(name)
        else:
            delattr(original, name)
            self.__dict__["_attribute_set"] = name

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__["_original"]._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Batch norm's own fills in what older checkpoints lack.
        self.__dict__["_original"]._load_from_state_dict(*args, **kwargs)

    def recorded(self, x: fx.Proxy) -> fx.Proxy:
        """The call in a graph that torch.fx records: as one of a layer of PyTorch's own."""
        return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})

    def original(self) -> nn.Module:
        """The wrapped module, in the wrapper's training mode."""
        original = self.__dict__["_original"]
        original.training = self.training
        return original


def run_plainly(wrapper: Wrapper, *args: Any, **kwargs: Any) -> Tensor:
    """What the original computes; from the wrapper's attributes, because that is where a
    parametrization or pruning of `parent.conv` puts the weight."""
    original = wrapper.original()
    patched = original.__dict__.get("forward")
    if patched is not None and patched is wrapper.__dict__.get("forward"):
        # unfuse took it along, and it calls the wrapper's own.
        return type(original).forward(wrapper, *args, **kwargs)
    if patched is not None or has_hooks(original):
        return original(*args, **kwargs)
    return type(original).forward(wrapper, *args, **kwargs)


def is_opaque(module: nn.Module) -> bool:
    """Leaves of a trace through a model: fused modules and PyTorch's own layers."""
    own = type(module).__module__.startswith("torch.nn.")
    return isinstance(module, Wrapper) or (own and not isinstance(module, nn.Sequential))
