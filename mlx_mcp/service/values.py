"""The values of the layers below that a face gives to the service and gets from it: faces import them from here."""

from mlx_mcp.core.origin import Origin, called
from mlx_mcp.core.sampling import PARAMETERS, Parameter, Sampling
from mlx_mcp.core.session import MAX_FORKS, SessionInfo, SessionOptions
from mlx_mcp.engine.messages import Persisted
from mlx_mcp.engine.requests import CacheMiss, Count, Delta, Ending, GenerateRequest, Progress, Result, TokenChoice

__all__ = [
    "MAX_FORKS",
    "PARAMETERS",
    "CacheMiss",
    "Count",
    "Delta",
    "Ending",
    "GenerateRequest",
    "Origin",
    "Parameter",
    "Persisted",
    "Progress",
    "Result",
    "Sampling",
    "SessionInfo",
    "SessionOptions",
    "TokenChoice",
    "called",
]
