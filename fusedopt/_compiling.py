"""What torch.compile leaves alone: there is nothing in it that a compiler could make faster."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._compile import _disable_dynamo


def uncompiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """Let torch.compile break its graph at each call, and run it as it is.

    torch's own decorator takes as long as a small step: it is left out where nothing is compiled.
    """
    left_alone = _disable_dynamo(call)

    @functools.wraps(call)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return left_alone(*args, **kwargs)
        return call(*args, **kwargs)

    return wrapper
