"""Calling a hook under its name, and not at all where it does nothing."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule

__all__ = ["has_work", "named"]


def named(module: LightningModule | None, hook: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a hook while the module has its name, by which `log` knows where it is called."""
    attributes: dict[str, Any] = vars(module)
    before = attributes["_current_fx_name"]
    attributes["_current_fx_name"] = hook
    output = function(*args, **kwargs)
    attributes["_current_fx_name"] = before
    return output


def has_work(function: Callable[..., Any]) -> bool:
    """Tell whether a hook is anything but a method whose body is its documentation."""
    code = getattr(getattr(function, "__func__", None), "__code__", None)
    return code is None or code.co_code != _nothing.__code__.co_code or code.co_consts[-1] is not None


def _nothing() -> None:
    """Do nothing."""
